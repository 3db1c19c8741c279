"""Narrow each tap to the channels it keeps.

Rules, in order:
  1. Which channels: given by `kept`, else by the plan, else the best by `criterion` (see `rank`).
  2. At the tap stands `index_select(feature, kept)`, which is right on any graph.
  3. The selection is sunk upstream as far as the channel rules allow; there it is absorbed in sliced weights, or stays, with the reason.
  4. What other readers need whole is left whole: the graph up to the tap is doubled where it must be, and nothing is changed.
  5. The narrow features are compared with the whole ones at the kept channels, also at another size than the example's (`verified`).

Keeps: every narrowed feature equals the teacher's own feature at the kept channels; the network's output is unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from indistill_fx.errors import PruneError
from indistill_fx.graph.edit import SliceOf, add_module, add_tensor, copy_graph
from indistill_fx.graph.ops import op_name
from indistill_fx.passes.channels.call import index_select
from indistill_fx.passes.channels.rules import trace_back
from indistill_fx.passes.channels.selection import Blocked, Cut, Propagation
from indistill_fx.passes.channels.sizes import size_read
from indistill_fx.passes.contract import PassResult
from indistill_fx.passes.pruning.criteria import Criterion, best
from indistill_fx.passes.pruning.rank import check_width, choose_channels, rank_taps
from indistill_fx.passes.pruning.verified import verify_narrowed
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.traced import NodeFacts, TracedModel


@dataclass(frozen=True, slots=True)
class Absorbed:
    """Weights that took the selection in: the node, the module's path, rows kept and rows there were."""

    node: str
    module: str
    kept: int
    of: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """A place where the selection stays, because it cannot be had from further up; why."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class NarrowedTap:
    """What became of one tap.

    Attributes:
        tap: its name.
        kept: the channels kept, ascending.
        of: the channels there were.
        chosen_by: how: given, or by which criterion of which layers.
        absorbed: weights that were sliced.
        stopped: where the selection stays.
        notes: gathers that restore an order, and the like.
        macs_removed: of one sample, on the way from the input to the tap.
        parameters_removed: on the same way.
    """

    tap: str
    kept: tuple[int, ...]
    of: int
    chosen_by: str = ""
    absorbed: tuple[Absorbed, ...] = ()
    stopped: tuple[Stopped, ...] = ()
    notes: tuple[str, ...] = ()
    macs_removed: int = 0
    parameters_removed: int = 0


@dataclass(frozen=True, slots=True)
class NarrowReport:
    """What narrowing did, tap by tap."""

    taps: tuple[NarrowedTap, ...]

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Tap -> channels kept, ascending."""
        return {tap.tap: tap.kept for tap in self.taps}


