"""How much each group of channels matters: how far the outputs move if some of its channels are masked.

Measured by running the original with the channels masked wherever they are read, so no network is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import evaluating
from indistill_fx.losses.task import Task
from indistill_fx.passes.pruning.budget import FLOOR
from indistill_fx.passes.pruning.groups import Group
from indistill_fx.passes.pruning.masked import MaskedLogits
from indistill_fx.passes.pruning.shrink import Analysis
from indistill_fx.traced import TracedModel

LEVELS = (0.75, 0.5, 0.25, FLOOR)
"""Shares of a group at which it is measured."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A group's sensitivity.

    Attributes:
        path: the first layer that makes the channels.
        counts: how many of its channels stay, descending; the first is all.
        rises: of the divergence of the outputs at each count, in the unit of `divergence`; the first is 0. Never falls.
    """

    path: str
    counts: tuple[int, ...]
    rises: tuple[float, ...]

    def at(self, count: float) -> float:
        """The rise of the divergence if `count` channels stay; interpolated on the lower convex hull of the measurements."""
        return float(np.interp(count, self.counts[::-1], self.rises[::-1]))


def sensitivities(model: TracedModel, known: Analysis, batches: Iterable[Any], task: Task | None = None) -> list[Curve]:
    """Measure every group that may lose channels.

    Args:
        model: traced; it is not changed.
        known: its analysis; of a group, the channels with the lowest scores are masked first.
        batches: a few, in any form a loader gives; labels are not looked at.
        task: how outputs are compared; see `divergence`.

    Returns:
        One curve for each of `known.classes.groups`.

    Raises:
        ConfigError: no batches, or none that go with the model.
    """
    inputs = [model.inputs_in(batch, where="The sensitivity")[0] for batch in batches]
    if not inputs:
        raise ConfigError(
            "There are no batches to measure sensitivities on.",
            where="loader",
            hint="Give a loader with at least one batch.",
        )
    curves = []
    with evaluating(model.graph_module):
        original_logits = [masked_logits(model, {}, given) for given in inputs]
        for group in known.classes.groups:
            counts, rises = [len(group.classes)], [0.0]
            for level in LEVELS:
                count = max(1, round(level * len(group.classes)))
                if count < counts[-1]:
                    axes = known.axes(without(known, group, count))
                    moved = [
                        divergence(model, original, masked_logits(model, axes, given), task)
                        for original, given in zip(original_logits, inputs, strict=True)
                    ]
                    counts.append(count)
                    rises.append(max(rises[-1], float(np.mean(moved))))
            curves.append(_convex(group.path, counts, rises))
    return curves


def without(known: Analysis, group: Group, count: int) -> Any:
    """All classes but those of a group with the lowest scores, so that `count` of it stay."""
    stay = np.ones(len(known.classes.scores), dtype=bool)
    order = np.argsort(-known.classes.scores[group.classes], kind="stable")
    stay[group.classes[order[count:]]] = False
    return stay


def divergence(model: TracedModel, one: Tensor, other: Tensor, task: Task | None = None) -> float:
    """How far the model's outputs `other` are from `one`.

    By the task: the KL of classes in nats a position, of labels in nats a label, or the mean square of values. Where the task is not
    known, the KL over the channel axis, and the relative square where there is none.
    """
    if task is not None:
        (changed, _), (original, _) = task.prepare(other, None), task.prepare(one, None)
        return float(task.divergence(changed, original, None, 1.0))
    axis = model.facts[model.logits].channel_axis
    if axis is None or one.shape[axis] < 2:
        return float((one - other).square().mean() / one.var().clamp_min(1e-12))
    one, other = one.movedim(axis, -1).log_softmax(-1), other.movedim(axis, -1).log_softmax(-1)
    return float(F.kl_div(other, one, log_target=True, reduction="none").sum(-1).mean())


def masked_logits(
    model: TracedModel, axes: Mapping[tuple[str, int | str], tuple[int, ...]], inputs: Sequence[Any]
) -> Tensor:
    """The main output of a masked run, in single precision."""
    run = MaskedLogits(model, axes)
    run.run(*inputs)
    return run.logits.float()


def _convex(path: str, counts: Sequence[int], rises: Sequence[float]) -> Curve:
    """The lower convex hull, so that an allocation by slopes finds the best."""
    hull: list[tuple[int, float]] = []
    for point in zip(counts, rises, strict=True):
        while len(hull) > 1 and _above(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return Curve(path, tuple(count for count, _ in hull), tuple(rise for _, rise in hull))


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (a[0] - c[0]) >= (c[1] - a[1]) * (a[0] - b[0])
