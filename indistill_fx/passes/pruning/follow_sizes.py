"""How the arguments of operations follow the channels that are left: sizes, slices, splits, places that are written into."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import fx

from indistill_fx.graph.attention import window_attention
from indistill_fx.passes.channels.call import Call, axis_of, read_call
from indistill_fx.passes.channels.joining import split_begins
from indistill_fx.passes.channels.keys import index_by, taken, written_slices
from indistill_fx.passes.channels.rules import FILLED
from indistill_fx.passes.channels.selection import Cut
from indistill_fx.passes.channels.sizes import leaves, shape_lender, size_of, size_read
from indistill_fx.passes.channels.space import rolled
from indistill_fx.passes.channels.writing import places, whole_key
from indistill_fx.passes.pruning.dependencies import has_places
from indistill_fx.passes.pruning.rewriting import Inserter, Rewriting, reordered, take_place


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


def _fix_group_norm(work: Rewriting, call: Call, node: fx.Node) -> None:
    if call.module is None and isinstance(call.get("num_groups"), int):
        _set(node, call, "num_groups", work.groups(call))


def _fix_layer_norm(work: Rewriting, call: Call, node: fx.Node) -> None:
    """The sizes of the normalised axes; those that are read off the tensor (`x.shape[1:]`) follow by themselves."""
    shape, place = call.get("normalized_shape"), call.places.get("normalized_shape")
    given = node.args[place] if isinstance(place, int) else node.kwargs.get(str(place))
    if isinstance(given, (tuple, list)) and isinstance(shape, (tuple, list)) and work.touched(call.node):
        rank = len(work.facts[call.node.name].shape)
        _set(
            node, call, "normalized_shape", tuple(work.size(call.node, axis) for axis in range(rank - len(shape), rank))
        )


def _fix_sizes(work: Rewriting, call: Call, node: fx.Node) -> None:
    """View, reshape, expand: the sizes of axes that lost channels."""
    given = call.arguments.get("shape")
    if not work.touched(call.node) or not isinstance(given, tuple) or shape_lender(call) is not None:
        return  # with `reshape_as`, the tensor that lends its shape was narrowed as well
    sizes: list[Any] = list(node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:])
    rank = len(work.facts[call.node.name].shape)
    if len(sizes) == 1 < rank:  # the sizes are one computed tuple
        given = (None,) * rank
        with work.new.graph.inserting_before(node):
            sizes = [work.new.graph.call_function(operator.getitem, (sizes[0], k)) for k in range(rank)]
    sizes = _sizes_left(work, call, node, given, sizes, rank - len(sizes))
    node.args = (node.args[0], *sizes) if node.op == "call_method" else (node.args[0], tuple(sizes))


def _sizes_left(
    work: Rewriting, call: Call, node: fx.Node, given: Sequence[Any], now: Sequence[Any], first: int = 0
) -> list[Any]:
    """The sizes that a node's arguments give to its axes from `first` on, of the channels that are left.

    Args:
        work: the network being written.
        call: the node in the old graph.
        node: the same in the new graph.
        given: the sizes in the old graph.
        now: the same as they stand in the new graph.
        first: the axis of the first size.
    """
    sizes = []
    for axis, (size, present) in enumerate(zip(given, now, strict=True), first):
        kept = work.kept(call.node, axis)
        if kept is None or size == -1:
            sizes.append(present)
        elif isinstance(size, fx.Node):
            with work.new.graph.inserting_before(node):
                sizes.append(_size_left(work, size, len(kept), call.output_shape[axis]))
        else:
            sizes.append(len(kept))
    return sizes


def _size_left(work: Rewriting, size: fx.Node, kept: int, of: int) -> Any:
    """A computed size of an axis that keeps so many entries of so many: a number if it is computed from numbers of channels alone.

    Otherwise channels share the axis with places: the code's size is scaled, which is right for any number of places.
    """
    reads = [size_read(leaf) for leaf in leaves(size)]
    if all(read is not None and work.kept(*read) is not None and not has_places(work.found, *read) for read in reads):
        return kept
    # Sizes that are read alone stay the original's.
    now = size_of(size, lambda tensor, axis: work.facts[tensor.name].shape[axis], work.shape)
    if now == kept:
        return work.nodes[size.name]
    if now not in (of, None):
        return kept
    share = Fraction(kept, of)
    product = _scaled(work, size, share)
    return _share_of(work, work.nodes[size.name], share) if product is None else product


def _share_of(work: Rewriting, size: fx.Node, share: Fraction) -> fx.Node:
    for compute, number in ((operator.mul, share.numerator), (operator.floordiv, share.denominator)):
        size = size if number == 1 else work.new.graph.call_function(compute, (size, number))
    return size


def _scaled(work: Rewriting, size: Any, share: Fraction) -> Any:
    """A product with a share of one of its numbers: 4 * h * w for 8 * h * w and a half; None if it has no such number.

    A size that is read off an axis which keeps just that share is the size that the axis has now.
    """
    if isinstance(size, int):
        return int(size * share) if (size * share).denominator == 1 else None
    if not isinstance(size, fx.Node):
        return None
    read = size_read(size)
    if read is not None and work.kept(*read) is not None:
        tensor, axis = read[0], axis_of(read[1], len(work.facts[read[0].name].shape))
        if not has_places(work.found, tensor, axis):
            return _scaled(work, work.facts[tensor.name].shape[axis], share)
        same = _kept_share(work, tensor, axis) == share
        return work.new.graph.call_method("size", (work.nodes[tensor.name], axis)) if same else None
    for k, factor in enumerate(size.args if size.target is operator.mul else ()):
        if (new := _scaled(work, factor, share)) is not None:
            factors = [work.nodes[n.name] if isinstance(n, fx.Node) else n for n in size.args]
            return work.new.graph.call_function(operator.mul, (*factors[:k], new, *factors[k + 1 :]))
    return None


def _fix_repeat(work: Rewriting, call: Call, node: fx.Node) -> None:
    """A single entry is repeated as often as there are channels left."""
    times, shape = call.arguments.get("repeats"), call.shape(call.input)
    if work.touched(call.node) and isinstance(times, tuple) and shape is not None and len(shape) == len(times):
        given = [n if size == 1 else -1 for n, size in zip(times, shape, strict=True)]
        now = read_call(node, work.facts).arguments["repeats"]
        node.args = (node.args[0], *_sizes_left(work, call, node, given, now))


def _fix_unflatten(work: Rewriting, call: Call, node: fx.Node) -> None:
    sizes, dim = call.get("sizes", call.get("unflattened_size")), call.get("dim")
    if not work.touched(call.node) or not isinstance(sizes, (tuple, list)) or not isinstance(dim, int):
        return
    first = axis_of(dim, len(call.shape(call.input) or ()))
    now = sizes if call.module is not None else read_call(node, work.facts).arguments["sizes"]
    left = tuple(_sizes_left(work, call, node, sizes, now, first))
    if call.module is not None:
        work.new.get_submodule(str(call.node.target)).unflattened_size = left  # type: ignore[assignment]
    else:
        _set(node, call, "sizes", left)


def _fix_split(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Chunks and splits along channels: the remaining size of each part."""
    shape, dim = call.shape(call.input), call.get("dim", 0)
    if shape is None or not isinstance(dim, int):
        return
    dim = axis_of(dim, len(shape))
    kept = work.kept(call.input, dim)
    if kept is None:
        return
    part = next((user.name for user in call.node.users if user.name in work.facts), None)
    size = shape[dim] if part is None else work.facts[part].shape[dim]
    begins = [*split_begins(call, shape[dim], size), shape[dim]]
    sizes = [int(((kept >= low) & (kept < high)).sum()) for low, high in pairwise(begins)]
    node.op, node.target = "call_function", torch.split
    node.args, node.kwargs = (node.args[0], sizes), {"dim": dim}


