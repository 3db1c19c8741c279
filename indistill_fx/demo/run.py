"""The whole way on scikit-learn's digits: a teacher, one student trained in three ways, a comparison, an ONNX file.

The three students start from the same weights and seed and get the same number of epochs in all, the warm-up counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher
from indistill_fx.deploy.export_onnx import ExportReport, export_onnx
from indistill_fx.deploy.metadata import of_source
from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import trace
from indistill_fx.runs.load import about, about_data, keep_export
from indistill_fx.runs.record import RunRecord
from indistill_fx.training.compare import compare
from indistill_fx.training.parallel.processes import is_main_process
from indistill_fx.training.supervised import train

TEACHER_EPOCHS = 12
STUDENT_EPOCHS = 18
WARMUP = (1, 2, 3)
LEARNING_RATE = 5e-3
NAMES = {"teacher": "teacher", "labels": "cross-entropy", "kd": "KD", "indistill": "InDistill + KD"}


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the final table."""

    name: str
    accuracy: float
    seconds: float
    parameters: int
    macs: int
    export: ExportReport


def run_demo(out: Path, *, seed: int = 0, progress: bool = True, say: Callable[[str], None] = print) -> list[Row]:
    """Train, compare, export.

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
    torch.manual_seed(seed)
    teacher, initial = DigitsTeacher(), DigitsStudent()
    shared: dict[str, Any] = {"val_loader": data.test, "seed": seed, "progress": progress, "device": "cpu"}
    say(f"1. Teacher: {TEACHER_EPOCHS} epochs on labels.")
    kept = about("indistill_fx.demo:DigitsTeacher", "digits", data.input_size, **about_data(data))
    record = train(teacher, data.train, epochs=TEACHER_EPOCHS, run_dir=out / "teacher", about=kept, **shared)
    x = next(iter(data.train_plain))[0][:2]
    plan = align(teacher, initial, example_inputs=x)
    if is_main_process():
        plan.save(out / "plan.json")
    say(
        "2. Alignment: "
        + ", ".join(
            f"{pair.teacher} ↔ {pair.student} ({len(pair.kept or ())} of {pair.teacher_shape[1]})"
            for pair in plan.pairs
        )
    )
    say(
        f"3. The same student three ways, {STUDENT_EPOCHS} epochs each, of which {sum(WARMUP)} of warm-up in the third."
    )
    arms = compare(
        teacher,
        initial,
        data.train,
        plan=plan,
        curriculum=Curriculum(lengths=WARMUP, learning_rate=LEARNING_RATE),
        epochs=STUDENT_EPOCHS,
        example_inputs=x,
        run_dir=out,
        learning_rate=LEARNING_RATE,
        schedule="cosine",
        announce=lambda arm: say(f"   {NAMES[arm]}:"),
        about=about("indistill_fx.demo:DigitsStudent", "digits", data.input_size, **about_data(data)),
        **shared,
    )
    if not is_main_process():
        return []
    say("4. Export to ONNX, compared with the modules.")
    trained = {"teacher": (teacher, record), **{arm: (done.student, done.record) for arm, done in arms.items()}}
    rows = [_finish(name, model, record, data, out, x) for name, (model, record) in trained.items()]
    (out / "demo.json").write_text(
        json.dumps({row.name: {"accuracy": row.accuracy, "seconds": row.seconds} for row in rows}, indent=2) + "\n"
    )
    return rows


def _finish(name: str, model: nn.Module, record: RunRecord, data: Data, out: Path, x: Tensor) -> Row:
    """Export one model with proof on real digits."""
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
    assert record.accuracy is not None  # there was validation data
    return Row(
        NAMES[name],
        record.accuracy,
        record.seconds,
        sum(parameter.numel() for parameter in model.parameters()),
        macs,
        report,
    )
