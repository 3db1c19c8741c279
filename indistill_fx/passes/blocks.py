"""The blocks of a network, found in its dataflow: no module, no name is looked at.

Rules, in order:
  1. A *join* is a trunk node that adds or concatenates branches with work in them: a residual sum, an inception or dense concat.
     A *unit* is a trunk node with weights of its own: a convolution, a linear layer, an opaque module.
  2. A block mixes positions and then transforms them: a join or unit that mixes opens a block; a pointwise join after it
     (the MLP after the attention), or a pointwise unit after a depthwise one (a separable convolution), belongs to the same block.
     Other pointwise units (the expansion before a head, a transition) belong to no block.
  3. The block's output is the last tensor of the chain behind it: through activations, channel shuffles, norms of units, pooling of
     stride 1. Not through the norm after a residual sum (that norm opens the next block), unless the network norms each sum before
     anybody else reads it (post-norm). Dropout and identity are not a tensor of their own.
  4. In a plain chain whose every unit is followed by pooling, the pooling closes the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import fx

from indistill_fx.graphs import tensor_nodes
from indistill_fx.ops import UNARY, attribute, op_name
from indistill_fx.passes.flow import Flow
from indistill_fx.traced import NodeFacts, TracedModel

_JOINS = frozenset("add sub cat stack sum".split())
_NOTHING = frozenset("dropout alpha_dropout identity clone contiguous detach stochastic_depth drop_path to float half".split())
_POOLS = frozenset("max_pool avg_pool lp_pool adaptive_avg_pool adaptive_max_pool".split())
_ACTIVATIONS = UNARY - _NOTHING
_SAME_LEVEL = 0.7
"""Two sizes belong to one level if they are less than this many octaves apart: a valid convolution does not halve, a stride of two does."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block: where it ends.

    Attributes:
        output: the tensor the next block reads.
        sum: the bare result of the block's last operation, before activation and norm.
        pre_activation: the tensor that the block's last activation reads; `output` where no activation follows.
        last_conv: the last convolution or linear layer of the main branch; `sum` where there is none.
        joins: whether the block ends in a join.
        pooled: whether the block ends in a pooling of its own.
        dilated: whether a convolution in it is dilated.
        octaves: level of the output.
        depth: share of the network's MACs spent up to the output.
    """

    output: str
    sum: str
    pre_activation: str
    last_conv: str
    joins: bool
    pooled: bool
    dilated: bool
    octaves: float
    depth: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A trunk node with work behind it: a join with its region, or a unit."""

    index: int
    node: fx.Node
    joins: bool
    mixes: bool
    depthwise: bool
    dilated: bool
    last_conv: str


def find_blocks(traced: TracedModel, flow: Flow) -> tuple[Block, ...]:
    """The blocks on the trunk, in order.

    Args:
        traced: the model.
        flow: its information flow.
    """
    nodes = {node.name: node for node in traced.graph_module.graph.nodes}
    steps = list(_steps(traced, flow, nodes))
    post_norm = _is_post_norm(steps, flow, nodes)
    pooled = _pools_every_unit(steps, flow, nodes)
    closing: list[_Step] = []
    for step in steps:
        if step.mixes:
            closing.append(step)
        elif closing and ((step.joins and closing[-1].joins) or (closing[-1].depthwise and not closing[-1].joins and not step.joins)):
            closing[-1] = step
    return tuple(_block(step, traced, flow, nodes, post_norm=post_norm, pooled=pooled) for step in closing if step.node.name in flow.octaves)


def _steps(traced: TracedModel, flow: Flow, nodes: Mapping[str, fx.Node]) -> Iterator[_Step]:
    order = list(flow.inputs)
    place = {name: k for k, name in enumerate(order)}
    for index, (before, name) in enumerate(zip(flow.trunk, flow.trunk[1:], strict=False), 1):
        node, region = nodes[name], [nodes[n] for n in order[place[before] + 1 : place[name]]]
        working = [n for n in region if n.name in traced.facts and _works(n, traced.facts)]
        if working and op_name(node) in _JOINS:
            rows = _rows(traced.facts.get(before), traced.facts[name])
            mixing = [n for n in region if _mixes(n, traced.facts, rows)]
            yield _Step(index, node, True, bool(mixing), False, any(map(_dilated, working)), working[-1].name)
        elif _works(node, traced.facts) or (working and op_name(node) != "mul"):
            rows = _rows(traced.facts.get(before), traced.facts.get(name))
            mixes = bool(working) or _mixes(node, traced.facts, rows)
            yield _Step(index, node, False, mixes, _depthwise(node, traced.facts), _dilated(node), name)


