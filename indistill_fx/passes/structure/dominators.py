"""The information flow of a graph: which tensors carry information from the input, and which of them every path goes through.

Rules, in order:
  1. Information starts at the main input: of several inputs the one with the longest main path (the ids, not the attention mask).
  2. It flows along tensors. Sizes, constants, masks (boolean tensors) and indices carry none: they say where, not what.
  3. It ends at the main output; in a model that returns maps of several resolutions (a feature pyramid) at each of them.
  4. The main path are the nodes that dominate an end: every path from the input to that end passes through them.
  5. Some branches are networks of their own, whose main path is inserted between their ends: one that goes to a lower resolution than both
     ends and costs a good part of the whole (the inside of a U-Net); and one beside a shortcut without weights that does at least half of
     all work, in several merges or a long chain of layers: the body of a restorer (`x - net(x)`), and a forecaster that normalises its
     series and puts their scale back (`net((x - mean) / std) * std + mean`); and one from the input to a sum that does nearly all work of
     the whole (the deep part of wide and deep networks and of factorisation machines).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, log2, prod

import networkx as nx
import torch
from torch import fx

from indistill_fx.errors import MatchError
from indistill_fx.graph.edit import output_node, tensor_nodes
from indistill_fx.graph.ops import BINARY, UNARY, attribute, op_name
from indistill_fx.traced import NodeFacts, TracedModel

SAME_LEVEL = 0.7
"""Sizes less than so many halvings apart are one level: a valid convolution does not halve, a stride of two does."""

_INNER, _INNER_OF_SUM = 0.05, 0.25
"""Share of all MACs that makes a branch a network of its own; more if it ends in a residual sum: attention may work at half size."""

_MOST, _LONG, _ALL = 0.5, 6, 0.9
"""Share of all MACs, and number of layers, of a network inside one sum; share of one beside which nothing else counts."""

_NO_INFORMATION = frozenset(
    (
        *("size", "shape", "dim", "ndimension", "len", "numel", "item", "stride", "device", "dtype"),
        *("sym_size", "sym_numel", "argmax", "argmin", "argsort", "zeros_like", "ones_like", "full_like", "empty_like"),
        *("rand_like", "randn_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    )
)
_READS_FIRST_ONLY = frozenset(
    (
        "getitem",
        "index",
        "gather",
        "index_select",
        "take_along_dim",
        "masked_fill",
        "masked_select",
        "expand_as",
        "type_as",
    )
)
_ASSEMBLES = (
    UNARY
    | BINARY
    | {"view", "reshape", "permute", "transpose", "flatten", "cat", "stack", "with_item", "getitem", "softmax"}
)
"""Operations that put the outputs of the levels of a detector together."""
_SUMMARIES = frozenset(
    "adaptive_avg_pool adaptive_max_pool avg_pool max_pool lp_pool mean sum amax amin max min std var logsumexp".split()
)
Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flow:
    """The information flow of one model. All mappings are in graph order and hold the nodes between the input and an end.

    Attributes:
        main_path: names of the nodes that dominate the main end, from the input to it.
        regions: per node of the main path, the nodes between it and the one before it on that path; empty where the two are neighbours.
        ends: names of the ends: the main output, or the features of a pyramid.
        inputs: per node, the nodes it reads information from.
        readers: the same, the other way round.
        depth: per node, the share of all MACs spent before it and in it.
        levels: per node that is a map or tokens, how often its sides were halved since the input.
    """

    main_path: Names
    regions: Mapping[str, Names]
    ends: Names
    inputs: Mapping[str, Names]
    readers: Mapping[str, Names]
    depth: Mapping[str, float]
    levels: Mapping[str, float]

    def on_one_level(self, one: str, other: str) -> bool:
        """Whether both nodes have positions, and about the same number of them."""
        return one in self.levels and other in self.levels and abs(self.levels[one] - self.levels[other]) <= SAME_LEVEL


def information_flow(traced: TracedModel) -> Flow:
    """Find main path and ends.

    Args:
        traced: the model.

    Returns:
        The flow.

    Raises:
        MatchError: no path of tensors leads from an input to the main output.

    Source:
        Dominators by networkx: Cooper, Harvey, Kennedy, "A simple, fast dominance algorithm", 2001.
    """
    ends = _ends(traced)
    flows = [flow for source in traced.input_nodes if (flow := _from(source, traced, ends)) is not None]
    if not flows:
        raise MatchError(
            f"In the {traced.role} no path of tensors leads from an input to the output `{traced.logits}`.",
            where=traced.logits,
            hint="Name the main output with logits=.",
        )
    return max(flows, key=lambda flow: len(flow.main_path))


def _from(source: str, traced: TracedModel, ends: Names) -> Flow | None:
    """The flow from one input; None if it reaches no end."""
    inputs = _reached(source, traced)
    ends = tuple(end for end in ends if end in inputs)
    if not ends:
        return None
    needed = set(ends)
    for name in reversed(inputs):
        if name in needed:
            needed.update(inputs[name])
    inputs = {name: sources for name, sources in inputs.items() if name in needed}
    readers: nx.DiGraph[str] = nx.DiGraph()
    readers.add_nodes_from(inputs)
    readers.add_edges_from((other, name) for name, sources in inputs.items() for other in sources)
    above = nx.immediate_dominators(readers, source)
    levels = _levels(traced, inputs, source)
    macs = list(accumulate(traced.facts[name].macs if name in traced.facts else 0 for name in inputs))
    depth = {name: done / max(1, macs[-1]) for name, done in zip(inputs, macs, strict=True)}
    order = {name: k for k, name in enumerate(inputs)}
    chain = max((_chain(source, end, above) for end in ends), key=len)
    nodes = traced.graph_module.graph.nodes
    kinds = _Kinds(
        frozenset(node.name for node in nodes if op_name(node) in ("add", "sub")),
        frozenset(node.name for node in nodes if op_name(node) in ("add", "sub", "mul", "div")),
        {name: traced.facts[name].macs for name in inputs if name in traced.facts and traced.facts[name].macs},
    )
    path, inner = _with_inner(chain, inputs, above, depth, levels, kinds)
    return Flow(
        main_path=path,
        regions={b: () if b in inner else _between(a, b, inputs, order) for a, b in pairwise(path)},
        ends=ends,
        inputs=inputs,
        readers={name: tuple(readers.successors(name)) for name in inputs},
        depth=depth,
        levels=levels,
    )


def _reached(source: str, traced: TracedModel) -> dict[str, Names]:
    """For every node that depends on the source, the inputs through which it does."""
    inputs: dict[str, Names] = {source: ()}
    for node in traced.graph_module.graph.nodes:
        if node.op == "output" or not _carries(node, traced.facts):
            continue
        sources = tuple(dict.fromkeys(other.name for other in _read(node) if other.name in inputs))
        if sources:
            inputs[node.name] = sources
    return inputs


def _carries(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    known = facts.get(node.name)
    if op_name(node) == "getattr":  # accept `x.max(1).values`, but not `x.shape`
        return known is not None and known.dtype.is_floating_point
    return (known is None or known.dtype != torch.bool) and op_name(node) not in _NO_INFORMATION


def _read(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads information from."""
    return tensor_nodes(node.args[0]) if op_name(node) in _READS_FIRST_ONLY and node.args else node.all_input_nodes


