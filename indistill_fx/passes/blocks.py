"""The blocks of a network, found in its dataflow: no name, class or container of a module is looked at.

Rules, in order:
  1. A *join* is a node of the trunk that adds or concatenates branches with work in them: a residual sum, an inception or dense
     concatenation. A *unit* is a node with weights of its own: a convolution, a linear layer, an opaque module.
  2. A block mixes positions, then transforms them. A join or unit that mixes opens a block; a pointwise join after a join (the MLP
     after the attention) and a pointwise unit after a depthwise one (a separable convolution) belong to the block before them. Other
     pointwise units (the expansion before a head, a transition) belong to none. Where the input has no positions, every unit mixes.
  3. The block's output is the last tensor of the chain behind it: through activations, channel shuffles, norms of units, pooling of
     stride one. Not through the norm after a sum, which opens the next block, unless the network norms each sum before anybody else
     reads it (post-norm). Dropout and identity make no tensor of their own.
  4. In a plain chain whose every unit is followed by pooling, the pooling closes the block.
  5. The main output itself is no block: losses on logits deal with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Literal

from torch import fx

from indistill_fx.graphs import tensor_nodes
from indistill_fx.ops import UNARY, attribute, op_name
from indistill_fx.passes.flow import SAME_LEVEL, Flow
from indistill_fx.traced import TracedModel

IDLE = frozenset(
    (
        "dropout",
        "alpha_dropout",
        "identity",
        "clone",
        "contiguous",
        "detach",
        "stochastic_depth",
        "drop_path",
        "to",
        "float",
        "half",
    )
)
"""Operations that leave the values as they are, when the model is evaluated."""

_JOINS = frozenset(("add", "sub", "cat", "stack", "sum"))
_STRIDED_POOLS = frozenset(("max_pool", "avg_pool", "lp_pool"))
_POOLS = _STRIDED_POOLS | {"adaptive_avg_pool", "adaptive_max_pool"}
_ACTIVATIONS = UNARY - IDLE
Form = Literal["join", "separable", "unit"]


@dataclass(frozen=True, slots=True)
class Block:
    """One block, known by its end.

    Attributes:
        output: the tensor that the next block reads.
        pre_activation: the tensor that the block's last activation reads; `output` where none follows.
        last_conv: the last convolution or linear layer before `output`.
        start: the result of the block's last operation with work in it, or the join.
        form: what the block ends with: a join, a depthwise convolution (with the pointwise one that completes it), any other unit.
        pooled: whether the block ends with a pooling of its own.
        dilated: whether a convolution in it is dilated.
        octaves: halvings of the output's sides since the input.
        depth: share of the network's MACs spent up to the output.
    """

    output: str
    pre_activation: str
    last_conv: str
    start: str
    form: Form
    pooled: bool
    dilated: bool
    octaves: float
    depth: float


@dataclass(frozen=True, slots=True)
class _Step:
    """A node of the trunk with work in it or in its region."""

    place: int
    form: Form
    mixes: bool
    dilated: bool
    last_conv: str
    open: bool = True


def find_blocks(traced: TracedModel, flow: Flow) -> tuple[Block, ...]:
    """The blocks on the trunk, in order.

    Args:
        traced: the model.
        flow: its information flow.

    Returns:
        The blocks.
    """
    look = _Look(traced, flow)
    closing: list[_Step] = []
    steps = list(look.steps())
    for step in steps:
        if step.mixes:
            closing.append(step)
        elif (
            closing and closing[-1].open and (closing[-1].form, step.form) in (("join", "join"), ("separable", "unit"))
        ):
            closing[-1] = replace(closing[-1], place=step.place, last_conv=step.last_conv, open=False)
    if any(step.form == "join" for step in closing):
        post_norm, pooled = look.norms_sums([step for step in steps if step.form == "join"][:-1]), False
    else:
        post_norm, pooled = False, look.pools_every([step.place for step in closing])
    found = [look.block(step, post_norm=post_norm, pooled=pooled) for step in closing]
    last = flow.trunk[-1]
    return tuple(b for b in found if b is not None and (len(flow.ends) > 1 or last not in (b.start, b.output)))


class _Look:
    """Questions about one traced model."""

    def __init__(self, traced: TracedModel, flow: Flow):
        self.flow, self.facts = flow, traced.facts
        self.nodes = {node.name: node for node in traced.graph_module.graph.nodes}
        self.flat = not traced.facts[flow.trunk[0]].space

    def steps(self) -> Iterator[_Step]:
        """The nodes of the trunk with work in them or in their region."""
        for place, (before, name) in enumerate(pairwise(self.flow.trunk), 1):
            if name not in self.facts:
                continue
            region = [self.nodes[other] for other in self.flow.regions[name]]
            working = [node for node in region if self._works(node)]
            node, rows = self.nodes[name], self._rows(before) or self._rows(name)
            if working and op_name(node) in _JOINS:
                mixes = self.flat or any(self._mixes(other, rows) for other in region)
                yield _Step(place, "join", mixes, any(map(_is_dilated, working)), self._last_of_main_branch(name))
            elif self._works(node) or (working and op_name(node) != "mul"):
                mixes = self.flat or bool(working) or self._mixes(node, rows)
                yield _Step(place, "separable" if self._is_depthwise(node) else "unit", mixes, _is_dilated(node), name)

    def _last_of_main_branch(self, join: str) -> str:
        """The last node with work in the branch that does most of it: not in the shortcut."""
        region = self.flow.regions[join]
        best: tuple[int, str] = (0, join)
        for end in self.flow.inputs[join]:
            branch, behind = [], {end}
            for name in reversed(region):
                if name in behind:
                    behind.update(self.flow.inputs[name])
                    branch += [name] if self._works(self.nodes[name]) else []
            if branch:
                best = max(best, (sum(self.facts[name].macs for name in branch), branch[0]))
        return best[1]

    def _works(self, node: fx.Node) -> bool:
        return node.name in self.facts and self.facts[node.name].macs > 0

    def _rows(self, name: str) -> int:
        """Positions in the batch: the rows of a linear layer that leaves positions alone."""
        known = self.facts.get(name)
        return 0 if known is None or known.channel_axis is None else prod(known.shape) // max(1, known.channels)

    def _mixes(self, node: fx.Node, rows: int) -> bool:
        """Whether the node lets positions see one another."""
        name = op_name(node)
        if name in _POOLS:
            return True
        if not self._works(node):
            return False
        if name in ("conv", "conv_transpose"):
            return prod(self._weight(node)[2:]) > 1
        if name == "linear":
            return rows > 0 and prod(self.facts[node.name].shape[:-1]) != rows
        return True

    def _weight(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a convolution's weight."""
        if node.op == "call_module" and node.graph.owning_module is not None:
            return tuple(attribute(node.graph.owning_module, str(node.target)).weight.shape)
        given = [other for other in tensor_nodes((node.args, node.kwargs))[1:2] if other.name in self.facts]
        return self.facts[given[0].name].shape if given else ()

    def _is_depthwise(self, node: fx.Node) -> bool:
        if op_name(node) != "conv":
            return False
        weight = self._weight(node)
        return len(weight) > 2 and weight[0] > weight[1] == 1 and prod(weight[2:]) > 1

    def norms_sums(self, joins: Sequence[_Step]) -> bool:
        """Whether most of these joins are normed before anybody else reads them, and the norm's result is what many read."""
        readers = [self.flow.readers.get(self.flow.trunk[step.place], ()) for step in joins]
        alone = [names[0] for names in readers if len(names) == 1]
        normed = [name for name in alone if "norm" in op_name(self.nodes[name]) and len(self.flow.readers[name]) > 1]
        return 2 * len(normed) > len(readers)

    def pools_every(self, places: Sequence[int]) -> bool:
        """Whether there are several units, and pooling that leaves a map behind each."""
        stops = [*places[1:], len(self.flow.trunk)]
        spans = [self.flow.trunk[a:b] for a, b in zip(places, stops, strict=True)]
        pools = [
            any(op_name(self.nodes[name]) in _STRIDED_POOLS and name in self.flow.octaves for name in span)
            for span in spans
        ]
        return len(pools) > 1 and all(pools)

    def block(self, step: _Step, *, post_norm: bool, pooled: bool) -> Block | None:
        """Follow the chain behind a step to the block's output; None where there are no positions left."""
        trunk, octaves = self.flow.trunk, self.flow.octaves
        start = trunk[step.place]
        if start not in octaves and not self.flat:
            return None
        level, shape, output, read, closed = octaves.get(start, 0.0), self.facts[start].shape, start, None, False
        norms_left = int(post_norm)
        for before, name in pairwise(trunk[step.place :]):
            operation = op_name(self.nodes[name])
            if not self._goes_on(before, name):
                break
            if "norm" in operation and step.form == "join":
                if not norms_left:
                    read = read or self._normed_before_activation(name)
                    break
                norms_left -= 1
            if operation in _POOLS:
                far = name not in octaves or abs(octaves[name] - level) > SAME_LEVEL
                if far and (not pooled or closed or name not in octaves):
                    break
                shape, output, closed = self.facts[name].shape, name, far or closed
            elif operation not in IDLE and (self.facts[name].shape, self.facts[name].kind) == (
                shape,
                self.facts[start].kind,
            ):
                read = read or (output if operation in _ACTIVATIONS else None)
                output = name
        return Block(
            output=output,
            pre_activation=read or output,
            last_conv=step.last_conv,
            start=start,
            form=step.form,
            pooled=closed,
            dilated=step.dilated,
            octaves=octaves.get(output, level),
            depth=self.flow.depth[start],
        )

    def _goes_on(self, before: str, name: str) -> bool:
        """Whether the chain goes on: no work in the node, and none in branches that meet there (x * sigmoid(x) has none)."""
        return name in self.facts and not any(self._works(self.nodes[n]) for n in (name, *self.flow.regions[name]))

    def _normed_before_activation(self, norm: str) -> str | None:
        readers = self.flow.readers.get(norm, ())
        return norm if len(readers) == 1 and op_name(self.nodes[readers[0]]) in _ACTIVATIONS else None


def _is_dilated(node: fx.Node) -> bool:
    if op_name(node) != "conv":
        return False
    if node.op == "call_module" and node.graph.owning_module is not None:
        dilation = attribute(node.graph.owning_module, str(node.target)).dilation
    else:
        dilation = node.kwargs.get("dilation", node.args[5] if len(node.args) > 5 else 1)
    return any(n > 1 for n in (dilation if isinstance(dilation, (tuple, list)) else (dilation,)))