def _works(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    """Whether the node has weights that it multiplies with, or is opaque."""
    known = facts.get(node.name)
    return known is not None and known.macs > 0


def _rows(*known: NodeFacts | None) -> int:
    """Positions in the batch: rows of a linear layer that leaves the positions alone."""
    found = [prod(f.shape) // f.shape[f.channel_axis] for f in known if f is not None and f.channel_axis is not None]
    return found[-1] if found else 0


def _mixes(node: fx.Node, facts: Mapping[str, NodeFacts], rows: int) -> bool:
    """Whether the node lets positions see one another."""
    name, known = op_name(node), facts.get(node.name)
    if name in _POOLS:
        return True
    if known is None or not known.macs:
        return False
    if name in ("conv", "conv_transpose"):
        return prod(_kernel(node, facts)) > 1
    if name == "linear":
        return bool(rows) and prod(known.shape[:-1]) != rows
    return True


def _weight(node: fx.Node, facts: Mapping[str, NodeFacts]) -> tuple[int, ...]:
    if node.op == "call_module" and node.graph.owning_module is not None:
        weight = getattr(attribute(node.graph.owning_module, str(node.target)), "weight", None)
        return tuple(weight.shape) if weight is not None else ()
    given = [n for n in tensor_nodes((node.args, node.kwargs))[1:2] if n.name in facts]
    return facts[given[0].name].shape if given else ()


def _kernel(node: fx.Node, facts: Mapping[str, NodeFacts]) -> tuple[int, ...]:
    return _weight(node, facts)[2:]


def _depthwise(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    weight = _weight(node, facts)
    return op_name(node) == "conv" and len(weight) > 2 and weight[1] == 1 and weight[0] > 1 and prod(weight[2:]) > 1


def _dilated(node: fx.Node) -> bool:
    if op_name(node) != "conv":
        return False
    if node.op == "call_module" and node.graph.owning_module is not None:
        dilation = getattr(attribute(node.graph.owning_module, str(node.target)), "dilation", 1)
    else:
        dilation = node.kwargs.get("dilation", node.args[5] if len(node.args) > 5 else 1)
    return max(dilation if isinstance(dilation, (tuple, list)) else (dilation,)) > 1


def _is_norm(node: fx.Node) -> bool:
    return "norm" in op_name(node)


def _next(name: str, flow: Flow) -> str | None:
    """The one node that reads this tensor; None at a fork or at the end."""
    readers = flow.readers.get(name, ())
    return readers[0] if len(readers) == 1 else None


def _is_post_norm(steps: list[_Step], flow: Flow, nodes: Mapping[str, fx.Node]) -> bool:
    """Whether sums are normed before anybody else reads them, and the norm's result is what all read."""
    readers = [_next(step.node.name, flow) for step in steps if step.joins]
    normed = [r for r in readers if r is not None and _is_norm(nodes[r]) and len(flow.readers[r]) > 1]
    return 2 * len(normed) > len(readers)


def _pools_every_unit(steps: list[_Step], flow: Flow, nodes: Mapping[str, fx.Node]) -> bool:
    units = [step for step in steps if step.mixes]
    if len(units) < 2 or any(step.joins for step in steps):
        return False
    ends = [following.index for following in steps if following.index > units[0].index] + [len(flow.trunk)]
    for unit in units:
        stop = next(end for end in ends if end > unit.index)
        between = [name for name in flow.trunk[unit.index + 1 : stop] if op_name(nodes[name]) in _POOLS]
        if not any(name in flow.octaves for name in between):
            return False
    return True


def _block(step: _Step, traced: TracedModel, flow: Flow, nodes: Mapping[str, fx.Node], *, post_norm: bool, pooled: bool) -> Block:
    """Follow the chain behind a step to the block's output."""
    start = step.node.name
    shape, level = traced.facts[start].shape, flow.octaves[start]
    output, last, before_activation, moved = start, start, None, False
    for name in flow.trunk[step.index + 1 :]:
        node, known = nodes[name], traced.facts.get(name)
        operation = op_name(node)
        if known is None or known.macs or (len(flow.inputs[name]) > 1 and _region_works(flow, last, name)):
            break
        if _is_norm(node) and step.joins and not post_norm:
            break
        if operation in _POOLS:
            if name not in flow.octaves or (abs(flow.octaves[name] - level) > _SAME_LEVEL and not (pooled and not moved)):
                break
            moved = moved or abs(flow.octaves[name] - level) > _SAME_LEVEL
            shape, output = known.shape, name
        elif known.shape == shape and operation not in _NOTHING:
            if operation in _ACTIVATIONS and before_activation is None:
                before_activation = output
            output = name
        last = name
    return Block(
        output=output,
        sum=start,
        pre_activation=before_activation or output,
        last_conv=step.last_conv,
        joins=step.joins,
        pooled=moved,
        dilated=step.dilated,
        octaves=flow.octaves.get(output, level),
        depth=flow.depth[start],
    )


def _region_works(flow: Flow, before: str, name: str) -> bool:
    """Whether the branches that meet at `name` cost anything: else they are an activation written out (x * sigmoid(x))."""
    others = max((flow.depth[source] for source in flow.inputs[name]), default=0.0)
    return others > flow.depth[before]