def _chain(source: str, end: str, above: Mapping[str, str]) -> Names:
    """The dominators of `end` from `source` on."""
    chain = [end]
    while chain[-1] != source:
        chain.append(above[chain[-1]])
    return tuple(reversed(chain))


def _with_inner(
    chain: Sequence[str],
    inputs: Mapping[str, Names],
    above: Mapping[str, str],
    depth: Mapping[str, float],
    levels: Mapping[str, float],
    kinds: _Kinds,
) -> tuple[Names, set[str]]:
    """The chain with the main paths of its inner networks inserted, and the nodes where such a network ends."""
    path, closing = [chain[0]], set()
    for a, b in pairwise(chain):
        branches = [_chain(a, other, above) for other in inputs[b] if other != a]
        branch = max(
            branches, key=lambda one: (not kinds.is_idle(a, one[-1], inputs), len(one)), default=tuple[str, ...]()
        )
        share = depth[b] - depth[a]
        bare = b in kinds.sums and a in inputs[b]
        below = max(levels.get(a, inf), levels.get(b, inf)) + SAME_LEVEL
        lower = share >= (_INNER_OF_SUM if bare else _INNER) and any(levels.get(name, -inf) > below for name in branch)
        beside = share >= _MOST and b in kinds.joins and any(kinds.is_idle(a, other, inputs) for other in inputs[b])
        alone = bool(branch) and not depth[a] and b in kinds.joins and kinds.is_all(a, branch, inputs)
        if branch and (lower or beside or alone):
            inside, more = _with_inner(branch, inputs, above, depth, levels, kinds)
            if lower or alone or kinds.is_network(inside[1:], inputs):
                path.extend(inside[1:])
                closing |= {b, *more}
        path.append(b)
    return tuple(path), closing


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Which nodes add or subtract, which join two tensors entry by entry, and the MACs of those that work with weights."""

    sums: frozenset[str]
    joins: frozenset[str]
    works: Mapping[str, int]

    def is_idle(self, a: str, b: str, inputs: Mapping[str, Names]) -> bool:
        """Whether nothing with weights lies between `a` and `b`, nor is `b` such."""
        return a == b or self.works.keys().isdisjoint(_back(a, b, inputs))

    def is_network(self, chain: Sequence[str], inputs: Mapping[str, Names]) -> bool:
        """Whether a chain has several merges, or many layers and none."""
        merges = sum(name in self.sums and len(inputs[name]) > 1 for name in chain)
        return merges > 1 or (not merges and sum(name in self.works for name in chain) >= _LONG)

    def is_all(self, a: str, chain: Sequence[str], inputs: Mapping[str, Names]) -> bool:
        """Whether the nodes between `a` and the end of a chain do nearly all work of the whole network, in several layers."""
        doing = sum(self.works.get(name, 0) for name in _back(a, chain[-1], inputs))
        return doing >= _ALL * sum(self.works.values()) and sum(name in self.works for name in chain) > 1


def _between(a: str, b: str, inputs: Mapping[str, Names], order: Mapping[str, int]) -> Names:
    """The nodes on the paths from `a` to `b`, without these two, in graph order."""
    return tuple(sorted(_back(a, b, inputs) - {b}, key=order.__getitem__))


def _back(a: str, b: str, inputs: Mapping[str, Names]) -> set[str]:
    """`b`, and the nodes on the paths to it from `a`, without that."""
    found, new = set[str](), [b]
    while new:
        name = new.pop()
        if name not in found:
            found.add(name)
            new.extend(other for other in inputs[name] if other != a)
    return found


def _ends(traced: TracedModel) -> Names:
    """The main output; or one map per resolution, of the outputs where they are maps, and of those that they are put together from."""
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    main = _maps_of(nodes[traced.logits], traced)
    if not main:
        return (traced.logits,)
    outputs = [nodes[traced.logits], *tensor_nodes(output_node(traced.graph_module.graph).args)]
    sizes: dict[tuple[int, ...], str] = {}
    for node in (*main, *(found for output in outputs for found in _maps_of(output, traced))):
        sizes.setdefault(traced.facts[node.name].space, node.name)
    if traced.facts[traced.logits].kind == "map" and len(sizes) == 1:
        return (traced.logits,)
    return tuple(sizes.values()) if len(sizes) > 1 else (traced.logits,)


def _maps_of(output: fx.Node, traced: TracedModel) -> list[fx.Node]:
    """The maps that an output consists of: itself if it is a map, or those of every level if levels were flattened and concatenated."""
    axes = {len(traced.facts[name].space) for name in traced.input_nodes}
    found, todo, seen = [], [output], {output}
    while todo:
        node = todo.pop()
        known = traced.facts.get(node.name)
        if known is not None and known.kind == "map" and len(known.space) in axes:
            found.append(node)
        elif (known is None or not known.macs) and node.op.startswith("call") and op_name(node) in _ASSEMBLES:
            fresh = [source for source in _read(node) if source not in seen and _carries(source, traced.facts)]
            seen.update(fresh)
            todo += fresh
    return sorted(found)


def _levels(traced: TracedModel, names: Mapping[str, Names], source: str) -> dict[str, float]:
    """How often the sides were halved: log2 of the positions lost, per axis of space of the input. Windows count together."""
    facts = traced.facts
    space, batch = facts[source].space, facts[source].shape[facts[source].batch_axis or 0]
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    found: dict[str, float] = {}
    for name, inputs in names.items():
        known = facts.get(name)
        if not space or known is None or known.kind not in ("map", "tokens"):
            continue
        if prod(known.space) == 1 and (not any(other in found for other in inputs) or _summarises(nodes[name], facts)):
            continue
        positions = prod(known.shape) / max(1, known.channels * batch)
        found[name] = log2(prod(space) / positions) / len(space)
    return found


def _summarises(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    """Whether a node whose map is 1x1 looked at a whole map: pooling, or a convolution without padding. After it there are no positions.

    A map can also be 1x1 because the input is small: the fourth stage of a ResNet on 32x32 images.
    """
    operation = op_name(node)
    if operation != "conv":
        return operation in _SUMMARIES
    seen = facts[node.all_input_nodes[0].name].space if node.all_input_nodes[0].name in facts else ()
    return prod(seen) > 1 and not any(_padding(node))


def _padding(node: fx.Node) -> tuple[object, ...]:
    """Of a convolution; zeros only where it has none, or is pointwise (which sees one position)."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        conv = attribute(owner, str(node.target))
        kernel, padding = conv.weight.shape[2:], conv.padding
    else:
        kernel, padding = (), node.kwargs.get("padding", node.args[4] if len(node.args) > 4 else 0)
    if kernel and prod(kernel) == 1:
        return (1,)
    return tuple(padding) if isinstance(padding, (tuple, list)) else (padding,)
