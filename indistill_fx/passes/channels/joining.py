"""Rules of operations that join tensors or take them apart: concatenation, stacks, chunks, slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import fx

from indistill_fx.passes.channels import attention, norms, space
from indistill_fx.passes.channels.call import Call, again, axis_of, index_select, read_call, source, untouched
from indistill_fx.passes.channels.keys import full_key, index_by, taken
from indistill_fx.passes.channels.lookups import looked_up
from indistill_fx.passes.channels.selection import Blocked, Cut, Emitter, Part, Propagation


def cat(call: Call, cut: Cut) -> Propagation | Blocked:
    """Along the selected axis every operand gives its share; along another, every operand is selected alike."""
    operands, shapes = _operands(call)
    if shapes is None:
        return Blocked("it joins something that is not a tensor")
    dim = axis_of(int(call.get("dim", call.get("axis", 0))), len(call.output_shape))
    if not cut.start <= dim < cut.stop:
        moved = dim if dim < cut.start else dim - cut.width + 1
        parts = tuple(Part(Cut(n, cut.start, cut.stop, cut.index)) for n in operands)
        return Propagation(lambda out, new: out.function(torch.cat, list(new), dim=moved), parts)
    if cut.width > 1:
        return Blocked("the joined axis is merged with others here")
    parts = _shares(operands, [shape[dim] for shape in shapes], cut)
    order = tuple(k for part in parts for k in (part.links or ((), ()))[0])
    back = tuple(sorted(range(len(order)), key=order.__getitem__))

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        joined = new[0] if len(new) == 1 else out.function(torch.cat, list(new), dim=dim)
        return joined if back == tuple(range(len(back))) else index_select(out, joined, dim, dim + 1, back)

    return Propagation(
        emit,
        parts,
        note="" if back == tuple(range(len(back))) else "the order of the joined channels is restored by a gather",
    )


def _operands(call: Call) -> tuple[list[fx.Node], list[tuple[int, ...]] | None]:
    """The concatenated tensors, without the empty ones that loops start with, and their shapes; None if one is not a tensor."""
    given = call.arguments.get("tensors", call.arguments.get("input"))
    nodes = [n for n in given if isinstance(n, fx.Node)] if isinstance(given, (list, tuple)) else []
    known = [(n, shape) for n in nodes if (shape := call.shape(n)) is not None]
    joined = [(n, shape) for n, shape in known if shape != (0,)]
    complete = bool(joined) and len(known) == len(given)
    return [n for n, _ in joined], [shape for _, shape in joined] if complete else None


def _shares(operands: Sequence[fx.Node], sizes: Sequence[int], cut: Cut) -> tuple[Part, ...]:
    parts, begin = [], 0
    for operand, size in zip(operands, sizes, strict=True):
        own_entries = [(position, k - begin) for position, k in enumerate(cut.index) if begin <= k < begin + size]
        if own_entries:
            parts.append(
                Part(
                    Cut(operand, cut.start, cut.stop, tuple(k for _, k in own_entries)),
                    (tuple(p for p, _ in own_entries), tuple(range(len(own_entries)))),
                )
            )
        begin += size
    return tuple(parts)


def stack(call: Call, cut: Cut) -> Propagation | Blocked:
    """A stack of all, each selected; the new axis itself is not selected."""
    operands, shapes = _operands(call)
    dim = axis_of(int(call.get("dim", 0)), len(call.output_shape))
    if shapes is None or cut.start <= dim < cut.stop:
        return Blocked("the selected axis is the stack itself")
    back = 1 if dim < cut.start else 0
    parts = tuple(Part(Cut(n, cut.start - back, cut.stop - back, cut.index)) for n in operands)
    moved = dim if dim < cut.start else dim - cut.width + 1
    return Propagation(lambda out, new: out.function(torch.stack, list(new), dim=moved), parts)


def getitem(call: Call, cut: Cut) -> Propagation | Blocked:
    """One of the parts of a chunk or split, or an indexed tensor."""
    key = call.get("key")
    if call.shape(call.input) is not None:
        return slicing(call, cut)
    maker = read_call(call.input, call.facts)
    rule = _PARTS.get(maker.op)
    if rule is None or not isinstance(key, int) or maker.shape(maker.arguments.get("input")) is None:
        return Blocked(f"one of several results of {maker.op}")
    return rule(maker, cut, key, call)


def _part_of_split(maker: Call, cut: Cut, key: int, call: Call) -> Propagation | Blocked:
    shape = maker.shape(maker.input) or ()
    dim = maker.get("dim", 0)
    if not isinstance(dim, int):
        return Blocked("the axis of the split is computed")
    dim = axis_of(dim, len(shape))
    if cut.start <= dim < cut.stop:
        if not all(isinstance(size, int) for size in _sizes(maker)):
            return Blocked("the sizes of the split are computed")
        begin = split_begins(maker, shape[dim], call.output_shape[dim])[key]
        if cut.width > 1:
            return Blocked("the split axis is merged with others here")
        return Propagation(source, (Part(Cut(maker.input, cut.start, cut.stop, tuple(k + begin for k in cut.index))),))
    below = Cut(maker.input, cut.start, cut.stop, cut.index)
    both = again(maker, [below], dim=dim if dim < cut.start else dim - cut.width + 1)
    return Propagation(lambda out, new: out.item(both(out, new), key), (Part(below),))


def _sizes(maker: Call) -> tuple[object, ...]:
    given = maker.get("chunks") if maker.op == "chunk" else maker.get("split_size")
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def split_begins(maker: Call, total: int, size: int) -> list[int]:
    """Where each part begins along the split axis."""
    sizes = maker.get("split_size")
    if maker.op == "chunk":
        sizes = -(-total // int(maker.get("chunks")))
    elif maker.op == "tensor_split":
        if isinstance(sizes, int):
            sizes = [total // sizes + (k < total % sizes) for k in range(sizes)]
        else:
            return [0, *sizes]
    if isinstance(sizes, int):
        return list(range(0, total, sizes))
    return [sum(sizes[:k]) for k in range(len(sizes))]


def _part_of_packing(maker: Call, cut: Cut, key: int, call: Call) -> Propagation | Blocked:
    """Sequences laid one after the other, or side by side again: their features are the last axis."""
    if key != 0 or cut.start < len(call.output_shape) - 1:
        return Blocked("packing moves the entries of a sequence")
    last = len(maker.shape(maker.input) or ()) - 1
    below = Cut(maker.input, last, last + 1, cut.index)
    both = again(maker, [below])
    return Propagation(lambda out, new: out.item(both(out, new), key), (Part(below),))


def _part_of_unbind(maker: Call, cut: Cut, key: int, call: Call) -> Propagation | Blocked:
    rank = len(call.output_shape) + 1
    dim = axis_of(int(maker.get("dim", 0)), rank)
    entry = key + (maker.shape(maker.input) or ())[dim] if key < 0 else key
    return _without_axis(maker.input, dim, entry, cut)


def _without_axis(below: fx.Node, dim: int, entry: int, cut: Cut) -> Propagation | Blocked:
    if cut.start < dim < cut.stop:
        return Blocked("an axis between the merged ones is dropped")
    shift = 1 if dim <= cut.start else 0
    part = Part(Cut(below, cut.start + shift, cut.stop + shift, cut.index))
    moved = dim if shift else dim - cut.width + 1
    return Propagation(lambda out, new: out.function(torch.select, new[0], moved, entry), (part,))


def field(call: Call, cut: Cut) -> Propagation | Blocked:
    """`x.max(-1).values` and `.indices`, as `x.max(-1)[0]` and `[1]`; `x.data`, and real and imaginary parts, entry by entry."""
    source_node, name = call.node.args[0], call.node.args[1]
    if name in ("real", "imag", "data"):
        return untouched(call, cut)
    if not isinstance(source_node, fx.Node) or name not in FIELDS:
        return Blocked(f"no channel rule for the attribute {name}")
    maker = read_call(source_node, call.facts)
    if maker.op not in WITH_PLACES:
        return Blocked(f"one of several results of {maker.op}")
    return _PARTS[maker.op](maker, cut, FIELDS.index(str(name)), call)


FIELDS = ("values", "indices")


def _item_of(rule: Callable[[Call, Cut], Propagation | Blocked]) -> Callable[..., Propagation | Blocked]:
    """The rule of one result of an operation whose results all have the same axes."""

    def item(maker: Call, cut: Cut, key: int, _: Call) -> Propagation | Blocked:
        step = rule(maker, cut)
        if isinstance(step, Blocked):
            return step
        return Propagation(lambda out, new: out.item(step.emit(out, new), key), step.parts)

    return item


WITH_PLACES = frozenset("max min median nanmedian mode kthvalue sort topk cummax cummin".split())
"""Operations along one axis that return values, and their places on it."""
REDUCTIONS = frozenset("max min median nanmedian mode kthvalue var_mean std_mean".split())
"""Operations of several results that reduce an axis."""
POOLS = frozenset(
    "max_pool adaptive_max_pool max_pool2d_with_indices max_pool1d_with_indices max_pool3d_with_indices".split()
)
"""Pooling that may return the places of the maxima as well."""
_PARTS: dict[str, Callable[..., Propagation | Blocked]] = {
    **dict.fromkeys(REDUCTIONS, _item_of(space.reduction)),
    **dict.fromkeys(WITH_PLACES - REDUCTIONS, _item_of(norms.along_axis)),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _part_of_split),
    **dict.fromkeys(POOLS, _item_of(space.per_channel_map)),
    "unbind": _part_of_unbind,
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), _part_of_packing),
    "multihead_attention": attention.module_output,
    "head_attention": attention.module_output,
}


def slicing(call: Call, cut: Cut) -> Propagation | Blocked:
    """An indexed tensor; `select`, `narrow`, `slice` and `index_select` are ways to write an index."""
    elsewhere = _sliced_elsewhere(call, cut)
    if isinstance(elsewhere, Propagation):
        return elsewhere
    parsed = taken(call)
    if parsed is None:
        return looked_up(call, cut) if call.op == "getitem" else elsewhere
    key, entries = parsed
    axis, output, places = 0, 0, {}
    for place, entry in enumerate(key):
        if isinstance(entry, slice):
            places[output] = (place, axis)
        output += 0 if isinstance(entry, int) else 1
        axis += 0 if entry is None else 1
    if any(k not in places for k in range(cut.start, cut.stop)):
        return Blocked("the selected axis is new here")
    axes = [places[k][1] for k in range(cut.start, cut.stop)]
    if axes != list(range(axes[0], axes[-1] + 1)):
        return Blocked("an axis between the merged ones is dropped")
    if cut.width > 1 and any(k in entries for k in axes):
        return Blocked("one of the merged axes is sliced")
    if any(key[places[k][0]] != slice(None) for k in range(cut.start, cut.stop)):
        return Blocked("the selected axis is sliced by computed numbers")
    at, chosen = places[cut.start][0], entries.get(axes[0])
    index = cut.index if chosen is None else tuple(chosen[k] for k in cut.index)
    part = Part(Cut(call.input, axes[0], axes[-1] + 1, index))
    if call.op in (
        "getitem",
        "with_item",
    ):  # as it is written: the other axes may have another size than in the example
        given = call.get("key")
        key = full_key(given if isinstance(given, tuple) else (given,), len(call.shape(call.input) or ())) or key
        entries = {}
    rest = {k: chosen for k, chosen in entries.items() if k != axes[0]}
    moved = {k if k < axes[0] else k - cut.width + 1: chosen for k, chosen in rest.items()}
    new_key = (*key[:at], slice(None), *key[at + cut.width :])
    return Propagation(lambda out, new: index_by(out, new[0], new_key, moved), (part,))


def _sliced_elsewhere(call: Call, cut: Cut) -> Propagation | Blocked:
    """`narrow` and `slice` along another axis, whatever size it has."""
    dim = call.get("dim", 0)
    dim = axis_of(dim, len(call.output_shape)) if isinstance(dim, int) else cut.start
    if call.op not in ("narrow", "slice", "index_select") or cut.start <= dim < cut.stop:
        return Blocked(f"it is indexed by tensors or by computed numbers{call.why_open}")
    return untouched(call, cut, dim=dim if dim < cut.start else dim - cut.width + 1)
