"""`compress`: from a teacher alone to a trained student and its directory.

Rules, in order:
  1. Widths: sensitivities measured on a few batches, then an allocation under the budget (`make_student`).
  2. The teacher is shrunk to them, and the student repaired; whichever repair brings its outputs nearest to the teacher's is kept.
  3. The student is written as source code, with the plan of which channels it has.
  4. `distill`: the warm-up, then the main loss. 5. ONNX.

An interrupted run can be resumed: the results of steps 1 to 3 are read again, and training resumes as in any run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from indistill_fx.batch import split
from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.correspond import plan_if_any
from indistill_fx.compression.latency import Clock, Runtime
from indistill_fx.compression.made import START, Made, check_free, input_size, read_made, save_made, write_made
from indistill_fx.compression.make_student import (
    Measure,
    Step,
    calibration,
    make_student,
    measured,
    require_trained,
)
from indistill_fx.curriculum import Curriculum
from indistill_fx.evaluation.accuracy import Evaluation, evaluate
from indistill_fx.graph.edit import one_sample
from indistill_fx.graph.module_state import digest
from indistill_fx.losses.registry import asked_of_the_data, options_without_labels
from indistill_fx.losses.task import Task
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.criteria import Criterion
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.checkpoint import state_tensors
from indistill_fx.runs.directory import STUDENT
from indistill_fx.runs.load import about as about_model
from indistill_fx.runs.load import keep_export, run_fingerprint, task_in
from indistill_fx.runs.record import RunRecord
from indistill_fx.stages.compile import warmup_plan
from indistill_fx.stages.traced_pair import examples_of
from indistill_fx.system.files import shown, try_folder
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import count_of, is_state, samples_of
from indistill_fx.system.tensor_files import save_tensors
from indistill_fx.traced import TracedModel
from indistill_fx.training.distill import distill
from indistill_fx.training.options.settings import Options
from indistill_fx.training.recipes import NO_WARMUP, RECIPES
from indistill_fx.training.task import RunTask, task_of_run, without_labels


@dataclass(frozen=True)
class Compressed:
    """What `compress` made.

    Attributes:
        student: the trained student.
        plan: which of the teacher's channels it has at every pair; None where no layers could be paired.
        record: of the training.
        steps: the student's state after each step.
        spec: the model spec that loads it; empty where it has no source code.
    """

    student: nn.Module
    plan: AlignmentPlan | None
    record: RunRecord
    steps: tuple[Step, ...]
    spec: str


def compress(
    teacher: nn.Module | TracedModel,
    train_loader: Iterable[Any],
    *,
    run_dir: str | os.PathLike[str],
    macs: float | None = None,
    params: float | None = None,
    size_mb: float | None = None,
    latency_ms: float | None = None,
    on: Runtime = "onnxruntime",
    threads: int = 1,
    batch: int = 1,
    criterion: str | Criterion = "l1",
    round_to: int | None = None,
    samples: int = 1024,
    calibration_loader: Iterable[Any] | None = None,
    every_block: bool = True,
    curriculum: Curriculum | None = None,
    main: str | Callable[..., Tensor] | None = None,
    main_options: Mapping[str, Any] | None = None,
    task: str | Task | None = None,
    epochs: int | None = None,
    val_loader: Iterable[Any] | None = None,
    example_inputs: Any = None,
    logits: str | int | None = None,
    export: bool = True,
    resume: bool = False,
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **options: Unpack[Options],
) -> Compressed:
    """Make a smaller student from a teacher alone, and train it.

    Args:
        teacher: traced, or a plain module; it is not changed.
        train_loader: batches, as for `distill`.
        run_dir: the folder for all results: student.py, plan.json, the training's files, student.safetensors, student.onnx, compress.json.
        macs: budget: a share up to 1, or a number of multiply-accumulates of one sample. Give exactly one budget.
        params: budget: a share up to 1, or a number of parameters.
        size_mb: budget: size of the weights in megabytes (10^6 bytes).
        latency_ms: budget: milliseconds of one call on the target, as measured.
        on: the target's runtime: `onnxruntime`, `torch` or `torch-compile`.
        threads: threads of the target.
        batch: samples per call on the target.
        criterion: which channels of a group are removed first: a name, or a function of weights, as for `shrink`.
        round_to: keep a multiple of this number of channels.
        samples: how many training samples sensitivities are measured on, and the student is repaired on.
        calibration_loader: the loader that these samples come from; None: the training loader.
        every_block: pair every block; False: one pair per network stage.
        curriculum: the warm-up; None: that of the recipe `compress`.
        main: the main loss; None: that of the recipe.
        main_options: keyword arguments of the main loss.
        task: what the labels mean, as for `distill`.
        epochs: of the main stage; None: as in the recipe.
        val_loader: batches to measure on after every step, and to validate on, as for `distill`.
        example_inputs: to trace a plain module with; None: taken from the first batch.
        logits: key or index of the logits, as for `distill`.
        export: also write student.onnx.
        resume: continue what is in `run_dir`, or begin.
        progress: show progress on standard error.
        about: further facts to keep in run.json.
        say: called with one line about every step.
        options: the options of training, listed under `Settings`.

    Returns:
        The student, the plan, the record of the training, and what each step cost.

    Raises:
        ConfigError: budget, data, teacher, options or directory are at fault.
        PruneError: the budget cannot be met, or no channel can be removed.
        TrainError: a loss is not finite, or the disk is full.

    Examples:
        >>> import tempfile
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32)
        >>> teacher = DigitsTeacher(widths=(8, 8, 8))
        >>> short = dict(epochs=1, samples=32, curriculum=ifx.Curriculum(lengths=1), export=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = ifx.compress(teacher, data.train, run_dir=folder, macs=0.5, **short)
        >>> made.steps[-1].macs < 0.5 * made.steps[0].macs
        True
    """
    budget = Budget(macs=macs, params=params, size_mb=size_mb, latency_ms=latency_ms)
    clock, folder = Clock(on, threads, batch), Path(run_dir).absolute()
    source = teacher.module if isinstance(teacher, TracedModel) else teacher
    example = examples_of(train_loader, source)[0] if example_inputs is None else example_inputs
    model = teacher if isinstance(teacher, TracedModel) else trace(teacher, example, role="teacher", logits=logits)
    logits = model.chosen if logits is None else logits
    budget.require_less_than(model)
    settings = _settings({**options}, curriculum=curriculum, main=main, main_options=main_options or {}, epochs=epochs)
    _check_loss(settings["main"], settings["main_options"], train_loader, source)
    _check_first(folder, plan_if_any(model, model, {}, every_block=every_block), settings["curriculum"])
    request = {"budget": asdict(budget), "clock": asdict(clock), "criterion": str(criterion), "round_to": round_to}
    request |= {"samples": samples, "every_block": every_block}
    identity = {"request": json.loads(json.dumps(request)), "teacher": digest(source)}
    judge = None if val_loader is None else partial(evaluate, loader=val_loader, task=task, logits=logits)
    made = read_made(folder, identity, model, logits) if resume else None
    if made is None:
        check_free(folder, resume)
        require_trained(source, judge)
        batches = calibration(train_loader if calibration_loader is None else calibration_loader, samples)
        found = _task(task, train_loader, model, logits, settings["main"])
        measure = Measure(batches, judge, clock if latency_ms else None, say, found.task if found.said else None)
        basis = in_both_modes(model, logits, say)
        untrained = make_student(basis, budget, measure, criterion=criterion, round_to=round_to)
        made = write_made(folder, model, untrained, identity, every_block, about or {}, say, logits, found.facts)
    settings |= {"val_loader": val_loader, "task": task, "example_inputs": example, "logits": logits, "resume": resume}
    settings |= {"plan": made.plan, "run_dir": folder, "progress": progress, "about": _about(made, model, about or {})}
    record = distill(model, made.traced, train_loader, **settings | ({} if made.plan else {"curriculum": NO_WARMUP}))
    return _finished(folder, model, made, record, judge, identity, export, about or {}, say, logits)


def _task(
    task: str | Task | None, loader: Iterable[Any], model: TracedModel, logits: str | int | None, main: object
) -> RunTask:
    """What the labels of a run mean."""
    found = task_of_run(task, loader, model.module, model.inputs, logits=logits, required=False)
    return without_labels(found, model, main) if task is None else found


def _settings(options: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Arguments of `distill`: the recipe's, with those that were given in their place."""
    return {
        **RECIPES["compress"].student,
        **options,
        **{name: value for name, value in given.items() if value is not None},
    }


def _about(made: Made, model: TracedModel, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the run records so that its student can be rebuilt."""
    if not made.spec:
        return dict(described)
    size = input_size(model)
    rest = {key: value for key, value in described.items() if key != "data"}
    return about_model(made.spec, str(described.get("data", "")), size, model.example, **rest)


def _check_loss(
    main: str | Callable[..., Tensor], options: Mapping[str, Any], loader: Iterable[Any], model: nn.Module
) -> None:
    """Refuse an unknown loss, and one that is nothing without labels where there are none."""
    asked_of_the_data(main)
    if split(next(iter(loader)), Inputs.of(model), where="The training").labels is None:
        options_without_labels(main, options)


def _check_first(folder: Path, pairs: AlignmentPlan | None, curriculum: Curriculum) -> None:
    """Refuse a folder that cannot be made, and lengths of the warm-up for another number of pairs."""
    try_folder(folder)
    if pairs is not None:
        warmup_plan(pairs, curriculum)


def _finished(
    folder: Path,
    model: TracedModel,
    made: Made,
    record: RunRecord,
    judge: Callable[[nn.Module], Evaluation] | None,
    identity: Mapping[str, Any],
    export: bool,
    about: Mapping[str, Any],
    say: Callable[[str], None],
    logits: str | int | None,
) -> Compressed:
    last = made.steps[-1]
    student = made.student
    metrics = measured(judge(student)) if judge is not None else {}
    steps = (*made.steps, Step("trained", last.macs, last.parameters, latency_ms=last.latency_ms, **metrics))
    say(str(steps[-1]))
    start = next((step for step in made.steps if step.start), None)
    if start is not None and start.better_than(steps[-1]):
        where = f"; the better weights are in {shown(folder / START)}" if made.spec else ""
        say(
            f"Training made the student worse than it was before ({start.name}: {start.shown}){where}. Try a lower --lr, or more --epochs."
        )
    if not made.spec:
        from indistill_fx.deploy.save_pt2 import save_program

        save_program(student, model.example_values, folder / "student.pt2")
        save_tensors(folder / STUDENT, state_tensors(student))
    if export:
        _export(folder, model, student, last, about, say, logits)
    save_made(folder, identity, steps, len(made.steps), made.spec, **made.kept)
    spec = f"{made.spec}@{folder / STUDENT}" if made.spec else ""
    return Compressed(student, made.plan, record, steps, spec)


def _export(
    folder: Path,
    model: TracedModel,
    student: nn.Module,
    last: Step,
    about: Mapping[str, Any],
    say: Callable[[str], None],
    logits: str | int | None,
) -> None:
    """student.onnx, which says of itself what `export` of the run would let it say; and what reports show of it."""
    from indistill_fx.deploy.export_onnx import export_onnx
    from indistill_fx.deploy.metadata import of_source

    given = tuple(model.example_values)
    states = any(is_state(tensor, count_of(given)) for tensor in model.example.tensors)
    example = samples_of(given, slice(1)) if states else one_sample(given)
    known: dict[str, Any] = {"classes": about.get("classes") or (), "normalisation": about.get("normalisation")}
    facts = of_source(model=str(folder), run=run_fingerprint(folder), task=task_in(folder), **known)
    made = export_onnx(
        student, folder / "student.onnx", example, metadata=facts, logits=logits, dynamic_batch=not states
    )
    keep_export(folder, parameters=last.parameters, macs=last.macs, size=made.size, latency_ms=made.latency_ms)
    say(f"{shown(folder / 'student.onnx')} written, {made.size:,} bytes")
