"""Every step on scikit-learn's digits: a teacher, a student made from it, a hundred labelled images, a comparison, an ONNX file.

The story: somebody has a trained network and few images of their own, and needs one with three percent of its work. Six students of
one shape are trained on those images, for the same number of epochs in all: by labels, by knowledge distillation (KD), and by the
warm-up and KD, each from new weights and from the teacher's weights as `compress` cuts and repairs them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.make_student import Measure, calibration, make_student
from indistill_fx.compression.write_source import source_of
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsTeacher
from indistill_fx.deploy.export_onnx import ExportReport, export_onnx
from indistill_fx.deploy.metadata import of_source
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.passes.capture.trace import trace
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.load import about, about_data, keep_export
from indistill_fx.runs.record import RunRecord
from indistill_fx.traced import TracedModel
from indistill_fx.training.compare import Arm, compare
from indistill_fx.training.distill import distill
from indistill_fx.training.parallel.processes import is_main_process
from indistill_fx.training.recipes import NO_WARMUP
from indistill_fx.training.supervised import train

TEACHER_EPOCHS = 12
IMAGES = 100
MACS = 0.03
STUDENT_EPOCHS = 60
WARMUP = 45
KEEP_FEATURES = 10.0
LEARNING_RATE = 5e-3
NAMES = {
    "teacher": "teacher, all images",
    "scratch-labels": "new weights: labels",
    "scratch-kd": "new weights: KD",
    "scratch-indistill": "new weights: warm-up + KD",
    "labels": "compressed: labels",
    "kd": "compressed: KD",
    "indistill": "compressed: warm-up + KD",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the final table."""

    name: str
    accuracy: float
    seconds: float
    parameters: int
    macs: int
    export: ExportReport


@dataclass(frozen=True, slots=True)
class Small:
    """The student before training: with the teacher's weights, with new ones, its pairs, and where its source code is."""

    cut: nn.Module
    fresh: nn.Module
    plan: AlignmentPlan
    spec: str


def run_demo(out: Path, *, seed: int = 0, progress: bool = True, say: Callable[[str], None] = print) -> list[Row]:
    """Train, compress, compare, export.

    Args:
        out: folder for plan, runs, metrics and ONNX files.
        seed: of weights and batches.
        progress: show how training gets on.
        say: where the story goes, line by line.

    Returns:
        A row per model, the teacher first; under torchrun in the first process only.

    Raises:
        ConfigError: `out` holds a demo already.
    """
    data = open_data("digits", batch_size=64, seed=seed)
    few = replace(open_data("digits", batch_size=64, seed=seed, limit=IMAGES), test=data.test)
    torch.manual_seed(seed)
    teacher = DigitsTeacher()
    shared: dict[str, Any] = {"val_loader": data.test, "seed": seed, "progress": progress, "device": "cpu"}
    say(f"1. A teacher: {TEACHER_EPOCHS} epochs on all {data.train.samples:,} images.")
    kept = about("indistill_fx.demo:DigitsTeacher", "digits", data.input_size, **about_data(data))
    record = train(teacher, data.train, epochs=TEACHER_EPOCHS, run_dir=out / "teacher", about=kept, **shared)
    x = next(iter(data.train_plain))[0][:2]
    say(
        f"2. A student made from it, with {MACS:.0%} of its multiply-accumulates, from {IMAGES} images without their labels:"
    )
    traced = trace(teacher, x, role="teacher")
    small = _compressed(traced, few, out, seed, lambda line: say(f"   {line}"))
    say(
        f"3. Six ways to train it on those {IMAGES} images, {STUDENT_EPOCHS} epochs each; of these the warm-up takes {WARMUP}, and its loss"
        " stays in the main stage."
    )
    arms = _trained(traced, small, few, out, say, shared)
    if not is_main_process():
        return []
    say("4. Export to ONNX, compared with the modules.")
    models = {"teacher": (teacher, record), **{arm: (done.student, done.record) for arm, done in arms.items()}}
    rows = [_finish(name, model, record, data, out, x) for name, (model, record) in models.items()]
    (out / "demo.json").write_text(
        json.dumps({row.name: {"accuracy": row.accuracy, "seconds": row.seconds} for row in rows}, indent=2) + "\n"
    )
    return rows


def _compressed(teacher: TracedModel, few: Data, out: Path, seed: int, say: Callable[[str], None]) -> Small:
    """Choose widths, prune, repair, and write the student as source code."""
    measure = Measure(calibration(few.train_plain, IMAGES), lambda model: evaluate(model, few.test), say=say)
    made = make_student(teacher, Budget(macs=MACS), measure)
    source = source_of(made.model)
    source.save(out / "student")
    cut, fresh = source.build(), source.build()
    torch.manual_seed(seed)
    for part in fresh.modules():
        if callable(reset := getattr(part, "reset_parameters", None)):
            reset()
    plan = plan_of(teacher, trace(cut, teacher.example_inputs, role="student"), made.shrunk.axes)
    if is_main_process():
        plan.save(out / "plan.json")
    return Small(cut, fresh, plan, f"{out / 'student' / 'student.py'}:Student")


def _trained(
    teacher: TracedModel, small: Small, few: Data, out: Path, say: Callable[[str], None], shared: dict[str, Any]
) -> dict[str, Arm]:
    """Train the student in six ways; returns the results by name."""
    description = about(small.spec, "digits", few.input_size, **about_data(few))
    rates: dict[str, Any] = {"learning_rate": LEARNING_RATE, "schedule": "cosine"}
    common: dict[str, Any] = {
        "plan": small.plan,
        "example_inputs": teacher.example_inputs[0],
        "about": description,
        **shared,
        **rates,
    }
    warmup = Curriculum(together=True, lengths=WARMUP, learning_rate=LEARNING_RATE, keep_features=KEEP_FEATURES)
    arms = {}
    for name, main, curriculum in (
        ("scratch-labels", "labels", NO_WARMUP),
        ("scratch-kd", "kd", NO_WARMUP),
        ("scratch-indistill", "kd", warmup),
    ):
        say(f"   {NAMES[name]}:")
        epochs = STUDENT_EPOCHS - (WARMUP if curriculum is warmup else 0)
        arm_options: dict[str, Any] = {"curriculum": curriculum, "main": main, "epochs": epochs, "run_dir": out / name}
        student = copy.deepcopy(small.fresh)
        arms[name] = Arm(student, distill(teacher, student, few.train, **arm_options, **common))
    return arms | compare(
        teacher,
        small.cut,
        few.train,
        curriculum=warmup,
        epochs=STUDENT_EPOCHS,
        run_dir=out,
        announce=lambda arm: say(f"   {NAMES[arm]}:"),
        **common,
    )


def _finish(name: str, model: nn.Module, record: RunRecord, data: Data, out: Path, x: Tensor) -> Row:
    """Export one model, and compare the file with it on real digits."""
    target = out / f"{'student' if name == 'indistill' else name}.onnx"
    report = export_onnx(
        model,
        target,
        x,
        real_inputs=next(iter(data.test))[0],
        metadata=of_source(classes=data.classes, normalisation=data.normalisation),
    )
    macs = trace(model, x).macs
    keep_export(out / name, path=str(target), size=report.size, latency_ms=report.latency_ms, macs=macs)
    assert record.accuracy is not None  # the demo always passes validation data
    return Row(
        NAMES[name],
        record.accuracy,
        record.seconds,
        sum(parameter.numel() for parameter in model.parameters()),
        macs,
        report,
    )
