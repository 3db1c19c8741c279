"""The layers of a network: the nodes of the main path at which work is done, and what kind of work it is.

A *merge* adds or concatenates branches with work in them: a residual sum, an inception or dense concatenation. A *unit* has weights of
its own: a convolution, a linear layer, an opaque module. Both either *mix* (positions see one another) or are pointwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Literal

from torch import fx

from indistill_fx.graph.edit import tensor_nodes
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.structure.dominators import Flow
from indistill_fx.traced import TracedModel

STRIDED_POOLS = frozenset(("max_pool", "avg_pool", "lp_pool"))
POOLS = STRIDED_POOLS | {"adaptive_avg_pool", "adaptive_max_pool"}
_FOURIER = frozenset(
    f"fft_{inverse}{real}fft{axes}" for inverse in ("", "i") for real in ("", "r", "h") for axes in ("", "2", "n")
)
_MERGES = frozenset(("add", "sub", "cat", "stack", "sum"))
_FREE = POOLS | _FOURIER
"""Operations that mix positions without weights."""
Form = Literal["merge", "separable", "unit"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A node of the main path with work in it or in its region.

    Attributes:
        place: in the main path.
        form: a merge, a depthwise convolution, any other unit.
        mixes: positions see one another.
        bare: all its work is depthwise: a pointwise unit after it completes it.
        concatenates: it is a concatenation, which a pointwise unit after it fuses.
        dilation: the largest of its convolutions.
        last_conv: its last convolution or linear layer.
        width: its channels; 0 where it has none.
        is_sum: its node is a merge.
    """

    place: int
    form: Form
    mixes: bool
    bare: bool
    concatenates: bool
    dilation: int
    last_conv: str
    width: int
    is_sum: bool


class Look:
    """Questions about the nodes of one traced model.

    Args:
        traced: the model.
        flow: its information flow.
        flat: take all layers for mixing, as where the input has no positions.
    """

    def __init__(self, traced: TracedModel, flow: Flow, *, flat: bool = False):
        self.traced, self.flow, self.facts = traced, flow, traced.facts
        self.nodes = {node.name: node for node in traced.graph_module.graph.nodes}
        self.flat = flat or not traced.facts[flow.main_path[0]].space

    def operation(self, name: str) -> str:
        """The operation of a node."""
        return op_name(self.nodes[name])

    def works(self, name: str) -> bool:
        """Whether the node multiplies with weights, or is opaque."""
        return name in self.facts and self.facts[name].macs > 0

    def is_busy(self, name: str) -> bool:
        """Whether the branches that meet at a node contain work or mix positions; otherwise they are an activation in single operations."""
        return any(self.works(other) or self.operation(other) in _FREE for other in self.flow.regions[name])

    def is_picture(self, name: str) -> bool:
        """Whether the tensor is a map in the proportions of the input: neither tokens nor windows. Tokens of whole samples count too."""
        known, batch = self.facts[name], self.facts[self.flow.main_path[0]]
        if known.kind == "tokens":
            return known.batch_axis is not None and known.shape[known.batch_axis] == batch.shape[batch.batch_axis or 0]
        return known.kind == "map" and known.stride is not None and max(known.stride) < 1.2 * min(known.stride)

    def layers(self) -> Iterator[Layer]:
        """The nodes of the main path with work in them or in their region, in order."""
        for place, (before, name) in enumerate(pairwise(self.flow.main_path), 1):
            if name not in self.facts:
                continue
            working = [other for other in self.flow.regions[name] if self.works(other)]
            rows = self._rows(before) or self._rows(name)
            merges = self.operation(name) in _MERGES and self.is_busy(name)
            if not merges and not self.works(name) and (not working or self.operation(name) == "mul"):
                continue  # no work happens here, or a gate begins and ends
            doing = working if merges else [name]
            last = self._channels_are_last(before)
            mixing = any(self._mixes(other, rows, last) for other in (*self.flow.regions[name], name)) or (
                bool(working) and not merges
            )
            bare = bool(doing) and all(map(self._is_depthwise, doing))
            yield Layer(
                place=place,
                form="merge" if merges else "separable" if bare else "unit",
                mixes=self.flat or mixing,
                bare=bare,
                concatenates=merges and self.operation(name) == "cat",
                dilation=max(map(self._dilation, doing), default=1),
                last_conv=self._last_of_main_branch(name) if merges else name,
                width=self.facts[name].channels if self.facts[name].channel_axis is not None else 0,
                is_sum=merges,
            )

    def _rows(self, name: str) -> int:
        """Positions in the batch: the rows of a linear layer that leaves positions alone."""
        known = self.facts.get(name)
        return 0 if known is None or known.channel_axis is None else prod(known.shape) // max(1, known.channels)

    def _channels_are_last(self, name: str) -> bool:
        known = self.facts.get(name)
        return known is not None and known.channel_axis == len(known.shape) - 1

    def _mixes(self, name: str, rows: int, channels_last: bool) -> bool:
        """Whether positions see one another; there may be as many of them as channels, which came on the last axis or not."""
        operation = self.operation(name)
        if operation in _FREE:
            return True
        if not self.works(name):
            return False
        if operation in ("conv", "conv_transpose"):
            source = self.facts.get(next(iter(self.flow.inputs[name]), ""))
            positions_as_channels = source is not None and source.channel_axis not in (None, 1)
            return positions_as_channels or prod(self._weight(name)[2:]) > 1
        if operation == "linear":
            turned = channels_last and not self._channels_are_last(next(iter(self.flow.inputs[name]), name))
            return rows > 0 and (turned or prod(self.facts[name].shape[:-1]) != rows)
        return True

    def _last_of_main_branch(self, merge: str) -> str:
        """The last node with work in the branch that does most of it: not in the shortcut."""
        best = (0, merge)
        for end in self.flow.inputs[merge]:
            branch, needed = list[str](), {end}
            for name in reversed(self.flow.regions[merge]):
                if name in needed:
                    needed.update(self.flow.inputs[name])
                    branch += [name] if self.works(name) else []
            if branch:
                best = max(best, (sum(self.facts[name].macs for name in branch), branch[0]))
        return best[1]

    def _weight(self, name: str) -> Sequence[int]:
        """Shape of a convolution's weight."""
        node = self.nodes[name]
        if node.op == "call_module":
            return tuple(attribute(_owner(node), str(node.target)).weight.shape)
        given = [other for other in tensor_nodes((node.args, node.kwargs))[1:2] if other.name in self.facts]
        return self.facts[given[0].name].shape if given else ()

    def _is_depthwise(self, name: str) -> bool:
        weight = self._weight(name) if self.operation(name) == "conv" else ()
        return len(weight) > 2 and weight[0] > weight[1] == 1

    def _dilation(self, name: str) -> int:
        node = self.nodes[name]
        if self.operation(name) != "conv":
            return 1
        if node.op == "call_module":
            dilation = attribute(_owner(node), str(node.target)).dilation
        else:
            dilation = node.kwargs.get("dilation", node.args[5] if len(node.args) > 5 else 1)
        return max(n for n in (dilation if isinstance(dilation, (tuple, list)) else (dilation,)) if isinstance(n, int))


def _owner(node: fx.Node) -> fx.GraphModule:
    owner = node.graph.owning_module
    assert owner is not None
    return owner
