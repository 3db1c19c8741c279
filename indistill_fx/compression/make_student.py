"""From a teacher to a student that has not been trained yet: widths, shrinking, repair; each step reports its cost and gain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from indistill_fx.compression.allocate import Budget, allocate
from indistill_fx.compression.basis import train_as
from indistill_fx.compression.latency import Clock, bisect
from indistill_fx.compression.repair import Repaired, repair
from indistill_fx.compression.sensitivity import Curve, divergence, sensitivities
from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.evaluation.accuracy import Evaluation
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.graph.module_state import evaluating
from indistill_fx.losses.task import Task
from indistill_fx.passes.contract import PassResult
from indistill_fx.passes.pruning.budget import FLOOR
from indistill_fx.passes.pruning.criteria import Criterion
from indistill_fx.passes.pruning.groups import Mask
from indistill_fx.passes.pruning.shrink import Analysis, ShrinkReport, analyse, keep_classes
from indistill_fx.system.nested import map_tensors, samples_of, tensors_of
from indistill_fx.traced import TracedModel

_FLOORS = (FLOOR, 0.3, 0.5)
"""Parts of every group of channels that always stay, tried one after the other."""
_FOR_CURVES = 4
"""Batches that sensitivities are measured on; repairs take all of them."""


@dataclass(frozen=True, slots=True)
class Step:
    """The student's state after a step.

    Attributes:
        name: of the step.
        macs: multiply-accumulates of one sample.
        parameters: their number.
        divergence: of the outputs from the teacher's, as the task compares them, on the calibration batches; None where it is not measured.
        accuracy: on the validation data; None where there are none, or the task has none.
        latency_ms: on the clock's target; None where it is not measured.
        metric: which of the task's metrics decides what is best.
        shown: its value, formatted; empty where it was not measured.
        value: the same as a number.
        higher_is_better: which way that metric is better.
        start: whether the student that is trained is the one of this step.
    """

    name: str
    macs: int
    parameters: int
    divergence: float | None = None
    accuracy: float | None = None
    latency_ms: float | None = None
    metric: str = "accuracy"
    shown: str = ""
    value: float | None = None
    higher_is_better: bool = True
    start: bool = False

    def better_than(self, other: Step) -> bool:
        """Whether the deciding metric is better than after another step; False where one of them was not measured."""
        if self.value is None or other.value is None:
            return False
        return self.value > other.value if self.higher_is_better else self.value < other.value

    def __str__(self) -> str:
        parts = [f"{self.macs:,} MACs, {self.parameters:,} parameters"]
        parts += [f"{self.metric} {self.shown}"] if self.shown else []
        parts += [f"divergence {self.divergence:.3g}"] if self.divergence is not None else []
        parts += [f"{self.latency_ms:.3g} ms"] if self.latency_ms is not None else []
        return f"{self.name}: {', '.join(parts)}"


def measured(found: Evaluation) -> dict[str, Any]:
    """An evaluation as a step reports it."""
    facts, value = found.metric, found.value
    measures = {
        "metric": facts.title,
        "shown": facts.text(value),
        "value": value,
        "higher_is_better": facts.higher_is_better,
    }
    return {"accuracy": found.accuracy, **measures}


def require_trained(teacher: nn.Module, judge: Callable[[nn.Module], Evaluation] | None) -> None:
    """Refuse a classifier that only guesses."""
    found = judge(teacher) if judge is not None else None
    if found is not None and found.no_better_than_chance:
        average = f", and {found.recall:.1%} of a class's on average" if found.recall is not None else ""
        raise ConfigError(
            f"The teacher classifies no better than chance: {found.accuracy:.1%} of {found.count} samples are right{average}, "
            f"with {found.guesses} classes.",
            where="teacher",
            got=found.accuracy,
            hint="Load its trained weights (MODEL@weights.safetensors), and check that data and model have the same classes.",
        )


@dataclass(frozen=True)
class Untrained:
    """A student that has not been trained.

    Attributes:
        model: its graph.
        shrunk: what went.
        curves: sensitivities by which the widths were chosen.
        repaired: what was repaired.
        steps: teacher, shrunk, each repair.
    """

    model: TracedModel
    shrunk: ShrinkReport
    curves: Sequence[Curve]
    repaired: Repaired | None
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Measure:
    """How a step is measured: on these calibration batches, on the validation data, on this clock; and by which task."""

    batches: Sequence[Any]
    evaluate: Callable[[nn.Module], Evaluation] | None = None
    clock: Clock | None = None
    say: Callable[[str], None] = field(default=lambda text: None)
    task: Task | None = None

    def step(self, name: str, teacher: TracedModel, model: TracedModel, latency_ms: float | None = None) -> Step:
        """Measure a step, and report it."""
        graph = model.graph_module
        parameters = sum(parameter.numel() for parameter in graph.parameters())
        divergence = self.divergence(teacher, model) if model is not teacher else None
        metrics = measured(self.evaluate(graph)) if self.evaluate is not None else {}
        found = Step(name, model.macs, parameters, divergence, latency_ms=latency_ms, **metrics)
        self.say(str(found))
        return found

    def divergence(self, teacher: TracedModel, model: TracedModel) -> float:
        """How far the model's outputs are from the teacher's, the mean over the calibration batches."""
        moved = []
        with evaluating(teacher.graph_module), evaluating(model.graph_module):
            for batch in self.batches:
                inputs, _ = teacher.inputs_in(batch, where="The calibration")
                outputs = [run_keeping(m.graph_module, [m.logits], *inputs)[1][m.logits] for m in (teacher, model)]
                moved.append(divergence(teacher, outputs[0].float(), outputs[1].float(), self.task))
        return float(np.mean(moved))


def make_student(
    teacher: TracedModel,
    budget: Budget,
    measure: Measure,
    *,
    criterion: str | Criterion = "l1",
    round_to: int | None = None,
) -> Untrained:
    """Choose widths, shrink, repair.

    Args:
        teacher: traced; it is not changed.
        budget: how small.
        measure: calibration batches, and how steps are reported.
        criterion: which channels of a group go first.
        round_to: keep multiples of so many channels.

    Raises:
        ConfigError: the budget or the data are at fault, or the teacher is quick enough as it is.
        PruneError: the budget cannot be met, or nothing can go.
    """
    clock = measure.clock if budget.latency_ms is not None else None
    before = clock.ms(teacher.graph_module, teacher.example_values) if clock is not None else None
    if before is not None:
        budget.require_smaller(before)
    steps = [measure.step("teacher", teacher, teacher, before)]
    known = analyse(teacher, criterion=criterion, loader=measure.batches if criterion != "l1" else None)
    count = len(known.classes.groups)
    groups = "the one group" if count == 1 else f"each of {count} groups"
    measure.say(f"measuring how much the outputs depend on {groups} of channels")
    curves = sensitivities(teacher, known, measure.batches[:_FOR_CURVES], measure.task)
    result, after = _best_widths(
        teacher, measure, lambda floor: _shrunk(teacher, known, curves, budget, measure, round_to, floor)
    )
    steps.append(measure.step("shrunk", teacher, result.value, after))
    best, repaired, start = result.value, None, 1
    for name, parts_left_out in (("norms estimated anew", {"readers": False}), ("readers fitted", {"norms": False})):
        made = repair(teacher, result.value, result.report.axes, measure.batches, **parts_left_out)
        if not (made.report.norms or made.report.readers):
            continue
        steps.append(measure.step(name, teacher, made.value, after))
        known_best = steps[-1].divergence or 0.0
        if known_best < min(step.divergence or 0.0 for step in steps[1:-1]):
            best, repaired, start = made.value, made.report, len(steps) - 1
    steps[start] = replace(steps[start], start=True)
    train_as(teacher, best)
    return Untrained(best, result.report, curves, repaired, tuple(steps))


Shrunk = tuple[PassResult[TracedModel, ShrinkReport], float | None]
"""A smaller network, and its time where that is the budget."""


def _best_widths(teacher: TracedModel, measure: Measure, shrunk: Callable[[float], Shrunk]) -> Shrunk:
    """Of several allocations, the one that is closest to the teacher on held-out batches after its repair.

    A sensitivity is measured for one group at a time and before any repair, so by itself it may empty a layer whose loss shows only
    together with others'. Allocations that leave every group a larger part are tried beside it.
    """
    held = max(1, len(measure.batches) // 4)
    fit = measure.batches[:-held] or measure.batches
    found: dict[float, tuple[float, Shrunk]] = {}
    for floor in _FLOORS:
        try:
            made = shrunk(floor)
        except PruneError:
            if not found:
                raise
            break
        repaired = repair(teacher, made[0].value, made[0].report.axes, fit, norms=False).value
        found[floor] = replace(measure, batches=measure.batches[-held:]).divergence(teacher, repaired), made
    best = min(found, key=lambda floor: found[floor][0])
    tried = ", ".join(f"{value:.3g} with {floor:.0%}" for floor, (value, _) in found.items())
    measure.say(
        f"widths: at least {best:.0%} of every group stays (divergence after repair, held-out batches: {tried})"
    )
    return found[best][1]


def _shrunk(
    teacher: TracedModel,
    known: Analysis,
    curves: Sequence[Curve],
    budget: Budget,
    measure: Measure,
    round_to: int | None,
    floor: float,
) -> Shrunk:
    """The network within the budget that keeps at least the share `floor` of every group."""
    all_channels = np.ones(len(known.classes.scores), dtype=bool)
    clock = measure.clock
    if clock is None or budget.latency_ms is None:
        cost, limit, text = _cost(teacher, known, budget, all_channels)
        stay = allocate(known, curves, cost, limit, floor=floor, round_to=round_to, text=text, hint=budget.hint)
        return keep_classes(teacher, known, stay), None
    macs = known.cost.macs(all_channels)
    made: dict[float, tuple[PassResult[TracedModel, ShrinkReport], float]] = {}

    def time_of(share: float) -> float:
        limit = share * macs
        stay = (
            all_channels
            if share >= 1
            else allocate(known, curves, known.cost.macs, limit, floor=floor, round_to=round_to)
        )
        result = keep_classes(teacher, known, stay)
        made[share] = result, clock.ms(result.value.graph_module, teacher.example_values)
        measure.say(f"timed: {made[share][1]:.3g} ms with {share:.0%} of the multiply-accumulates")
        return made[share][1]

    share = bisect(time_of, budget.latency_ms, smallest=_smallest(known, curves, round_to, floor) / macs * 1.001)
    return made[share]


def _smallest(known: Analysis, curves: Sequence[Curve], round_to: int | None, floor: float) -> float:
    """Multiply-accumulates of the smallest possible network."""
    try:
        allocate(known, curves, known.cost.macs, 0, floor=floor, round_to=round_to)
    except PruneError as error:
        if isinstance(error.expected, (int, float)):
            return float(error.expected)
        raise
    return 0.0


def _cost(
    teacher: TracedModel, known: Analysis, budget: Budget, all_channels: Mask
) -> tuple[Callable[[Mask], float], float, Callable[[float], str]]:
    """What is counted of a network with these channels, how much of it there may be, and how such a number is written."""
    if budget.macs is not None:
        limit = budget.macs * known.cost.macs(all_channels) if budget.macs <= 1 else budget.macs
        return known.cost.macs, limit, budget.text
    if budget.params is not None:
        limit = budget.params * known.cost.params(all_channels) if budget.params <= 1 else budget.params
        return known.cost.params, limit, budget.text
    tensors: Mapping[int, torch.Tensor] = {id(t): t for t in teacher.graph_module.parameters()}
    each = max((t.element_size() for t in tensors.values()), default=4)
    rest = sum(t.numel() * t.element_size() for t in teacher.graph_module.buffers())
    limit = ((budget.size_mb or 0) * 1e6 - rest) / each
    return known.cost.params, limit, lambda count: budget.text((count * each + rest) / 1e6)


def calibration(loader: Iterable[Any], samples: int) -> list[Any]:
    """Copies of the first batches of a loader, up to so many samples: a loader may fill the same tensors again."""
    found: list[Any] = []
    count = 0
    for batch in loader:
        size = next((len(value) for value in tensors_of(batch) if value.ndim), 0)
        part = samples_of(batch, slice(0, samples - count)) if count + size > samples else batch
        found.append(map_tensors(part, torch.clone))
        count += size
        if count >= samples:
            break
    return found
