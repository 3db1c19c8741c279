"""Write the smaller network: slice every weight, and rewrite the arguments that name sizes.

The result owns all its parameters and buffers, and its modules stand under the names they had.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from indistill_fx.graph.attention import HeadAttention, window_attention
from indistill_fx.graph.edit import add_tensor
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.channels.attention import free_heads, linear
from indistill_fx.passes.channels.call import Call, axis_of, index_select, read_call
from indistill_fx.passes.channels.joining import index_by, split_begins, taken
from indistill_fx.passes.channels.selection import Cut, sliced
from indistill_fx.passes.pruning.dependencies import Coupling, Units
from indistill_fx.passes.pruning.dependency_rules import shape_lender
from indistill_fx.traced import NodeFacts

Keep = Mapping[tuple[str, int | str], NDArray[np.int64]]
"""The entries that stay, per node and axis; axes that stay whole have no entry."""


class Rewriting:
    """One network being written: the old graph, what stays, and the new graph's nodes by name."""

    def __init__(self, old: fx.GraphModule, found: Coupling, stays: Callable[[Units], NDArray[np.bool_]]):
        self.old, self.found, self.facts = old, found, found.facts
        self.keep = {place: kept for place, units in found.axes.items() if (kept := _kept(stays(units))) is not None}
        self.weights = {key: kept for key, units in found.weights.items() if (kept := _kept(stays(units))) is not None}
        axes: dict[int, dict[int, NDArray[np.int64]]] = {}
        for (tensor, axis), kept in self.weights.items():
            axes.setdefault(tensor, {})[axis] = kept
        memo: dict[int, Any] = {t: _sliced_parameter(found.tensors[t], own) for t, own in axes.items()}
        self.new = copy.deepcopy(old, memo)
        self.nodes = {node.name: node for node in self.new.graph.nodes}
        self.done: set[str] = set()

    def kept(self, node: Any, axis: int) -> NDArray[np.int64] | None:
        """The entries that stay of an axis; None if all."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights.get((id(attribute(self.old, str(node.target))), axis))
        return self.keep.get((node.name, axis)) if isinstance(node, fx.Node) else None

    def size(self, node: fx.Node, axis: int) -> int:
        """The new size of an axis."""
        kept = self.kept(node, axis)
        return self.facts[node.name].shape[axis] if kept is None else len(kept)

    def touched(self, node: fx.Node) -> bool:
        """Whether the tensor loses anything."""
        known = self.facts.get(node.name)
        return known is not None and any(self.kept(node, axis) is not None for axis in range(len(known.shape)))


def rewrite(old: fx.GraphModule, found: Coupling, stays: Callable[[Units], NDArray[np.bool_]]) -> Rewriting:
    """The smaller network, and what stays where."""
    work = Rewriting(old, found, stays)
    for node in old.graph.nodes:
        if node.name in found.shuffles:
            _write_shuffle(work, node, found.shuffles[node.name])
            continue
        if not node.op.startswith("call") or node.name in found.vanished:
            continue
        call = read_call(node, work.facts)
        if call.module is not None:
            _resize_module(work, call)
        fix = FIXES.get(call.op)
        if fix is not None:
            fix(work, call, work.nodes[node.name])
    for name in reversed(list(work.nodes)):
        if name in found.vanished and not work.nodes[name].users:
            work.new.graph.erase_node(work.nodes.pop(name))
    work.new.graph.lint()
    work.new.recompile()
    return work


def _write_shuffle(work: Rewriting, node: fx.Node, order: Cut) -> None:
    """A permutation of channels, of those that are left."""
    axis, source = order.start, work.nodes[order.node.name]
    kept, own = work.kept(order.node, axis), work.kept(node, axis)
    places = {int(k): j for j, k in enumerate(range(len(order.index)) if kept is None else kept)}
    entries = [order.index[k] for k in (range(len(order.index)) if own is None else own.tolist())]
    new, old = _Inserter(work.new), work.nodes[node.name]
    with work.new.graph.inserting_before(old):
        chosen = index_select(new, source, axis, axis + 1, tuple(places[k] for k in entries))  # type: ignore[arg-type]
    _take_place(work, old, chosen)


def _take_place(work: Rewriting, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    new.meta.update({key: value for key, value in old.meta.items() if key == "nn_module_stack"})
    work.new.graph.erase_node(old)
    new.name = old.name
    work.nodes[old.name] = new


def _kept(stays: NDArray[np.bool_]) -> NDArray[np.int64] | None:
    return None if stays.all() else np.flatnonzero(stays)


def _sliced_parameter(tensor: Tensor, axes: Mapping[int, NDArray[np.int64]]) -> Tensor:
    new = tensor
    for axis, kept in axes.items():
        new = sliced(new, axis, kept.tolist())
    return nn.Parameter(new.detach(), requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


_SIZES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "linear": lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]},
    "embedding": lambda m: {"embedding_dim": m.weight.shape[1]},
    "prelu": lambda m: {"num_parameters": m.weight.numel()},
    "layer_norm": lambda m: {"normalized_shape": tuple(m.weight.shape)} if m.weight is not None else {},
}
"""Attributes of a module that tell the sizes of its weights."""


def _resize_module(work: Rewriting, call: Call) -> None:
    """Attributes that follow from the sliced weights."""
    module: Any = work.new.get_submodule(str(call.node.target))
    if call.op in ("multihead_attention", "head_attention"):
        _replace_attention(work, call)
        return
    channels = (
        work.size(call.node, 1) if call.node.name in work.facts and len(work.facts[call.node.name].shape) > 1 else 0
    )
    if call.op in ("conv", "conv_transpose"):
        before = (call.shape(call.input) or (0, 0))[1]
        module.in_channels, module.out_channels = work.size(call.input, 1), channels
        module.groups = module.in_channels if call.get("groups") == before and before > 1 else module.groups
    elif call.op in ("batch_norm", "instance_norm"):
        module.num_features = channels
    elif call.op == "group_norm":
        module.num_channels = channels
    elif call.op == "layer_norm" and module.weight is None:
        axes = len(module.normalized_shape)
        rank = len(work.facts[call.node.name].shape)
        module.normalized_shape = tuple(work.size(call.node, axis) for axis in range(rank - axes, rank))
    elif call.op in _SIZES:
        for name, value in _SIZES[call.op](module).items():
            setattr(module, name, value)


def _replace_attention(work: Rewriting, call: Call) -> None:
    """Attention whose widths are no longer tied, on copies of the weights."""
    old, path = call.module, call.path
    free = free_heads(old) if isinstance(old, (nn.MultiheadAttention, HeadAttention)) else None
    names = ("query", "key", "value")
    keep = {name: work.keep.get((path, name)) for name in ("heads", "out", *(f"{n} columns" for n in names))}
    if free is None or all(kept is None for kept in keep.values()) or path in work.done:
        return
    work.done.add(path)
    count = free.heads if keep["heads"] is None else len(keep["heads"])
    width = free.head_dim
    rows = None if keep["heads"] is None else (keep["heads"][:, None] * width + np.arange(width)).reshape(-1)
    query, key, value = (_cut_linear(getattr(free, name), rows, keep[f"{name} columns"]) for name in names)
    out = _cut_linear(free.out, keep["out"], rows)
    new = HeadAttention(query, key, value, out, heads=count, dropout=free.dropout, batch_first=free.batch_first)
    work.new.set_submodule(path, new.train(free.training))


def _cut_linear(layer: nn.Linear, rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None) -> nn.Linear:
    weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    for axis, kept in ((0, rows), (1, columns)):
        weight = weight if kept is None else sliced(weight, axis, kept.tolist())
    if bias is not None and rows is not None:
        bias = sliced(bias, 0, rows.tolist())
    flag = layer.weight.requires_grad
    return linear(weight.requires_grad_(flag), None if bias is None else bias.requires_grad_(flag))


def _set(node: fx.Node, call: Call, name: str, value: Any) -> None:
    place = call.places.get(name)
    if isinstance(place, int):
        node.args = (*node.args[:place], value, *node.args[place + 1 :])
    elif place is not None:
        node.kwargs = {**node.kwargs, place: value}


def _fix_conv(work: Rewriting, call: Call, node: fx.Node) -> None:
    before = (call.shape(call.input) or (0, 0))[1]
    if call.module is None and call.get("groups") == before and before > 1:
        _set(node, call, "groups", work.size(call.input, 1))


def _fix_layer_norm(work: Rewriting, call: Call, node: fx.Node) -> None:
    shape = call.get("normalized_shape")
    if call.module is None and isinstance(shape, (tuple, list)) and work.touched(call.node):
        rank = len(work.facts[call.node.name].shape)
        _set(
            node, call, "normalized_shape", tuple(work.size(call.node, axis) for axis in range(rank - len(shape), rank))
        )


def _fix_sizes(work: Rewriting, call: Call, node: fx.Node) -> None:
    """View, reshape, expand: the sizes of axes that lost channels."""
    given = call.arguments.get("shape")
    if not work.touched(call.node) or not isinstance(given, tuple) or shape_lender(call) is not None:
        return  # of `reshape_as`, the tensor that lends the shape has lost the same
    sizes: list[Any] = list(node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])
    rank = len(work.facts[call.node.name].shape)
    if len(sizes) == 1 < rank:  # a computed tuple of sizes
        with work.new.graph.inserting_before(node):
            sizes = [work.new.graph.call_function(operator.getitem, (sizes[0], k)) for k in range(rank)]
    shift = rank - len(sizes)
    sizes = [
        n if n == -1 or work.kept(call.node, k + shift) is None else work.size(call.node, k + shift)
        for k, n in enumerate(sizes)
    ]
    node.args = (node.args[0], *sizes) if node.op == "call_method" else (node.args[0], tuple(sizes))


def _fix_unflatten(work: Rewriting, call: Call, node: fx.Node) -> None:
    sizes, dim = call.get("sizes", call.get("unflattened_size")), call.get("dim")
    if not work.touched(call.node) or not isinstance(sizes, (tuple, list)) or not isinstance(dim, int):
        return
    first = axis_of(dim, len(call.shape(call.input) or ()))
    new = tuple(
        work.size(call.node, first + k) if n != -1 and work.kept(call.node, first + k) is not None else n
        for k, n in enumerate(sizes)
    )
    new = fx.map_arg(new, lambda n: work.nodes[n.name])  # sizes may be computed, by nodes of the old graph
    if call.module is not None:
        work.new.get_submodule(str(call.node.target)).unflattened_size = new  # type: ignore[assignment]
    else:
        _set(node, call, "sizes", new)


def _fix_split(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Chunks and splits along channels: the sizes that are left of each part."""
    shape, dim = call.shape(call.input), call.get("dim", 0)
    if shape is None or not isinstance(dim, int):
        return
    dim = axis_of(dim, len(shape))
    kept = work.kept(call.input, dim)
    if kept is None:
        return
    part = next((user.name for user in call.node.users if user.name in work.facts), None)
    own = shape[dim] if part is None else work.facts[part].shape[dim]
    begins = [*split_begins(call, shape[dim], own), shape[dim]]
    sizes = [int(((kept >= low) & (kept < high)).sum()) for low, high in pairwise(begins)]
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], sizes), {"dim": dim}


