"""Choose the channels a tap keeps: find the filters that make them and let the criterion score them.

Rules, in order:
  1. From the tap back, by the channel rules, to the first filters on every way: these are its producers.
  2. One producer: its filters' scores are the channels' scores. Several (residual sums, concatenation): each one's scores are
     brought to mean 1, and a channel gets the mean over the producers that make it.
  3. No producer whose weights are visible: the mean absolute activation on the example inputs; the report says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from indistill_fx.errors import PruneError
from indistill_fx.passes.channels import consult
from indistill_fx.passes.channels.cut import Cut, Filters, Index, Step
from indistill_fx.passes.criteria import Criterion, best, criterion_of
from indistill_fx.traced import NodeFacts, TracedModel


Links = tuple[Index, Index]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Scores of a tap's channels, and the modules whose filters gave them (none: ranked by activation)."""

    scores: Tensor
    producers: tuple[str, ...]


def producers(cut: Cut, facts: Mapping[str, NodeFacts]) -> list[tuple[Filters, Links]]:
    """The filters that make the channels of a selection; with each, which entry of the selection comes from which of its rows."""
    everything = tuple(range(len(cut.index)))
    found: dict[tuple[str, Links], tuple[Filters, Links]] = {}
    ways: list[tuple[Cut, Links]] = [(cut, (everything, everything))]
    seen = set(ways)
    while ways:
        at, links = ways.pop()
        step = consult(at, facts)
        if not isinstance(step, Step):
            continue
        if step.filters is not None:
            rows = links[0], tuple(step.filters.rows[k] for k in links[1])
            found[step.filters.node.name, rows] = step.filters, rows
            continue
        for part in step.parts:
            way = part.cut, _joined(links, part.links)
            if way not in seen:
                seen.add(way)
                ways.append(way)
    return list(found.values())


def _joined(first: Links, second: Links | None) -> Links:
    """From entries over entries to entries."""
    if second is None:
        return first
    onward: dict[int, list[int]] = {}
    for own, entry in zip(*second, strict=True):
        onward.setdefault(own, []).append(entry)
    pairs = [(a, c) for a, b in zip(*first, strict=True) for c in onward.get(b, ())]
    return tuple(a for a, _ in pairs), tuple(c for _, c in pairs)


def rank(
    teacher: TracedModel, tap: str, criterion: str | Criterion = "l1", loader: Iterable[object] | None = None
) -> Ranking:
    """Scores for the channels of a tap.

    Raises:
        PruneError: the tap has no channels, or the weights that make them are not numbers.
    """
    node, known = teacher.node(tap), teacher.facts_of(tap)
    if known.channel_axis is None:
        raise PruneError(
            f"`{tap}` holds a tensor of shape {'x'.join(map(str, known.shape))} without an axis of channels.",
            where=tap,
            hint="Tap another layer.",
        )
    whole = Cut(node, known.channel_axis, known.channel_axis + 1, tuple(range(known.channels)))
    visible = [(filters, links) for filters, links in producers(whole, teacher.facts) if filters.weight is not None]
    if not visible:
        return Ranking(activation(teacher, tap), ())
    score = criterion_of(criterion)
    total, times = torch.zeros(known.channels, dtype=torch.float64), torch.zeros(known.channels, dtype=torch.float64)
    for filters, (places, rows) in visible:
        if filters.weight is None:
            continue
        scores = score(filters.weight).to(torch.float64).cpu()
        if not scores.isfinite().all():
            raise PruneError(
                f"`{filters.path}` has weights that are not numbers, so its channels cannot be ranked.",
                where=filters.path,
                hint="Load sound weights.",
            )
        if len(visible) > 1:
            scores = scores / scores.mean().clamp_min(1e-30)
        where = torch.tensor(places)
        total.index_add_(0, where, scores[torch.tensor(rows)])
        times.index_add_(0, where, torch.ones(len(places), dtype=torch.float64))
    made = times > 0
    mean = total[made].div(times[made]) if len(visible) > 1 else total[made]
    scores = mean.mean().expand(known.channels).clone()
    scores[made] = mean
    return Ranking(scores, tuple(dict.fromkeys(filters.path for filters, _ in visible)))


def activation(teacher: TracedModel, tap: str) -> Tensor:
    """Mean absolute value of each channel on the example inputs."""
    node, axis = teacher.node(tap).name, teacher.facts_of(tap).channel_axis

    class Run(torch.fx.Interpreter):
        value: Tensor

        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            if n.name == node and isinstance(result, Tensor):
                self.value = result
            return result

    run = Run(teacher.graph_module)
    with torch.no_grad():
        run.run(*teacher.example_inputs, *teacher.example_kwargs.values())
    value = run.value.double().abs()
    return value.mean([k for k in range(value.dim()) if k != axis])


def choose_channels(
    teacher: TracedModel,
    widths: Mapping[str, int],
    *,
    criterion: str | Criterion = "l1",
    loader: Iterable[object] | None = None,
) -> dict[str, tuple[int, ...]]:
    """The channels each tap keeps: the highest scores, in ascending order, equal scores by the lower index.

    Args:
        teacher: the traced model.
        widths: how many channels each tap keeps.
        criterion: name or function (weights (rows, inputs, *kernel) -> scores).
        loader: batches for the criteria that look at data.

    Raises:
        PruneError: a width below one or above the layer's; a layer without channels; weights that are not numbers.

    Source: METHOD step 1 (InDistill, arXiv:2205.10003): the filters with the largest L1 norm, ascending.
    """
    return {
        tap: best(rank(teacher, tap, criterion, loader).scores, check_width(teacher, tap, width))
        for tap, width in widths.items()
    }


def check_width(teacher: TracedModel, tap: str, width: int) -> int:
    """A width that the tap can be narrowed to.

    Raises:
        PruneError: it cannot.
    """
    known = teacher.facts_of(tap)
    if known.channel_axis is None:
        raise PruneError(
            f"`{tap}` has no axis of channels (shape {'x'.join(map(str, known.shape))}).",
            where=tap,
            hint="Tap another layer.",
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
