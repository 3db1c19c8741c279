"""The information flow of a graph: which tensors carry what the input told, and which of them every path goes through.

Rules, in order:
  1. Information starts at the main input: of several inputs the one with the longest trunk (ids, not the attention mask).
  2. It flows along tensors. Sizes, constants, masks (boolean tensors) and indices carry none: they say where, not what.
  3. It ends at the main output. A model that returns maps of several resolutions (a feature pyramid) has one end per resolution.
  4. The trunk are the nodes that dominate an end: every path from the input to that end passes through them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import log2, prod

import networkx as nx
from torch import fx

from indistill_fx.errors import MatchError
from indistill_fx.graphs import output_node, tensor_nodes
from indistill_fx.ops import op_name
from indistill_fx.traced import NodeFacts, TracedModel

_MEASURES = frozenset(
    "size shape getattr dim ndimension len numel item stride is_contiguous sym_size sym_numel device dtype argmax argmin argsort "
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor".split()
)
_FIRST_ARGUMENT_ONLY = frozenset("getitem index gather index_select take_along_dim masked_fill masked_select expand_as type_as".split())


@dataclass(frozen=True, slots=True)
class Flow:
    """The information flow of one model.

    Attributes:
        trunk: names of the nodes that dominate the main end, from the input to it.
        ends: names of the ends: the main output, or the features of a pyramid.
        inputs: per node that lies between the input and an end, the nodes it reads information from.
        readers: the same, the other way round.
        depth: per such node, the share of all MACs spent before it and in it, in graph order.
        octaves: per such node that is a map or tokens, how often its sides were halved since the input.
    """

    trunk: tuple[str, ...]
    ends: tuple[str, ...]
    inputs: Mapping[str, tuple[str, ...]]
    readers: Mapping[str, tuple[str, ...]]
    depth: Mapping[str, float]
    octaves: Mapping[str, float]


def information_flow(traced: TracedModel) -> Flow:
    """Find trunk and ends.

    Args:
        traced: the model.

    Raises:
        MatchError: no path of tensors leads from an input to the main output.

    Source:
        Cooper, Harvey, Kennedy, "A simple, fast dominance algorithm", 2001 (the algorithm inside networkx.immediate_dominators).
    """
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    ends = _ends(traced)
    trunks = [found for node in nodes.values() if node.op == "placeholder" for found in [_trunk(node, nodes, traced.facts, ends)] if found]
    if not trunks:
        raise MatchError(
            f"In the {traced.role} no path of tensors leads from an input to the output `{traced.logits}`.",
            where=traced.logits,
            hint="Name the main output with logits=.",
        )
    trunk, inputs, reached = max(trunks, key=lambda found: len(found[0]))
    readers: dict[str, list[str]] = {name: [] for name in inputs}
    for name, sources in inputs.items():
        for source in sources:
            readers[source].append(name)
    macs = list(accumulate(traced.facts[name].macs if name in traced.facts else 0 for name in inputs))
    total = max(1, macs[-1])
    return Flow(
        trunk=trunk,
        ends=reached,
        inputs=inputs,
        readers={name: tuple(found) for name, found in readers.items()},
        depth={name: done / total for name, done in zip(inputs, macs, strict=True)},
        octaves=_octaves(traced.facts, inputs, trunk[0]),
    )


def _trunk(
    source: fx.Node, nodes: Mapping[str, fx.Node], facts: Mapping[str, NodeFacts], ends: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]], tuple[str, ...]] | None:
    """Trunk, inputs of every node between `source` and an end, and the ends that are reached."""
    inputs: dict[str, tuple[str, ...]] = {source.name: ()}
    for node in nodes.values():
        told = tuple(dict.fromkeys(n.name for n in _told_by(node) if n.name in inputs))
        if told and node.op != "output" and _carries(node, facts):
            inputs[node.name] = told
    reached = tuple(end for end in ends if end in inputs)
    if not reached:
        return None
    needed: set[str] = set()
    for name in reversed(inputs):
        if name in reached or name in needed:
            needed.update((name, *inputs[name]))
    inputs = {name: told for name, told in inputs.items() if name in needed}
    graph = nx.DiGraph([(told, name) for name, sources in inputs.items() for told in sources])
    graph.add_node(source.name)
    above = nx.immediate_dominators(graph, source.name)
    chains = [_chain(end, above, source.name) for end in reached]
    return max(chains, key=len), inputs, reached


def _chain(end: str, above: Mapping[str, str], source: str) -> tuple[str, ...]:
    chain = [end]
    while chain[-1] != source:
        chain.append(above[chain[-1]])
    return tuple(reversed(chain))


def _told_by(node: fx.Node) -> list[fx.Node]:
    if op_name(node) in _FIRST_ARGUMENT_ONLY and node.args:
        return tensor_nodes(node.args[0])
    return node.all_input_nodes


def _carries(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    known = facts.get(node.name)
    if known is not None and str(known.dtype) == "torch.bool":
        return False
    return op_name(node) not in _MEASURES


def _ends(traced: TracedModel) -> tuple[str, ...]:
    """The main output; or, where it is a map, one output per resolution."""
    if traced.facts[traced.logits].kind != "map":
        return (traced.logits,)
    outputs = dict.fromkeys((traced.logits, *(n.name for n in tensor_nodes(output_node(traced.graph_module.graph).args))))
    sizes: dict[tuple[int, ...], str] = {}
    for name in outputs:
        if name in traced.facts and traced.facts[name].kind == "map":
            sizes.setdefault(traced.facts[name].space, name)
    return tuple(sizes.values())


def _octaves(facts: Mapping[str, NodeFacts], names: Mapping[str, object], source: str) -> dict[str, float]:
    """How often the sides were halved: log2 of the positions lost, per axis of space of the input."""
    space = facts[source].space
    found = {}
    for name in names:
        known = facts.get(name)
        if known is not None and known.kind in ("map", "tokens") and prod(known.space) > 1 and space:
            found[name] = log2(prod(space) / prod(known.space)) / len(space)
    return found
