"""Which task a run has: as named, or by what the student says to the first batch. And the check of its labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from indistill_fx.batch import Parts, split
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.accuracy import deciding_metric
from indistill_fx.evaluation.kept_task import kept_facts
from indistill_fx.evaluation.outputs import outputs_of, select_logits
from indistill_fx.graph.main_output import main_output
from indistill_fx.graph.module_state import evaluating
from indistill_fx.losses.choose_task import choose_task, compared_input, is_one_hot, is_telling, task_of
from indistill_fx.losses.positions import IGNORED, as_classes, counted
from indistill_fx.losses.registry import MAIN_LOSSES
from indistill_fx.losses.task import Classification, Language, MultiLabel, Segmentation, Task
from indistill_fx.runs.record import MetricFacts
from indistill_fx.stages.checks import has_classes_last, label_check, require_classes
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import to_device
from indistill_fx.traced import TracedModel


@dataclass(frozen=True, slots=True)
class RunTask:
    """What the labels of a run mean.

    Attributes:
        task: the task.
        metric: which of its metrics decides what is best; None where nothing can be measured.
        said: how it is known, in a line.
        check: looks at a batch, by its number, and raises if its labels are none of the task's.
        outputs: how many outputs (classes, labels, values) the student has at one position; 0: not known.
        labelled: whether the data have labels.
        facts: the task as run.json keeps it; None where it is not known.
    """

    task: Task
    metric: MetricFacts | None
    said: str
    check: Callable[[int, Any], None]
    outputs: int = 0
    labelled: bool = True
    facts: Mapping[str, Any] | None = None


def task_of_run(
    task: str | Task | None,
    loader: Iterable[Any],
    module: nn.Module,
    *models: Inputs,
    logits: str | int | None = None,
    required: bool = True,
) -> RunTask:
    """What the labels of a run mean.

    Args:
        task: see `losses.choose_task.task_of`; None: inferred from the first batch, if that is unambiguous.
        loader: training batches.
        module: the student, on its device.
        models: what the run's models take, the student last.
        logits: which entry of the student's output the logits are.
        required: whether anything reads the labels by their task; if not, a task that cannot be inferred need not be named.

    Raises:
        ConfigError: an unknown name, or the task must be known and cannot be inferred.
    """
    batch, parts = _telling(loader, models)
    named = task_of(task) if task is not None else None
    spec = task if isinstance(task, str) and ":" in task else ""
    if parts.labels is None or (named is not None and not named.labelled):
        said = f"Task: {named.name}." if named is not None else ""
        labelled = parts.labels is not None
        facts = kept_facts(named, spec) if named is not None else None
        return RunTask(
            named or Classification(), None, said, lambda number, batch: None, labelled=labelled, facts=facts
        )

    def logits_of(batch: Any) -> Tensor | None:
        anchor = next(module.parameters(), None)
        if anchor is not None and type(anchor) not in (Tensor, nn.Parameter):
            return None  # a sharded student needs all processes to run
        device = anchor.device if anchor is not None else torch.device("cpu")
        call = split(to_device(batch, device), *models, where="The training").calls[-1]
        with evaluating(module):
            outputs = outputs_of(module, call)
        alike = [leaf for leaf in tree_leaves(main_output(outputs)) if isinstance(leaf, Tensor)]
        if logits is None and len({leaf.shape for leaf in alike}) == 1:
            return alike[0]  # the same choice as in tracing
        return select_logits(outputs, logits)

    first = compared_input(parts.calls[-1].tensors, parts.labels)
    try:
        outputs = logits_of(batch)
        assert outputs is not None
        labels = parts.labels.to(outputs.device)
        chosen = choose_task(task if isinstance(task, str) else named, outputs, labels, first)
    except ConfigError:
        if required or task is not None:
            raise
        return RunTask(Classification(), None, "", lambda number, batch: None)
    prepared, meant = chosen.prepare(outputs, labels)
    if meant is not None:
        _require_labels(chosen, prepared, meant, loader, models)
    origin = "" if task is not None else ", inferred from the labels of the first batch"
    count = prepared.shape[1] if prepared.ndim > 1 else 1
    check = label_check(chosen, logits_of, *models, inferred=task is None or task == Language.name)
    said, facts = f"Task: {described(chosen)}{origin}.", kept_facts(chosen, spec)
    if task is None and isinstance(chosen, MultiLabel) and _are_one_hot(loader, models):
        said += _ONE_HOT
    return RunTask(chosen, deciding_metric(chosen, count), said, check, count, facts=facts)


def without_labels(found: RunTask, student: TracedModel, main: object) -> RunTask:
    """The task of data without labels that nobody names: that of tokens where the outputs have their classes last.

    Args:
        found: the task otherwise.
        student: whose outputs the main loss compares with the teacher's.
        main: the main loss.

    Raises:
        ConfigError: there are no classes in the second axis, and they are not those of (batch, length, classes) either.
    """
    reads_logits = isinstance(main, str) and main in MAIN_LOSSES and "logits" in MAIN_LOSSES[main].needs
    if found.labelled or not reads_logits:
        return found
    if not has_classes_last(student) or len(student.facts[student.logits].shape) > 3:
        require_classes(student)
        return found
    task = Language(shift=False)
    return replace(
        found, task=task, said=f"Task: {task.name}, because the outputs have their classes in the last axis."
    )


_LOOKED_AT = 20
"""Batches, before labels of which none is usable are refused."""
_ONE_HOT = (
    " Every sample of the first batches has exactly one label: if that is its class, name the task: task='classification' "
    "(--task classification)."
)


def _are_one_hot(loader: Iterable[Any], models: Sequence[Inputs]) -> bool:
    """Whether all labels that are looked at are; samples that may have several labels soon show one that has."""
    found = (split(batch, *models, where="The training").labels for batch in islice(loader, _LOOKED_AT))
    return all(map(is_one_hot, found))


def _telling(loader: Iterable[Any], models: Sequence[Inputs]) -> tuple[Any, Parts]:
    """The first batch with a label that counts, among those that are looked at; else the first."""
    first = None
    for batch in islice(loader, _LOOKED_AT):
        parts = split(batch, *models, where="The training")
        first = first or (batch, parts)
        if is_telling(parts.labels):
            return batch, parts
    return first if first is not None else next(iter(loader))  # an empty loader says so itself


def _require_labels(
    task: Task, outputs: Tensor, labels: Tensor, loader: Iterable[Any], models: Sequence[Inputs]
) -> None:
    """Refuse labels that are all ignored: the loss would always be 0, and the run would learn nothing."""
    if not isinstance(task, Classification) or bool(counted(labels, outputs).any()):
        return
    for batch in islice(loader, _LOOKED_AT):
        found = split(batch, *models, where="The training").labels
        meant = task.prepare(outputs, found.to(outputs.device))[1] if found is not None else None
        if meant is not None and bool((as_classes(meant) != IGNORED).any()):
            return
    void = f"{task.void} or {IGNORED}" if isinstance(task, Segmentation) else str(IGNORED)
    raise ConfigError(
        f"No label is usable: in the first {_LOOKED_AT} batches all are {void}, the label of what is left out.",
        where="labels",
        hint="Give the classes as numbers from 0, and keep that label for samples or pixels to be ignored.",
    )


def described(task: Task) -> str:
    """A task's name, and what of its settings is not the default."""
    settings = {name: value for name, value in vars(task).items() if getattr(type(task), name, None) != value}
    return task.name + "".join(f", {name} {value}" for name, value in settings.items())
