"""Teacher → assistant → student: distil along a chain, each step a run of its own; an assistant made from the teacher."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.losses.registry import at_the_end
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.runs.record import RunRecord
from indistill_fx.system.files import whole
from indistill_fx.traced import TracedModel
from indistill_fx.training.distill import distill
from indistill_fx.training.recipes import NO_WARMUP


def distill_chain(
    models: Sequence[nn.Module | TracedModel],
    train_loader: Iterable[Any],
    *,
    steps: Sequence[Mapping[str, Any]] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[RunRecord]:
    """Distil every model into the next: a teacher into an assistant, the assistant into a student.

    Args:
        models: the teacher, then one or more assistants, then the student. All but the first are trained in place.
        train_loader: batches, as for `distill`.
        steps: for each step, arguments of `distill` that differ from `options`. The paper's own way, with one assistant, is
            `[{"main": "pkt", "curriculum": Curriculum(lengths=[])}, {}]`: the assistant learns without a warm-up.
        run_dir: step k has its folder `step-k` in it, counted from 1; None: nothing is written.
        options: arguments of `distill`. With `resume=True`, finished steps are read back and the first unfinished one continues.

    Returns:
        One record per step.

    Raises:
        ConfigError: there are fewer than two models, or the number of steps is wrong; otherwise as `distill`.

    Source: Sarridis et al., "InDistill", arXiv:2205.10003: the auxiliary teacher.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32)
        >>> models = [DigitsTeacher(), DigitsStudent(widths=(8, 16, 32)), DigitsStudent()]
        >>> records = ifx.distill_chain(models, data.train, epochs=1, curriculum=ifx.Curriculum(lengths=[]), progress=False)
        >>> [record.steps for record in records]
        [2, 2]
    """
    pairs = list(pairwise(models))
    steps = [{}] * len(pairs) if steps is None else steps
    if not pairs or len(steps) != len(pairs):
        raise ConfigError(
            f"A chain of {len(models)} models has {len(pairs)} steps, but options are given for {len(steps)}.",
            where="chain",
            hint="Give the teacher, any assistants, and the student; and options for each step, or none.",
        )
    home = whole(run_dir)
    return [
        distill(
            teacher,
            student,
            train_loader,
            run_dir=home / f"step-{number}" if home is not None else None,
            **{**options, **step_options},
        )
        for number, ((teacher, student), step_options) in enumerate(zip(pairs, steps, strict=True), start=1)
    ]


INT8 = "int8"
"""Directory of the quantisation-aware run in the one it follows."""
_OF_THE_RUN_BEFORE = ("main_steps", "milestones", "gamma", "rise_steps")
"""Options that go with the length and the schedule of the run that trained the student; this one has its own."""


def distill_for_int8(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    train_loader: Iterable[Any],
    *,
    epochs: int,
    run_dir: str | os.PathLike[str],
    **options: Any,
) -> RunRecord:
    """Quantisation-aware distillation: train a trained student on, by the teacher's outputs, as its int8 file will compute.

    Args:
        teacher: see `distill`.
        student: with its trained weights; it is trained in place. Its batch norms keep their statistics, as they have them in the file.
        train_loader: see `distill`.
        epochs: how long.
        run_dir: of the run that trained the student; this one's directory is `int8` in it, and exports like any other.
        options: see `distill`; there is no warm-up, and the learning rate falls to 0 (cosine). Those on the length and the schedule of
            the run that trained the student (`main_steps`, `milestones`, `gamma`, `rise_steps`) are ignored, and weights of the main
            loss that change over the steps stay at their last values.

    Returns:
        The record.

    Raises:
        ConfigError: see `distill`.
    """
    options = {name: value for name, value in options.items() if name not in _OF_THE_RUN_BEFORE}
    options |= {"curriculum": NO_WARMUP, "int8": True, "run_dir": Path(run_dir) / INT8, "schedule": "cosine"}
    options["main_options"] = at_the_end(options.get("main_options") or {})
    module = student.module if isinstance(student, TracedModel) else student
    flags = [(part, part.training) for part in module.modules()]
    if not module.training:
        module.train()
    for part in module.modules():
        part.training = part.training and not isinstance(part, nn.modules.batchnorm._BatchNorm)
    try:
        return distill(teacher, student, train_loader, epochs=epochs, **options)
    finally:
        for part, flag in flags:
            part.training = flag


def shrunk_assistant(
    teacher: nn.Module, student: nn.Module, example_inputs: Any, *, logits: str | int | None = None
) -> tuple[nn.Module, str]:
    """A smaller teacher, for a student much smaller than the teacher: the least important channels removed everywhere.

    Its work is the geometric mean of the teacher's and the student's, so that both steps of the chain are equally wide.
    It keeps the teacher's weights, and the same models give the same assistant.

    Args:
        teacher: it is not changed.
        student: asked for its work only.
        example_inputs: to trace both with.
        logits: key or place of the logits in the teacher's output, if it has several entries.

    Returns:
        The assistant, and a line that describes it.

    Raises:
        ConfigError: the student needs no less work than the teacher.
        PruneError: the teacher cannot be made that small.
    """
    large = trace(teacher, example_inputs, role="teacher", logits=logits)
    small = trace(student, example_inputs, role="student")
    if small.macs >= large.macs:
        raise ConfigError(
            f"The student's work ({small.macs:,} MACs) is not less than the teacher's ({large.macs:,}).",
            where="assistant",
            got=small.macs,
            expected=f"less than {large.macs:,}",
            hint="Distil without an assistant.",
        )
    result = shrink(large, macs=float(round((large.macs * small.macs) ** 0.5)))
    before, after = result.report.macs
    parameters = result.report.parameters
    report_text = (
        f"the teacher with {after:,} of {before:,} MACs and {parameters[1]:,} of {parameters[0]:,} parameters"
        f" (the student has {small.macs:,} MACs)"
    )
    assistant = result.value.graph_module
    for parameter in assistant.parameters():
        parameter.requires_grad_(True)
    return assistant, report_text
