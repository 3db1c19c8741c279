"""Widths under a budget: take channels where they are worth least for what they cost.

Rules, in order:
  1. A step takes a sixteenth of a group (or a multiple of `round_to` channels), the lowest scores first; a part of it, `floor`, stays.
  2. The next step is the one whose rise of the divergence, by its group's curve, is smallest for the cost it saves.
  3. Steps are taken until the network is within the budget; the last one is then made as small as still fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import ceil

import numpy as np

from indistill_fx.compression.sensitivity import Curve
from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.passes.pruning.budget import FLOOR, nothing_free, rounded, why_frozen
from indistill_fx.passes.pruning.groups import Group, Mask
from indistill_fx.passes.pruning.shrink import Analysis
from indistill_fx.traced import TracedModel

_STEPS = 16
_UNITS = {"macs": "multiply-accumulates", "params": "parameters", "size_mb": "MB of weights", "latency_ms": "ms"}
_SHARES = ("macs", "params")
"""Budgets that may be a share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How small the student must be; exactly one is given.

    Attributes:
        macs: a part up to 1, or multiply-accumulates of one sample.
        params: a part up to 1, or a number of parameters.
        size_mb: of the parameters' and buffers' bytes, in 10^6.
        latency_ms: of one call on the clock's target.
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"Exactly one budget is needed, but {len(given)} are given{': ' + ', '.join(given) if given else ''}.",
                where="budget",
                hint="Give one of macs, params, size_mb and latency_ms (--macs, --params, --size-mb, --latency-ms).",
            )
        if not all(value > 0 and np.isfinite(value) for value in given.values()):
            raise ConfigError(
                f"A budget must be a number above 0, but got {given}.",
                where="budget",
                got=given,
                hint="Give a share such as 0.5, or a number.",
            )

    @property
    def value(self) -> tuple[str, float]:
        """Which budget is given, and how large it is."""
        return next((name, value) for name, value in asdict(self).items() if value is not None)

    @property
    def hint(self) -> str:
        """What to do if it cannot be met."""
        name, value = self.value
        percent = name in _SHARES and 1 < value <= 100
        return (
            f"A number above 1 is not a share: for {value:g}% write {value / 100:g}."
            if percent
            else "Give a larger budget."
        )

    def text(self, amount: float) -> str:
        """An amount of what is counted, with its unit."""
        name = self.value[0]
        return f"{amount:,.0f} {_UNITS[name]}" if name in _SHARES else f"{amount:.3g} {_UNITS[name]}"

    def require_smaller(self, has: float) -> None:
        """Refuse a budget that a network with so much of what is counted already fits.

        Raises:
            ConfigError: it does, so nothing would be removed.
        """
        name, value = self.value
        share = name in _SHARES and value <= 1
        if has > (value * has if share else value):
            return
        raise ConfigError(
            f"The network fits the budget of {self.text(value * has if share else value)} as it is: it "
            f"{'takes' if name == 'latency_ms' else 'has'} {self.text(has)}.",
            where="budget",
            got=value,
            expected=f"less than {self.text(has)}",
            hint=f"Give less{'; for half of them write 0.5' if name in _SHARES else ''}.",
        )

    def require_less_than(self, network: TracedModel) -> None:
        """The same for a network whose size is counted; a time has to be measured first."""
        tensors = (*network.graph_module.parameters(), *network.graph_module.buffers())
        sizes = {
            "macs": network.macs,
            "params": sum(parameter.numel() for parameter in network.graph_module.parameters()),
            "size_mb": sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        }
        if (has := sizes.get(self.value[0])) is not None:
            self.require_smaller(has)


def allocate(
    known: Analysis,
    curves: Sequence[Curve],
    cost: Callable[[Mask], float],
    most: float,
    *,
    floor: float = FLOOR,
    round_to: int | None = None,
    text: Callable[[float], str] = "{:,.0f}".format,
    hint: str = "Give a larger budget.",
) -> Mask:
    """The classes that stay.

    Args:
        known: the network's analysis.
        curves: of its groups.
        cost: of a network with these classes, such as `known.cost.macs`.
        most: it may cost.
        floor: part of every group that stays in any case.
        round_to: channels of every group are a multiple of this.
        text: how a cost is written in an error.
        hint: what to do if the budget cannot be met.

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
        raise _too_small(smallest, most, known, text, hint)
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
            raise _too_small(now, most, known, text, hint)
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


def _too_small(smallest: float, most: float, known: Analysis, text: Callable[[float], str], hint: str) -> PruneError:
    classes = known.classes
    if not classes.groups:
        return nothing_free(known.found, classes)
    return PruneError(
        f"The network cannot be made smaller than {text(smallest)}, but the budget is {text(most)}: every layer keeps at least "
        f"{FLOOR:.0%} of its channels, and outputs keep all of theirs.{why_frozen(known.found, classes)}",
        where="budget",
        got=most,
        expected=smallest,
        hint=hint,
    )
