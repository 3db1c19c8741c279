"""Remove channels from the whole network: a smaller one that stands alone and can be trained.

Rules, in order:
  1. Channels that must go together are found over the whole graph (`couple`); what no rule covers is frozen, and reported.
  2. Which go: by `widths`, `ratio`, or a budget of `macs` or `params` (`budget`).
  3. Weights of makers and readers are sliced, and the arguments that name sizes rewritten (`rewrite`).
  4. The smaller network is run beside the original whose readers ignore the removed channels, and compared (`verified`).

Keeps: the smaller network computes what the original computes when every reader ignores the channels removed (norms over channels and
means are those of the channels that stay). Outputs keep their width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from indistill_fx.errors import ConfigError, PruneError
from indistill_fx.passes.contract import PassResult
from indistill_fx.passes.pruning.budget import by_budget, by_ratio, by_widths, even_out
from indistill_fx.passes.pruning.criteria import Criterion, Scorer, scorer_of
from indistill_fx.passes.pruning.dependencies import Coupling
from indistill_fx.passes.pruning.find_dependencies import couple
from indistill_fx.passes.pruning.groups import Classes, Cost, Mask, classify, refill
from indistill_fx.passes.pruning.rank import check_width
from indistill_fx.passes.pruning.rewriting import Rewriting
from indistill_fx.passes.pruning.slice_network import new_facts, rewrite
from indistill_fx.passes.pruning.verified import verify_smaller
from indistill_fx.traced import TracedModel


@dataclass(frozen=True, slots=True)
class ShrunkLayer:
    """A layer that makes channels: those that stay, how many there were, how many go at a time, and by what they were scored."""

    path: str
    kept: tuple[int, ...]
    of: int
    each: int
    by: str


@dataclass(frozen=True, slots=True)
class Frozen:
    """Channels that no request could remove: how many, and why."""

    channels: int
    reason: str


@dataclass(frozen=True, slots=True, repr=False)
class ShrinkReport:
    """What shrinking did.

    Attributes:
        layers: layers that make channels, in the order of the graph; of those with nothing removed, all channels are kept.
        axes: the remaining entries, per node and axis that lost some; `heads` of an attention layer.
        frozen: channels that could not be removed.
        approximate: operations over channels (means, norms) that lost some of them: over the remaining channels they compute
            something else than before. Each as `layer4:mean (mean)`.
        macs: of one sample, before and after.
        parameters: before and after.
    """

    layers: tuple[ShrunkLayer, ...]
    axes: Mapping[tuple[str, int | str], tuple[int, ...]]
    frozen: tuple[Frozen, ...]
    approximate: tuple[str, ...]
    macs: tuple[int, int]
    parameters: tuple[int, int]

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """Layer -> channels before and after."""
        return {layer.path: (layer.of, len(layer.kept)) for layer in self.layers}

    def __repr__(self) -> str:
        """In one line: the lists of channels fill pages."""
        macs, parameters = ("{:,} → {:,}".format(*both) for both in (self.macs, self.parameters))
        less = sum(len(layer.kept) < layer.of for layer in self.layers)
        return f"ShrinkReport(multiply-accumulates {macs}; parameters {parameters}; {less} of {len(self.layers)} layers narrower)"


def shrink(
    model: TracedModel,
    *,
    widths: Mapping[str, int] | None = None,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    criterion: str | Criterion = "l1",
    round_to: int | None = None,
    loader: Iterable[object] | None = None,
) -> PassResult[TracedModel, ShrinkReport]:
    """Make a smaller network by removing channels everywhere, including from the layers that read them.

    Args:
        model: the traced model; it is not changed.
        widths: tap → number of channels; the other layers keep theirs unless `ratio` or a budget is given too.
        ratio: share of every layer's channels to keep, between 0 and 1.
        macs: budget of work: a share up to 1, or a number of multiply-accumulates of one sample.
        params: budget of parameters: a share up to 1, or a number.
        criterion: which channels to keep: a name (`l1`, `l2`, `geometric_median`, `bn_scale`, `random`, `activation`, `taylor`, `fisher`,
            `isomorphic`), or a function of weights
            (rows, inputs, *kernel) that returns a score per row.
        round_to: keep a multiple of this number of channels (8 for fast kernels), rounding up.
        loader: batches for the criteria that need data.

    Returns:
        The smaller model; its `graph_module` owns its parameters and can be trained, saved and exported.

    Raises:
        ConfigError: no size is given, or a number is out of range.
        PruneError: widths or a budget cannot be met; the message says what blocks them. Where no channel can go, a ratio changes nothing,
            and `report.frozen` says why.
        PassError: the smaller network does not compute what the original does without the channels. This is a bug; please report it.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> x = torch.randn(2, 1, 8, 8)
        >>> small = ifx.shrink(ifx.trace(DigitsTeacher(), x), ratio=0.5)
        >>> small.report.widths["layer1.0.conv1"]
        (32, 16)
        >>> small.value.graph_module(x).shape
        torch.Size([2, 10])
    """
    _check_requests(widths, ratio, macs, params, round_to)
    if model.report.lacks_eval_mode:
        raise PruneError(
            "In eval mode the smaller network would compute what this student computes in train mode: the two could not be brought"
            " together.",
            where="shrink",
            hint="Trace the model with role='teacher', which takes its eval mode.",
        )
    for tap, width in (widths or {}).items():
        check_width(model, tap, width)
    known = analyse(model, criterion=criterion, loader=loader)
    found, classes, cost = known.found, known.classes, known.cost
    stay = np.ones(len(classes.scores), dtype=bool)
    settled = np.zeros(len(stay), dtype=bool)
    if widths:
        stay, settled = by_widths(classes, found, model, widths, stay)
    if ratio is not None:
        stay = even_out(classes, found, by_ratio(classes, stay, ratio, round_to, settled), ratio, round_to, settled)
    if macs is not None or params is not None:
        stay = _within_budget(classes, cost, stay, settled, macs, params, round_to)
    return keep_classes(model, known, stay)


@dataclass(frozen=True, slots=True)
class Analysis:
    """What of a network goes together, what it is worth, and what it costs.

    Attributes:
        found: units and what ties them.
        classes: of units that go together, with their scores, in groups.
        cost: as a function of the classes that stay.
        scorer: by which they were scored.
    """

    found: Coupling
    classes: Classes
    cost: Cost
    scorer: Scorer

    def axes(self, stay: Mask) -> dict[tuple[str, int | str], tuple[int, ...]]:
        """The entries that stay, per node and axis that loses some."""
        masks = ((place, stay[self.classes.class_of[units]]) for place, units in self.found.axes.items())
        return {place: tuple(np.flatnonzero(mask).tolist()) for place, mask in masks if not mask.all()}


def analyse(
    model: TracedModel, *, criterion: str | Criterion = "l1", loader: Iterable[object] | None = None
) -> Analysis:
    """Find what goes together and score it; arguments as in `shrink`."""
    found = couple(model.graph_module, model.facts)
    scorer = scorer_of(criterion, model, loader, {made.node: made.axis for made in found.made if made.node})
    classes = classify(found, scorer, loader)
    return Analysis(found, classes, Cost(found, classes.class_of), scorer)


def keep_classes(model: TracedModel, known: Analysis, stay: Mask) -> PassResult[TracedModel, ShrinkReport]:
    """The smaller network of the classes that stay, compared with the original's masked run.

    Raises:
        PassError: they differ: a bug in indistill-fx.
    """
    found, classes, cost = known.found, known.classes, known.cost
    stay = refill(found, classes, stay)
    work = rewrite(model.graph_module, found, lambda units: stay[classes.class_of[units]])
    report = _report(model, work, found, classes, stay, cost, known.scorer)
    if report.axes:
        verify_smaller(model, work.new, report.axes)
    return PassResult(_smaller(model, work, cost.macs_of_nodes(stay)), report)


def _check_requests(
    widths: Mapping[str, int] | None,
    ratio: float | None,
    macs: float | None,
    params: float | None,
    round_to: int | None,
) -> None:
    if not widths and ratio is None and macs is None and params is None:
        raise ConfigError(
            "shrink was not told how small the network should become.",
            where="shrink",
            hint="Give widths={layer: n}, ratio=0.5, macs=0.25 or params=0.25.",
        )
    if ratio is not None and not 0 < ratio <= 1:
        raise ConfigError(
            f"ratio={ratio} is not a share of the channels.", where="ratio", got=ratio, expected="above 0, at most 1"
        )
    if ratio is not None and (macs is not None or params is not None):
        raise ConfigError("A ratio and a budget exclude each other.", where="ratio", hint="Give one of them.")
    for name, budget in (("macs", macs), ("params", params)):
        if budget is not None and not budget > 0:
            raise ConfigError(
                f"{name}={budget} is not a budget.",
                where=name,
                got=budget,
                expected="a part up to 1, or a number above 1",
            )
    if round_to is not None and round_to < 1:
        raise ConfigError(
            f"round_to={round_to} is not a number of channels.", where="round_to", got=round_to, expected="1 or more"
        )


def _within_budget(
    classes: Classes,
    cost: Cost,
    stay: Mask,
    settled: Mask,
    macs: float | None,
    params: float | None,
    round_to: int | None,
) -> Mask:
    all_classes = np.ones(len(stay), dtype=bool)
    most_macs = None if macs is None else macs * cost.macs(all_classes) if macs <= 1 else macs
    most_params = None if params is None else params * cost.params(all_classes) if params <= 1 else params
    counted = [
        (most, count, name)
        for most, count, name in ((most_macs, cost.macs, "MACs"), (most_params, cost.params, "parameters"))
        if most is not None
    ]

    def size(mask: Mask) -> str:
        return " and ".join(f"{count(mask):,.0f} {name}" for _, count, name in counted)

    def fits(mask: Mask) -> bool:
        return all(count(mask) <= most for most, count, _ in counted)

    wanted = " and ".join(f"{most:,.0f} {name}" for most, _, name in counted)
    return by_budget(classes, cost.found, stay, fits, size, round_to, settled, wanted)


def _smaller(model: TracedModel, work: Rewriting, macs: Mapping[str, int]) -> TracedModel:
    smaller = model.with_graph(
        work.new,
        facts=new_facts(work, macs),
        aliases={name: names for name, names in model.aliases.items() if name in work.nodes},
    )
    return replace(smaller, module=work.new)


def _report(
    model: TracedModel, work: Rewriting, found: Coupling, classes: Classes, stay: Mask, cost: Cost, scorer: Scorer
) -> ShrinkReport:
    layers: dict[str, ShrunkLayer] = {}
    for made in (made for made in found.made if len(made.units)):
        mask = stay[classes.class_of[made.units]]
        each = len(mask) // len(set(classes.class_of[made.units].tolist()))
        kept, by = tuple(np.flatnonzero(mask).tolist()), scorer.basis(made.node, len(mask))[0]
        layers.setdefault(made.path, ShrunkLayer(made.path, kept, len(mask), each, by))
    params = [sum(p.numel() for p in graph.parameters()) for graph in (model.graph_module, work.new)]
    all_classes = np.ones(len(stay), dtype=bool)
    return ShrinkReport(
        layers=tuple(layers.values()),
        axes={place: tuple(kept.tolist()) for place, kept in work.keep.items()},
        frozen=_frozen(found, classes),
        approximate=tuple(
            dict.fromkeys(
                f"{model.tap_name(node)} ({op})"
                for node, op, units in found.mixing
                if not stay[classes.class_of[units]].all()
            )
        ),
        macs=(cost.macs(all_classes), cost.macs(stay)),
        parameters=(params[0], params[1]),
    )


def _frozen(found: Coupling, classes: Classes) -> tuple[Frozen, ...]:
    channels: dict[str, int] = {}
    counted = set[int]()
    for made in found.made if classes.reasons else ():
        layer_classes = classes.class_of[made.units].tolist()
        for k in layer_classes:
            if k in classes.reasons and k not in counted:
                channels[classes.reasons[k]] = channels.get(classes.reasons[k], 0) + 1
        counted.update(layer_classes)
    inseparable = [group for group in classes.groups if len(group.classes) == 1 < group.channels]
    return (
        *(Frozen(count, reason) for reason, count in channels.items()),
        *(Frozen(count, reason) for count, reason in dict.fromkeys(found.recomputed)),
        *(Frozen(group.channels, f"those of `{group.path}` can only be removed all at once") for group in inseparable),
    )


__all__ = ["Analysis", "Frozen", "PruneError", "ShrinkReport", "ShrunkLayer", "analyse", "keep_classes", "shrink"]
