"""A smaller network while it is being written: the old graph, what stays of it, and the new graph's nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from indistill_fx.graph.computed_weights import left_behind
from indistill_fx.graph.copying import deep_copy
from indistill_fx.graph.edit import MADE, add_tensor
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.channels.call import Call, index_select
from indistill_fx.passes.channels.selection import Cut, sliced
from indistill_fx.passes.pruning.dependencies import Coupling, Units


class Rewriting:
    """One network being written: the old graph, what stays, and the new graph's nodes by name."""

    def __init__(self, old: fx.GraphModule, found: Coupling, stays: Callable[[Units], NDArray[np.bool_]]):
        self.old, self.found, self.facts = old, found, found.facts
        self.keep = {place: kept for place, units in found.axes.items() if (kept := _kept(stays(units))) is not None}
        self.weights = {key: kept for key, units in found.weights.items() if (kept := _kept(stays(units))) is not None}
        self.chosen = {key: kept for key, units in found.chosen.items() if (kept := _kept(stays(units))) is not None}
        axes: dict[int, dict[int, NDArray[np.int64]]] = {}
        for (tensor, axis), kept in self.weights.items():
            axes.setdefault(tensor, {})[axis] = kept
        memo: dict[int, Any] = left_behind(old)
        memo |= {t: _sliced_parameter(found.tensors[t], tensor_axes) for t, tensor_axes in axes.items()}
        self.new = deep_copy(old, memo)
        self.nodes = {node.name: node for node in self.new.graph.nodes}
        self.selections: dict[str, tuple[str, int, int]] = {}
        """New nodes that take the entries left of an axis: name -> the tensor, the axis, how many entries."""
        self.done: set[str] = set()

    def kept(self, node: Any, axis: int) -> NDArray[np.int64] | None:
        """The entries of an axis that stay; None if all stay."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights.get((id(attribute(self.old, str(node.target))), axis))
        return self.keep.get((node.name, axis)) if isinstance(node, fx.Node) else None

    def size(self, node: fx.Node, axis: int) -> int:
        """The new size of an axis."""
        kept = self.kept(node, axis)
        return self.facts[node.name].shape[axis] if kept is None else len(kept)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The new shape of a tensor."""
        return tuple(self.size(node, axis) for axis in range(len(self.facts[node.name].shape)))

    def groups(self, call: Call) -> int:
        """The groups of a group norm that stay."""
        groups, kept = int(call.get("num_groups")), self.kept(call.input, 1)
        return groups if kept is None else len(np.unique(kept // (self.facts[call.input.name].shape[1] // groups)))

    def touched(self, node: fx.Node) -> bool:
        """Whether the tensor loses anything."""
        known = self.facts.get(node.name)
        return known is not None and any(self.kept(node, axis) is not None for axis in range(len(known.shape)))


def take_place(work: Rewriting, old: fx.Node, new: fx.Node) -> None:
    """Let a node of the new graph stand for another one, under its name."""
    old.replace_all_uses_with(new)
    new.meta.update({key: value for key, value in old.meta.items() if key == "nn_module_stack"})
    work.new.graph.erase_node(old)
    new.name = old.name
    work.nodes[old.name] = new


def reordered(work: Rewriting, order: Cut, node: fx.Node) -> fx.Node:
    """Write, before a node whose entries are those of another one in this order, these in that order, as far as they stay."""
    axis = order.start
    kept, kept_here = work.kept(order.node, axis), work.kept(node, axis)
    places = {int(k): j for j, k in enumerate(range(len(order.index)) if kept is None else kept)}
    entries = [order.index[k] for k in (range(len(order.index)) if kept_here is None else kept_here.tolist())]
    with work.new.graph.inserting_before(work.nodes[node.name]):
        source, chosen = work.nodes[order.node.name], tuple(places[k] for k in entries)
        return index_select(Inserter(work.new), source, axis, axis + 1, chosen)  # type: ignore[arg-type]


def take_chosen(work: Rewriting) -> None:
    """Let each reader of a tensor that nothing makes take the entries that stay for it (see `Coupling.chosen`)."""
    for (reader, source, axis), kept in work.chosen.items():
        with work.new.graph.inserting_before(work.nodes[reader]):
            entries = tuple(kept.tolist())
            chosen = index_select(Inserter(work.new), work.nodes[source], axis, axis + 1, entries)  # type: ignore[arg-type]
        work.nodes[reader].replace_input_with(work.nodes[source], chosen)
        work.selections[chosen.name] = source, axis, len(kept)


def _kept(stays: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    return None if stays.all() else np.flatnonzero(stays)


def _sliced_parameter(tensor: Tensor, axes: Mapping[int, NDArray[np.int64]]) -> Tensor:
    new = tensor
    for axis, kept in axes.items():
        new = sliced(new, axis, kept)
    return nn.Parameter(new.detach(), requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


class Inserter:
    """Puts nodes where the graph's cursor stands: the part of `Emitter` that indexing needs."""

    def __init__(self, graph_module: fx.GraphModule):
        self.graph_module = graph_module

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function."""
        return self.graph_module.graph.call_function(target, args, kwargs)

    def tensor(self, wanted: str, tensor: Tensor) -> fx.Node:
        """A new parameter or buffer."""
        node = self.graph_module.graph.get_attr(add_tensor(self.graph_module, wanted, tensor))
        node.meta[MADE] = True
        return node