def narrow(
    teacher: TracedModel,
    plan: AlignmentPlan | None = None,
    *,
    widths: Mapping[str, int] | None = None,
    kept: Mapping[str, Sequence[int]] | None = None,
    criterion: str | Criterion = "l1",
    loader: Iterable[object] | None = None,
) -> PassResult[TracedModel, NarrowReport]:
    """Reduce chosen taps of a model to some of their channels; the features at those channels stay exactly the same.

    Args:
        teacher: the traced model; it is not changed.
        plan: pairs of layers; each teacher layer is narrowed to the pair's `kept`, else to the student's width.
        widths: tap → number of channels; takes precedence over the plan.
        kept: tap → channels; takes precedence over the plan and `widths`.
        criterion: which channels are kept where only a width is given: a name (`l1`, `l2`, `geometric_median`, `bn_scale`,
            `random`, `activation`, `taylor`), or a function of weights (rows, inputs, *kernel) that returns a score per row.
        loader: batches for the criteria that need data.

    Returns:
        The model whose taps, under all their names, are narrow; the report says which channels were kept and which weights were sliced.

    Raises:
        ConfigError: there is no tap or criterion of that name.
        PruneError: the layer has fewer channels, or two requests name the same tensor.
        PassError: a narrow feature is not the whole one at the kept channels. This is a bug; please report it.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> x = torch.randn(2, 1, 8, 8)
        >>> traced = ifx.trace(DigitsTeacher(), x)
        >>> narrowed = ifx.narrow(traced, kept={"layer2": [3, 5, 8]})
        >>> before, _ = ifx.instrument(traced, ["layer2"])(x)
        >>> after, _ = ifx.instrument(narrowed.value, ["layer2"])(x)
        >>> torch.allclose(after["layer2"], before["layer2"][:, [3, 5, 8]], atol=1e-5)
        True
    """
    chosen = _requests(teacher, plan, dict(widths or {}), dict(kept or {}), criterion, loader)
    graph_module, nodes = copy_graph(teacher.graph_module)
    out = _Rewriter(graph_module, dict(teacher.facts))
    aliases = dict(teacher.aliases)
    reports: list[NarrowedTap] = []
    renamed: dict[str, fx.Node] = {}
    for tap, (index, by) in chosen.items():
        known, name = teacher.facts_of(tap), teacher.node(tap).name
        axis = known.channel_axis or 0
        report, new = _narrow_tap(out, tap, Cut(nodes[name], axis, axis + 1, index), known, by)
        reports.append(report)
        if new is not nodes[name]:
            renamed[name] = new
            # The node may have been created for a tensor of another shape, such as the five axes of a channel shuffle.
            out.facts[new.name] = replace(
                out.facts[new.name], kind=known.kind, channel_axis=known.channel_axis, stride=known.stride
            )
    aliases.update({name: (f"{teacher.aliases[name][0]}:whole",) for name in renamed})
    moved = {alias for name in renamed for alias in teacher.aliases[name]}
    for name in aliases.keys() - renamed.keys():  # of a tuple's part that the code takes twice, each has the name
        aliases[name] = tuple(f"{alias}:whole" if alias in moved else alias for alias in aliases[name])
    for name, new in renamed.items():  # several taps may share one node, and it may have existed before
        aliases[new.name] = (*aliases.get(new.name, ()), *teacher.aliases[name])
    graph_module.graph.lint()
    graph_module.recompile()
    narrowed = teacher.with_graph(graph_module, facts=out.facts, aliases=aliases)
    if chosen:
        verify_narrowed(teacher, narrowed, {tap: index for tap, (index, _) in chosen.items()})
    return PassResult(narrowed, NarrowReport(tuple(reports)))


def _requests(
    teacher: TracedModel,
    plan: AlignmentPlan | None,
    widths: dict[str, int],
    kept: dict[str, Sequence[int]],
    criterion: str | Criterion,
    loader: Iterable[object] | None,
) -> dict[str, tuple[tuple[int, ...], str]]:
    """The channels every tap keeps and how they were chosen, in the order the taps were named."""
    order = [pair.teacher for pair in plan.pairs] if plan else []
    for pair in plan.pairs if plan else ():
        if pair.teacher in kept or pair.teacher in widths:
            continue
        if pair.kept is not None:
            kept[pair.teacher] = pair.kept
        elif (width := student_width(pair, teacher.facts_of(pair.teacher))) < teacher.facts_of(pair.teacher).channels:
            widths[pair.teacher] = width
    wanted = {tap: _check_kept(teacher, tap, index) for tap, index in kept.items()}
    counts = {tap: check_width(teacher, tap, n) for tap, n in widths.items() if tap not in wanted}
    ranked = rank_taps(teacher, counts, criterion, loader)
    wanted |= {tap: best(ranked[tap].scores, count) for tap, count in counts.items()}
    names = [tap for tap in dict.fromkeys((*order, *widths, *kept)) if tap in wanted]
    first: dict[str, str] = {}
    for tap in names:
        other = first.setdefault(teacher.node(tap).name, tap)
        if wanted[other] != wanted[tap]:
            raise PruneError(
                f"`{tap}` and `{other}` are the same tensor, but {len(wanted[tap])} channels are requested of one "
                f"and {len(wanted[other])}{' others' if len(wanted[tap]) == len(wanted[other]) else ''} of the other.",
                where=tap,
                hint="Give both the same channels.",
            )
    return {tap: (wanted[tap], ranked[tap].by if tap in ranked else "given") for tap in names}