def _fix_slice(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Slices of channels: those of the kept ones that were taken, then the rest of the key."""
    parsed = taken(call)
    if parsed is None:
        return
    key, entries = parsed
    kept = {axis: work.kept(call.input, axis) for axis in entries}
    key = fx.map_arg(key, lambda n: work.nodes[n.name])
    if all(k is None for k in kept.values()):
        return
    places = {axis: {int(k): j for j, k in enumerate(own)} for axis, own in kept.items() if own is not None}
    left = {
        axis: tuple(places[axis][k] for k in own if k in places[axis]) if axis in places else own
        for axis, own in entries.items()
    }
    with work.new.graph.inserting_before(node):
        new = index_by(_Inserter(work.new), node.args[0], key, left)  # type: ignore[arg-type]
    _take_place(work, node, new)


class _Inserter:
    """Puts nodes where the graph's cursor stands: the part of `Emitter` that indexing needs."""

    def __init__(self, graph_module: fx.GraphModule):
        self.graph_module = graph_module

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function."""
        return self.graph_module.graph.call_function(target, args, kwargs)

    def tensor(self, wanted: str, tensor: Tensor) -> fx.Node:
        """A new parameter or buffer."""
        return self.graph_module.graph.get_attr(add_tensor(self.graph_module, wanted, tensor))


def _fix_pad(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Padding of channels: by what is left of the padded ones."""
    sizes, rank = call.get("pad", call.get("padding")), len(work.facts[call.node.name].shape)
    if call.module is not None or not isinstance(sizes, (tuple, list)) or not work.touched(call.node):
        return
    new = list(sizes)
    for k in range(len(sizes) // 2):
        axis = rank - 1 - k
        kept = work.kept(call.node, axis)
        if kept is not None and (sizes[2 * k] or sizes[2 * k + 1]):
            size = (call.shape(call.input) or ())[axis]
            new[2 * k], new[2 * k + 1] = int((kept < sizes[2 * k]).sum()), int((kept >= sizes[2 * k] + size).sum())
    if new != list(sizes):
        _set(node, call, "pad", tuple(new))


def _fix_size(work: Rewriting, call: Call, node: fx.Node) -> None:
    """A number of channels read off a tensor stays the original's: it may be a scale, and sizes are rewritten where they are used."""
    dim = call.get("dim", call.arguments.get("argument_1"))
    if isinstance(dim, int) and work.touched(call.input):
        axis = axis_of(dim, len(call.shape(call.input) or ()))
        if work.kept(call.input, axis) is not None:
            _pin(node, (call.shape(call.input) or ())[axis])


def _fix_getitem(work: Rewriting, call: Call, node: fx.Node) -> None:
    maker = call.input
    if maker.name in work.facts:
        _fix_slice(work, call, node)
        return
    if (
        maker.op in ("call_method", "call_function")
        and call.node.name not in work.facts
        and isinstance(call.get("key"), int)
    ):
        source = read_call(maker, work.facts)
        whole = (
            (source.op == "size" and len(maker.args) == 1)
            or source.op == "shape"
            or (source.op == "getattr" and maker.args[1] == "shape")
        )
        if whole and isinstance(maker.args[0], fx.Node) and maker.args[0].name in work.facts:
            shape = work.facts[maker.args[0].name].shape
            axis = axis_of(call.get("key"), len(shape))
            if work.kept(maker.args[0], axis) is not None:
                _pin(node, shape[axis])


def _pin(node: fx.Node, value: int) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = fx.map_arg(user.kwargs, lambda n: value if n is node else n)


def _fix_windows(work: Rewriting, call: Call, node: fx.Node) -> None:
    known = work.facts[call.node.name]
    heads = work.keep.get((call.node.name, "heads"))
    if heads is None and not work.touched(call.node) and work.kept(call.input, len(known.shape) - 1) is None:
        return
    node.target = window_attention
    if heads is not None:
        _set(node, call, "num_heads", len(heads))


FIXES: dict[str, Callable[[Rewriting, Call, fx.Node], None]] = {
    "conv": _fix_conv,
    "conv_transpose": _fix_conv,
    "layer_norm": _fix_layer_norm,
    **dict.fromkeys(("view", "reshape", "expand"), _fix_sizes),
    "unflatten": _fix_unflatten,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _fix_split),
    **dict.fromkeys(("narrow", "slice", "index_select", "select"), _fix_slice),
    "getitem": _fix_getitem,
    **dict.fromkeys(("pad", "constant_pad_nd"), _fix_pad),
    "size": _fix_size,
    **dict.fromkeys(("shifted_window_attention", "window_attention"), _fix_windows),
}
"""Operation -> how its arguments follow the channels that are left."""


def new_facts(work: Rewriting, macs: Mapping[str, int]) -> dict[str, NodeFacts]:
    """Facts of the smaller network, from those of the whole."""
    found = {}
    for name, known in work.facts.items():
        node = work.nodes.get(name)
        if node is None:
            continue
        shape = tuple(
            n if (kept := work.keep.get((name, axis))) is None else len(kept) for axis, n in enumerate(known.shape)
        )
        if node.op == "get_attr":
            shape = tuple(attribute(work.new, str(node.target)).shape)
        found[name] = replace(
            known, shape=shape, macs=macs.get(name, known.macs), parameters=_parameters(work.new, node)
        )
    return found


def _parameters(root: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in root.get_submodule(str(node.target)).parameters())
    value = attribute(root, str(node.target)) if node.op == "get_attr" else None
    return value.numel() if isinstance(value, nn.Parameter) else 0
