"""Widths under a budget: take channels where they are worth least for what they cost.

Rules, in order:
  1. A step takes a sixteenth of a group (or a multiple of `round_to` channels), the lowest scores first; a part of it, `floor`, stays.
  2. The next step is the one whose rise of the divergence, by its group's curve, is smallest for the cost it saves.
  3. Steps are taken until the network is within the budget; the last one is then made as small as still fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import numpy as np

from indistill_fx.compression.sensitivity import Curve
from indistill_fx.errors import PruneError
from indistill_fx.passes.pruning.budget import FLOOR, rounded
from indistill_fx.passes.pruning.groups import Classes, Group, Mask
from indistill_fx.passes.pruning.shrink import Analysis

_STEPS = 16


def allocate(
    known: Analysis,
    curves: Sequence[Curve],
    cost: Callable[[Mask], float],
    most: float,
    *,
    floor: float = FLOOR,
    round_to: int | None = None,
) -> Mask:
    """The classes that stay.

    Args:
        known: the network's analysis.
        curves: of its groups.
        cost: of a network with these classes, such as `known.cost.macs`.
        most: it may cost.
        floor: part of every group that stays in any case.
        round_to: channels of every group are a multiple of this.

    Raises:
        PruneError: even the smallest network costs more; says how much, and what is frozen and why.
    """
    groups, classes = known.classes.groups, known.classes
    least = [rounded(max(1, ceil(floor * len(group.classes))), group, round_to) for group in groups]
    counts = [len(group.classes) for group in groups]
    ranks = [np.argsort(-classes.scores[group.classes], kind="stable") for group in groups]

    def stay_of(numbers: Sequence[int]) -> Mask:
        stay = np.ones(len(classes.scores), dtype=bool)
        for group, order, count in zip(groups, ranks, numbers, strict=True):
            stay[group.classes[order[count:]]] = False
        return stay

    smallest = cost(stay_of(least))
    if smallest > most:
        raise _too_small(smallest, most, classes)
    now, k, before = cost(stay_of(counts)), 0, 0
    while now > most:
        best: tuple[float, int, int, float] | None = None
        for k, (group, curve) in enumerate(zip(groups, curves, strict=True)):
            fewer = max(least[k], rounded(counts[k] - max(1, len(group.classes) // _STEPS), group, round_to))
            if fewer >= counts[k]:
                fewer = _next_multiple(group, counts[k], round_to)
            if fewer < least[k]:
                continue
            after = cost(stay_of([*counts[:k], fewer, *counts[k + 1 :]]))
            if after >= now:
                continue
            rise_per_cost = (curve.at(fewer) - curve.at(counts[k])) / (now - after)
            if best is None or rise_per_cost < best[0]:
                best = rise_per_cost, k, fewer, after
        if best is None:
            raise _too_small(now, most, classes)
        _, k, fewer, now = best
        before, counts[k] = counts[k], fewer
    while round_to is None and counts and counts[k] + 1 < before:
        more = [*counts[:k], counts[k] + 1, *counts[k + 1 :]]
        if cost(stay_of(more)) > most:
            break
        counts = more
    return stay_of(counts)


def _next_multiple(group: Group, count: int, round_to: int | None) -> int:
    """The next smaller number of classes whose number of channels is a multiple of `round_to`."""
    step = rounded(1, group, round_to)
    return (count - 1) // step * step


def _too_small(smallest: float, most: float, classes: Classes) -> PruneError:
    reasons = list(dict.fromkeys(classes.reasons.values()))[:3]
    frozen = f" Some layers cannot lose channels: {'; '.join(reasons)}." if reasons else ""
    if not classes.groups:
        return PruneError(
            f"No channel of this network can be removed.{frozen}", where="budget", hint="Prune another model."
        )
    return PruneError(
        f"The network cannot be made smaller than {smallest:,.0f}, but {most:,.0f} was requested: every layer keeps at least "
        f"{FLOOR:.0%} of its channels, and outputs keep all of theirs.{frozen}",
        where="budget",
        got=most,
        expected=smallest,
        hint="Give a larger budget.",
    )