def _whole_numbers(tap: str, index: Sequence[int]) -> list[int]:
    try:
        return [operator.index(k) for k in index]
    except TypeError:
        raise PruneError(
            f"`{tap}`: {index!r:.60} are not channels to keep.", where=tap, expected="a list of whole numbers"
        ) from None


def _check_kept(teacher: TracedModel, tap: str, index: Sequence[int]) -> tuple[int, ...]:
    index = _whole_numbers(tap, index)
    check_width(teacher, tap, len(index))
    channels = teacher.facts_of(tap).channels
    unique = sorted(set(index))
    if len(unique) != len(index) or unique[0] < 0 or unique[-1] >= channels:
        raise PruneError(
            f"`{tap}` has channels 0 to {channels - 1}; asked to keep {list(index)[:8]}{'…' if len(index) > 8 else ''}.",
            where=tap,
            hint="Name each channel once.",
        )
    return tuple(unique)


def student_width(pair: Pair, known: NodeFacts) -> int:
    """The student's number of channels in a pair: on the teacher's axis if both have the same layout, else by the usual layouts."""
    shape = pair.student_shape
    if len(shape) == 4:
        last = shape[1] == shape[2] != shape[3] or (
            known.channel_axis == 3 and len(known.shape) == 4 and shape[2] != shape[3]
        )
        return shape[3 if last else 1]
    if len(shape) == len(known.shape) and known.channel_axis is not None:
        return shape[known.channel_axis]
    return shape[1] if len(shape) in (2, 5) else shape[-1]


def _narrow_tap(out: _Rewriter, tap: str, cut: Cut, known: NodeFacts, by: str) -> tuple[NarrowedTap, fx.Node]:
    answers = trace_back([cut], out.facts)
    new = out.emit(answers, cut)
    before, after = out.cost(cut.node), out.cost(new)
    absorbed, stopped, notes = [], [], []
    for at, answer in answers.items():
        if isinstance(answer, Blocked):
            stopped.append(Stopped(at.node.name, answer.reason))
        elif answer.filters is not None:
            filters = answer.filters
            absorbed.append(
                Absorbed(at.node.name, filters.path, len(at.index), out.facts[at.node.name].shape[at.start])
            )
        if isinstance(answer, Propagation) and answer.note:
            notes.append(f"{at.node.name}: {answer.note}")
    report = NarrowedTap(
        tap=tap,
        kept=cut.index,
        of=known.channels,
        chosen_by=by,
        absorbed=tuple(absorbed),
        stopped=tuple(stopped),
        notes=tuple(dict.fromkeys(notes)),
        macs_removed=before[0] - after[0],
        parameters_removed=before[1] - after[1],
    )
    return report, new


