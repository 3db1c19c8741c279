"""The information flow of a graph: which tensors carry information from the input, and which of them every path goes through.

Rules, in order:
  1. Information starts at the main input: of several inputs the one with the longest main path (the ids, not the attention mask).
  2. It flows along tensors. Sizes, constants, masks (boolean tensors) and indices carry none: they say where, not what.
  3. It ends at the main output; in a model that returns maps of several resolutions (a feature pyramid) at each of them.
  4. The main path are the nodes that dominate an end: every path from the input to that end passes through them.
  5. A branch that goes to a lower resolution than both of its ends and costs a good part of the whole (the inside of a U-Net) is a
     network of its own: its main path is inserted between the two.
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
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.traced import NodeFacts, TracedModel

SAME_LEVEL = 0.7
"""Sizes less than so many halvings apart are one level: a valid convolution does not halve, a stride of two does."""

_INNER, _INNER_OF_SUM = 0.05, 0.25
"""Share of all MACs that makes a branch a network of its own; more if it ends in a residual sum: attention may work at half size."""

_NO_INFORMATION = frozenset(
    (
        *("size", "shape", "getattr", "dim", "ndimension", "len", "numel", "item", "stride", "device", "dtype"),
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
        """Whether two nodes have positions, and about as many."""
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
    sources = [node for node in traced.graph_module.graph.nodes if node.op == "placeholder"]
    flows = [flow for source in sources if (flow := _from(source.name, traced, ends)) is not None]
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
    sums = {node.name for node in traced.graph_module.graph.nodes if op_name(node) == "add"}
    path, inner = _with_inner(chain, inputs, above, depth, levels, sums)
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
    """Per node that the source's information reaches, the nodes it reads it from."""
    inputs: dict[str, Names] = {source: ()}
    for node in traced.graph_module.graph.nodes:
        if node.op == "output" or not _carries(node, traced.facts):
            continue
        read = tensor_nodes(node.args[0]) if op_name(node) in _READS_FIRST_ONLY and node.args else node.all_input_nodes
        sources = tuple(dict.fromkeys(other.name for other in read if other.name in inputs))
        if sources:
            inputs[node.name] = sources
    return inputs


def _carries(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    known = facts.get(node.name)
    return (known is None or known.dtype != torch.bool) and op_name(node) not in _NO_INFORMATION


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
    sums: set[str],
) -> tuple[Names, set[str]]:
    """The chain with the main paths of its inner networks inserted, and the nodes where such a network ends."""
    path, closing = [chain[0]], set()
    for a, b in pairwise(chain):
        branches = [_chain(a, other, above) for other in inputs[b] if other != a]
        branch = max(branches, key=len, default=())
        below = max(levels.get(a, inf), levels.get(b, inf)) + SAME_LEVEL
        least = _INNER_OF_SUM if b in sums and a in inputs[b] else _INNER
        if branch and depth[b] - depth[a] >= least and any(levels.get(name, 0.0) > below for name in branch):
            inside, more = _with_inner(branch, inputs, above, depth, levels, sums)
            path.extend(inside[1:])
            closing |= {b, *more}
        path.append(b)
    return tuple(path), closing


def _between(a: str, b: str, inputs: Mapping[str, Names], order: Mapping[str, int]) -> Names:
    """The nodes on the paths from `a` to `b`, both left out, in graph order."""
    found: set[str] = set()
    new = [name for name in inputs[b] if name != a]
    while new:
        name = new.pop()
        if name not in found:
            found.add(name)
            new.extend(other for other in inputs[name] if other != a)
    return tuple(sorted(found, key=order.__getitem__))


def _ends(traced: TracedModel) -> Names:
    """The main output; or, where it is a map, one output per resolution."""
    if traced.facts[traced.logits].kind != "map":
        return (traced.logits,)
    outputs = (traced.logits, *(node.name for node in tensor_nodes(output_node(traced.graph_module.graph).args)))
    sizes: dict[tuple[int, ...], str] = {}
    for name in outputs:
        if name in traced.facts and traced.facts[name].kind == "map":
            sizes.setdefault(traced.facts[name].space, name)
    return tuple(sizes.values())


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
    """Whether a node whose map is 1x1 looked at a whole map: pooling, or a convolution without padding. Behind it are no positions.

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
