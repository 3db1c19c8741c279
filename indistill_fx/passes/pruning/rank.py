"""Choose the channels a tap keeps: find the filters that make them and let the criterion score them.

Rules, in order:
  1. Criteria that look at data score the tap's own channels.
  2. For the others: from the tap back, by the channel rules, to the first filters on every way: these are its producers.
     One producer: its filters' scores are the channels' scores. Several (residual sums, concatenation): each one's scores are
     brought to mean 1, and a channel gets the mean over the producers that make it.
  3. No producer whose weights are visible: the mean absolute activation on the example inputs; the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.passes.channels.rules import consult
from indistill_fx.passes.channels.selection import Cut, Filters, Index, Propagation
from indistill_fx.passes.pruning.criteria import NAMES, UNITS, Criterion, Scorer, best, on_example, scorer_of, unsound
from indistill_fx.traced import NodeFacts, TracedModel

Links = tuple[Index, Index]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of a tap's channels, and by what they were ranked."""

    scores: Tensor
    by: str


def producers(cut: Cut, facts: Mapping[str, NodeFacts]) -> list[tuple[Filters, Links]]:
    """The filters that make the channels of a selection; with each, which entry of the selection comes from which of its rows."""
    everything = tuple(range(len(cut.index)))
    found: dict[tuple[str, Links], tuple[Filters, Links]] = {}
    pending: list[tuple[Cut, Links]] = [(cut, (everything, everything))]
    seen = set(pending)
    while pending:
        at, links = pending.pop()
        step = consult(at, facts)
        if not isinstance(step, Propagation):
            continue
        if step.filters is not None:
            rows = links[0], tuple(step.filters.rows[k] for k in links[1])
            found[step.filters.node.name, rows] = step.filters, rows
            continue
        for part in step.parts:
            upstream = part.cut, _joined(links, part.links)
            if upstream not in seen:
                seen.add(upstream)
                pending.append(upstream)
    return list(found.values())


def _joined(first: Links, second: Links | None) -> Links:
    """The composition of two links: from the first's entries to the second's."""
    if second is None:
        return first
    onward: dict[int, list[int]] = {}
    for middle, entry in zip(*second, strict=True):
        onward.setdefault(middle, []).append(entry)
    pairs = [(a, c) for a, b in zip(*first, strict=True) for c in onward.get(b, ())]
    return tuple(a for a, _ in pairs), tuple(c for _, c in pairs)


def rank_taps(
    teacher: TracedModel, taps: Iterable[str], criterion: str | Criterion = "l1", loader: Iterable[Any] | None = None
) -> dict[str, Ranking]:
    """Scores for the channels of some taps.

    Raises:
        ConfigError: no criterion of that name, one that ranks a whole network, or one that needs data without a loader.
        PruneError: a tap has no channels, or the weights that make them are not numbers.
    """
    if criterion in UNITS:
        raise ConfigError(
            f"The criterion `{criterion}` is one of `shrink`, which compares the channels of a whole network; a tap's are ranked alone.",
            where="criterion",
            got=criterion,
            hint=f"Give one of {', '.join(name for name in NAMES if name not in UNITS)}.",
        )
    places = {tap: (teacher.node(tap).name, _axis(teacher, tap)) for tap in taps}
    scorer = scorer_of(criterion, teacher, loader, dict(places.values()))
    found = {}
    for tap, (node, axis) in places.items():
        if node in scorer.statistics:
            found[tap] = _sound(tap, Ranking(scorer.statistics[node], f"{scorer.name} at the layer"))
            continue
        all_channels = Cut(teacher.node(tap), axis, axis + 1, tuple(range(teacher.facts_of(tap).channels)))
        visible = [(filters, filters.weight, links) for filters, links in producers(all_channels, teacher.facts)]
        ranked = _by_producers(
            scorer, len(all_channels.index), [(f, w, links) for f, w, links in visible if w is not None]
        )
        if ranked is None:
            scores = on_example(teacher, {node: axis})[node]
            ranked = Ranking(
                scores, "activation on the example inputs, for no filters that make its channels are visible"
            )
        found[tap] = _sound(tap, ranked)
    return found


def _sound(tap: str, ranking: Ranking) -> Ranking:
    """Refuse scores from data if a weight upstream is not a number."""
    if not bool(ranking.scores.isfinite().all()):
        raise unsound(tap)
    return ranking


def _axis(teacher: TracedModel, tap: str) -> int:
    axis = teacher.facts_of(tap).channel_axis
    if axis is None:
        raise PruneError(
            f"`{tap}` holds a tensor of shape {'x'.join(map(str, teacher.facts_of(tap).shape))} without an axis of channels.",
            where=tap,
            hint="Choose another layer; `indistill-fx inspect` shows their shapes.",
        )
    return axis


def _by_producers(scorer: Scorer, channels: int, visible: list[tuple[Filters, Tensor, Links]]) -> Ranking | None:
    """Rule 2."""
    total, times = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    for filters, weight, (places, rows) in visible:
        scores = scorer(filters.node.name, filters.path, weight)
        if len(visible) > 1:
            scores = scores / scores.mean().clamp_min(1e-30)
        at = torch.tensor(places)
        total.index_add_(0, at, scores[torch.tensor(rows)])
        times.index_add_(0, at, torch.ones(len(places), dtype=torch.float64))
    made = times > 0
    if not made.any():
        return None
    mean = total[made] / times[made]
    scores = mean.mean().expand(channels).clone()
    scores[made] = mean
    paths = list(dict.fromkeys(filters.path for filters, _, _ in visible))
    return Ranking(
        scores, f"{scorer.name} of {', '.join(paths[:3])}{f' and {len(paths) - 3} more' if len(paths) > 3 else ''}"
    )


def choose_channels(
    teacher: TracedModel,
    widths: Mapping[str, int],
    *,
    criterion: str | Criterion = "l1",
    loader: Iterable[Any] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The channels each tap keeps: the highest scores, in ascending order, equal scores by the lower index.

    Args:
        teacher: the traced model.
        widths: how many channels each tap keeps.
        criterion: name or function (weights (rows, inputs, *kernel) -> scores).
        loader: batches for the criteria that need data.

    Raises:
        ConfigError: no criterion of that name, or one that needs data without a loader.
        PruneError: a width below one or above the layer's; a layer without channels; weights that are not numbers.

    Source: METHOD step 1 (InDistill, arXiv:2205.10003): the filters with the largest L1 norm, ascending.
    """
    counts = {tap: check_width(teacher, tap, width) for tap, width in widths.items()}
    ranked = rank_taps(teacher, widths, criterion, loader)
    return {tap: best(ranked[tap].scores, count) for tap, count in counts.items()}


def check_width(teacher: TracedModel, tap: str, width: int) -> int:
    """A width that the tap can be narrowed to.

    Raises:
        PruneError: it cannot.
    """
    known = teacher.facts_of(tap)
    if not isinstance(width, int) or isinstance(width, bool):
        raise PruneError(
            f"`{tap}`: {width!r} is not a number of channels.", where=tap, got=width, expected="a whole number"
        )
    if known.channel_axis is None:
        raise PruneError(
            f"`{tap}` has no axis of channels (shape {'x'.join(map(str, known.shape))}).",
            where=tap,
            hint="Choose another layer; `indistill-fx inspect` shows their shapes.",
        )
    if not 1 <= width <= known.channels:
        raise PruneError(
            f"`{tap}`: asked for {width} of its {known.channels} channels.",
            where=tap,
            got=width,
            expected=f"1 to {known.channels}",
            hint=f"Give a width from 1 to {known.channels}.",
        )
    return width