@dataclass
class _Rewriter:
    """The graph being written: implements `Emitter`, makes every selection once, and derives the facts of new nodes."""

    graph_module: fx.GraphModule
    facts: dict[str, NodeFacts]
    made: dict[Cut, fx.Node] = field(default_factory=dict)
    cursor: dict[fx.Node, fx.Node] = field(default_factory=dict)
    at: fx.Node | None = None

    def emit(self, answers: Mapping[Cut, Propagation | Blocked], wanted: Cut) -> fx.Node:
        """Make all selections, inputs first; returns the node of the wanted one."""
        order = {node: k for k, node in enumerate(self.graph_module.graph.nodes)}
        for cut in sorted(answers, key=lambda c: (order[c.node], c.width)):
            if cut not in self.made:
                self.made[cut] = self._make(cut, answers[cut])
        return self.made[wanted]

    def _make(self, cut: Cut, answer: Propagation | Blocked) -> fx.Node:
        self.at = cut.node
        if isinstance(answer, Blocked):
            new = index_select(self, cut.node, cut.start, cut.stop, cut.index)
        else:
            new = answer.emit(self, [self.made[c] for c in (*(part.cut for part in answer.parts), *answer.weights)])
        if new is not cut.node and new.name not in self.facts:
            self._derive(new, cut, free=isinstance(answer, Blocked))
        return new

    def _derive(self, new: fx.Node, cut: Cut, *, free: bool) -> None:
        """Facts of a selection, from those of the whole: its share of the work, and one axis in place of the merged ones."""
        known = self.facts[cut.node.name]
        shape = (*known.shape[: cut.start], len(cut.index), *known.shape[cut.stop :])
        channels = prod(known.shape[cut.start : cut.stop])
        axis = known.channel_axis
        if axis is not None and axis >= cut.start:
            axis = cut.start if axis < cut.stop else axis - cut.width + 1
        self.facts[new.name] = replace(
            known,
            shape=shape,
            kind=known.kind if cut.width == 1 else "other",
            channel_axis=axis,
            stride=known.stride if cut.width == 1 else None,
            macs=0 if free else known.macs * len(cut.index) // channels,
            parameters=self._parameters(new),
        )
        if cut.width == 1 and op_name(new) == op_name(cut.node):
            SliceOf(cut.node.name, cut.start, tuple(cut.index)).mark(new)

    def _parameters(self, node: fx.Node) -> int:
        if node.op == "call_module":
            return sum(p.numel() for p in self.graph_module.get_submodule(str(node.target)).parameters())
        if node.op == "get_attr":
            value = getattr(self.graph_module, str(node.target), None)
            return value.numel() if isinstance(value, nn.Parameter) else 0
        return 0

    def cost(self, node: fx.Node) -> tuple[int, int]:
        """MACs and parameters on all paths from the input to a node."""
        seen, pending = {node}, [node]
        while pending:
            fresh = [n for n in pending.pop().all_input_nodes if n not in seen]
            seen.update(fresh)
            pending += fresh
        facts = [self.facts[n.name] for n in seen if n.name in self.facts]
        return sum(f.macs for f in facts), sum(f.parameters for f in facts)

    def _add(self, make: Callable[[fx.Graph], fx.Node]) -> fx.Node:
        if self.at is None:
            raise RuntimeError("nothing is being made")
        graph = self.graph_module.graph
        with graph.inserting_after(self.cursor.get(self.at, self.at)):
            node = make(graph)
        if "nn_module_stack" in self.at.meta:
            node.meta["nn_module_stack"] = self.at.meta["nn_module_stack"]
        self.cursor[self.at] = node
        return node

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """See `Emitter`."""
        return self._add(lambda graph: graph.call_function(target, args, kwargs))

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """See `Emitter`."""
        return self._add(lambda graph: graph.call_method(name, args, kwargs))

    def module(self, wanted: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """See `Emitter`."""
        name = add_module(self.graph_module, wanted, module)
        return self._add(lambda graph: graph.call_module(name, args, kwargs))

    def item(self, node: fx.Node, key: int) -> fx.Node:
        """See `Emitter`."""
        return self.function(operator.getitem, node, key)

    def tensor(self, wanted: str, tensor: Tensor) -> fx.Node:
        """See `Emitter`."""
        name = add_tensor(self.graph_module, wanted, tensor)
        return self._add(lambda graph: graph.get_attr(name))

    def size(self, node: fx.Node) -> fx.Node:
        """See `Emitter`: a whole tensor whose size is read would have to be computed."""
        read = size_read(node)
        if read is None:
            args = fx.map_arg(node.args, lambda n: n if n.name in self.facts else self.size(n))
            unchanged = node.op != "call_function" or args == node.args
            return node if unchanged else self.function(node.target, *args, **node.kwargs)  # type: ignore[arg-type]
        tensor, axis = read
        for cut, new in self.made.items():
            if cut.node is tensor and cut.width == 1 and cut.start != axis % len(self.facts[tensor.name].shape):
                return self.method("size", new, axis)
        return node


__all__ = ["Absorbed", "NarrowReport", "NarrowedTap", "Stopped", "choose_channels", "narrow"]