def _fix_slice(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Slices of channels: take the kept ones among them, then apply the rest of the key."""
    parsed = taken(call)
    if parsed is None:
        return
    key, entries = _renumbered(work, call, parsed[0]), parsed[1]
    kept = {axis: work.kept(call.input, axis) for axis in entries}
    key = fx.map_arg(key, lambda n: work.nodes[n.name])
    if all(k is None for k in kept.values()) and key == parsed[0]:
        return
    places = {axis: {int(k): j for j, k in enumerate(indices)} for axis, indices in kept.items() if indices is not None}
    written = written_slices(call, entries.keys() - places.keys())  # of batch, time and space: of any size
    left = {
        axis: tuple(places[axis][k] for k in indices if k in places[axis]) if axis in places else indices
        for axis, indices in entries.items()
        if axis not in written
    }
    key = _with_slices(key, written)
    with work.new.graph.inserting_before(node):
        new = index_by(Inserter(work.new), node.args[0], key, left)  # type: ignore[arg-type]
    take_place(work, node, new)


def _with_slices(key: tuple[Any, ...], slices: Mapping[int, slice]) -> tuple[Any, ...]:
    """A key with these slices at their axes."""
    new, axis = [], 0
    for entry in key:
        new.append(slices.get(axis, entry) if entry is not None else None)
        axis += 0 if entry is None else 1
    return tuple(new)


def _renumbered(work: Rewriting, call: Call, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key with its numbers changed to count only the remaining entries."""
    new, axis = [], 0
    for entry in key:
        kept = work.kept(call.input, axis) if isinstance(entry, int) else None
        size = (call.shape(call.input) or ())[axis] if kept is not None else 0
        new.append(entry if kept is None else kept.tolist().index(entry % size))
        axis += 0 if entry is None else 1
    return tuple(new)


def _fix_write(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Writes into channels: write only the kept ones among them."""
    parsed = taken(call)
    if parsed is None:
        return
    key: list[Any] = list(whole_key(call))
    changed = False
    new = Inserter(work.new)
    for axis, entry in enumerate(key):
        kept = work.kept(call.node, axis)
        written = (entry,) if isinstance(entry, int) else parsed[1].get(axis)
        if kept is None or written is None:
            continue
        left = tuple(j for j, k in enumerate(kept.tolist()) if k in written)
        if not left:  # no channel is left to write
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            return
        with work.new.graph.inserting_before(node):
            key[axis], changed = left[0] if isinstance(entry, int) else places(new, left), True  # type: ignore[arg-type]
    if changed:
        value = node.args[2]
        key = fx.map_arg(key, lambda n: work.nodes.get(n.name, n))
        node.args = (node.args[0], tuple(key), value)


def _fix_roll(work: Rewriting, call: Call, node: fx.Node) -> None:
    """A roll of channels: those that stay, in the order that it gave them. Other axes roll as before."""
    shifts = rolled(call)
    axis = next((axis for axis in shifts if work.kept(call.input, axis) is not None), None)
    if axis is None:
        return
    size, by = call.output_shape[axis], shifts.pop(axis)
    new = reordered(work, Cut(call.input, axis, axis + 1, tuple((k - by) % size for k in range(size))), call.node)
    if shifts:
        rest = fx.map_arg((*shifts.values(),), lambda n: work.nodes[n.name])
        with work.new.graph.inserting_before(node):
            new = work.new.graph.call_function(torch.roll, (new, rest, (*shifts,)))
    take_place(work, node, new)


def _fix_filled(work: Rewriting, call: Call, node: fx.Node) -> None:
    """A constant tensor: give it the remaining sizes."""
    sizes = call.arguments.get("shape")
    if not work.touched(call.node) or not isinstance(sizes, (tuple, list)) or shape_lender(call) is not None:
        return
    left = _sizes_left(work, call, node, sizes, read_call(node, work.facts).arguments["shape"])
    if "shape" in call.places:
        _set(node, call, "shape", tuple(left))
    else:
        node.args = (*(n for n in node.args[:1] if "input" in call.arguments), *left)


def _fix_constant(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Numbers in the code: those that stay."""
    if work.touched(call.node):
        values = np.array(node.args[0], dtype=object)
        for axis in range(values.ndim):
            if (kept := work.kept(call.node, axis)) is not None:
                values = values.take(kept, axis)
        node.args = (values.tolist(), *node.args[1:])


def _fix_pad(work: Rewriting, call: Call, node: fx.Node) -> None:
    """Padding of channels: pad by the number of kept padded ones."""
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
    """See `_keep_original`."""
    dim = call.get("dim", call.arguments.get("argument_1"))
    if isinstance(dim, int) and work.touched(call.input):
        axis = axis_of(dim, len(call.shape(call.input) or ()))
        if work.kept(call.input, axis) is not None:
            _keep_original(work, call.node, call.input, axis)


def _kept_share(work: Rewriting, tensor: fx.Node, axis: int) -> Fraction:
    return Fraction(work.size(tensor, axis), work.facts[tensor.name].shape[axis])


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
        keeps_all = (
            (source.op == "size" and len(maker.args) == 1)
            or source.op == "shape"
            or (source.op == "getattr" and maker.args[1] == "shape")
        )
        if keeps_all and isinstance(maker.args[0], fx.Node) and maker.args[0].name in work.facts:
            shape = work.facts[maker.args[0].name].shape
            axis = axis_of(call.get("key"), len(shape))
            if work.kept(maker.args[0], axis) is not None:
                _keep_original(work, call.node, maker.args[0], axis)


def _keep_original(work: Rewriting, size: fx.Node, tensor: fx.Node, axis: int) -> None:
    """A number of channels read off a tensor stays the original's: it may be a scale, and sizes are rewritten where they are used.

    It is a number, or follows the size that the axis has now where the axis holds places as well.
    """
    node, users = work.nodes[size.name], list(work.nodes[size.name].users)
    value: int | fx.Node = work.facts[tensor.name].shape[axis]
    if has_places(work.found, tensor, axis):
        with work.new.graph.inserting_before(node.next):
            value = work.nodes[size.name] = _share_of(work, node, 1 / _kept_share(work, tensor, axis))
    for user in users:
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
    "conv_per_sample": _fix_conv,
    "deform_conv2d": _fix_conv,
    "group_norm": _fix_group_norm,
    "layer_norm": _fix_layer_norm,
    "rms_norm": _fix_layer_norm,
    **dict.fromkeys(("view", "reshape", "expand"), _fix_sizes),
    "repeat": _fix_repeat,
    "unflatten": _fix_unflatten,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _fix_split),
    **dict.fromkeys(("narrow", "slice", "index_select", "select"), _fix_slice),
    "getitem": _fix_getitem,
    "roll": _fix_roll,
    "with_item": _fix_write,
    **dict.fromkeys(FILLED, _fix_filled),
    "tensor": _fix_constant,
    **dict.fromkeys(("pad", "constant_pad_nd"), _fix_pad),
    "size": _fix_size,
    **dict.fromkeys(("shifted_window_attention", "window_attention"), _fix_windows),
}
"""Operation -> how its arguments follow the channels that are left."""
