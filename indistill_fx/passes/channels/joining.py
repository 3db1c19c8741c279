"""Rules of operations that join tensors or take them apart: concatenation, stacks, chunks, slices."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from indistill_fx.passes.channels import attention
from indistill_fx.passes.channels.call import Call, again, axis_of, index_select, read_call, source, untouched
from indistill_fx.passes.channels.selection import Blocked, Cut, Emitter, Index, Part, Propagation


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
    """`x.max(-1).values` and `.indices`, as `x.max(-1)[0]` and `[1]`."""
    source_node, name = call.node.args[0], call.node.args[1]
    if not isinstance(source_node, fx.Node) or name not in _FIELDS:
        return Blocked(f"no channel rule for the attribute {name}")
    maker = read_call(source_node, call.facts)
    if _PARTS.get(maker.op) is not _extreme:
        return Blocked(f"one of several results of {maker.op}")
    return _extreme(maker, cut, _FIELDS.index(str(name)), call)


_FIELDS = ("values", "indices")


def _extreme(maker: Call, cut: Cut, key: int, call: Call) -> Propagation | Blocked:
    """A maximum along another axis, or its index."""
    shape, dim = maker.shape(maker.input) or (), maker.get("dim")
    if not isinstance(dim, int):
        return Blocked(f"the axis of the {maker.op} is computed")
    dim = axis_of(dim, len(shape))
    stay = [axis for axis in range(len(shape)) if axis != dim or len(call.output_shape) == len(shape)]
    axes = stay[cut.start : cut.stop]
    if dim in axes or axes != list(range(axes[0], axes[-1] + 1)):
        return Blocked(f"{maker.op} mixes some of the selected axes")
    below = Cut(maker.input, axes[0], axes[-1] + 1, cut.index)
    both = again(maker, [below], dim=dim if dim < axes[0] else dim - cut.width + 1)
    return Propagation(lambda out, new: out.item(both(out, new), key), (Part(below),))


_PARTS = {
    **dict.fromkeys(("max", "min", "median"), _extreme),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _part_of_split),
    "unbind": _part_of_unbind,
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
        return _looked_up(call, cut) if call.op == "getitem" else elsewhere
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
    if call.op not in ("narrow", "slice") or cut.start <= dim < cut.stop:
        return Blocked(f"it is indexed by tensors or by computed numbers{call.why_open}")
    return untouched(call, cut, dim=dim if dim < cut.start else dim - cut.width + 1)


def _looked_up(call: Call, cut: Cut) -> Propagation | Blocked:
    """A table that is indexed by one tensor on one axis: the other axes are those of the table."""
    shape, key = call.shape(call.input), call.get("key", call.get("index"))
    entries = full_key(key if isinstance(key, tuple) else (key,), len(shape)) if shape is not None else None
    places = [k for k, entry in enumerate(entries or ()) if entry != slice(None)]
    looked = call.shape(entries[places[0]]) if entries is not None and len(places) == 1 else None
    if shape is None or looked is None or call.facts[entries[places[0]].name].dtype == torch.bool:  # type: ignore[index]
        return Blocked(f"it is indexed by tensors or by computed numbers{call.why_open}")
    at, wider = places[0], len(looked) - 1
    if cut.start <= at + wider and cut.stop > at:
        return Blocked("it is looked up along the selected axis")
    back = 0 if cut.stop <= at else wider
    below = Cut(call.input, cut.start - back, cut.stop - back, cut.index)
    if cut.width > 1:
        return Blocked("a table looked up, with merged axes")
    return Propagation(again(call, [below]), (Part(below),))


Key = tuple[Any, ...]


def taken(call: Call) -> tuple[Key, dict[int, Index]] | None:
    """What a slicing takes: a full key of numbers, None and slices, and for each axis sliced by numbers the entries taken of it.

    Slices by numbers are written whole in the key; computed ones stay as they are.
    """
    shape = call.shape(call.input)
    if shape is None:
        return None
    if call.op in ("getitem", "with_item"):
        given = call.get("key")
        key = full_key(given if isinstance(given, tuple) else (given,), len(shape))
    else:
        dim = call.get("dim", 0)
        if not isinstance(dim, int):
            return None
        dim = axis_of(dim, len(shape))
        if call.op == "index_select":
            chosen = call.constant("index")
            return None if chosen is None else ((slice(None),) * len(shape), {dim: tuple(chosen.tolist())})
        entry = _entry(call)
        key = None if entry is None else full_key((*[slice(None)] * dim, entry), len(shape))
    if key is None or not all(_plain(entry) for entry in key):
        return None
    entries, axis = {}, 0
    for entry in key:
        if isinstance(entry, slice) and entry != slice(None) and _by_numbers(entry):
            entries[axis] = tuple(range(*entry.indices(shape[axis])))
        axis += 0 if entry is None else 1
    return tuple(slice(None) if isinstance(entry, slice) and _by_numbers(entry) else entry for entry in key), entries


def _entry(call: Call) -> Any:
    if call.op == "select":
        return call.get("index")
    if call.op == "narrow":
        start, length = call.get("start"), call.get("length")
        return slice(start, start + length) if isinstance(start, int) and isinstance(length, int) else None
    return slice(call.get("start"), call.get("end"), call.get("step"))


def index_by(out: Emitter, node: fx.Node, key: Key, entries: Mapping[int, Index]) -> fx.Node:
    """Take these entries of some axes, then index by a key of numbers, None and whole slices."""
    for axis, chosen in entries.items():
        step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
        if step > 0 and chosen == tuple(range(chosen[0], chosen[-1] + 1, step)):
            node = out.function(operator.getitem, node, (*[slice(None)] * axis, slice(chosen[0], chosen[-1] + 1, step)))
        else:
            node = index_select(out, node, axis, axis + 1, chosen)
    return node if all(entry == slice(None) for entry in key) else out.function(operator.getitem, node, key)


def _plain(entry: Any) -> bool:
    if isinstance(entry, slice):
        return not isinstance(entry.step, fx.Node) and (entry.step is None or entry.step > 0)
    return entry is None or (isinstance(entry, int) and not isinstance(entry, bool))


def _by_numbers(entry: slice) -> bool:
    return not any(isinstance(v, fx.Node) for v in (entry.start, entry.stop, entry.step))


def full_key(key: Key, rank: int) -> tuple[Any, ...] | None:
    """The key with Ellipsis and missing entries written out."""
    named = sum(1 for entry in key if entry is not None and entry is not Ellipsis)
    if sum(1 for entry in key if entry is Ellipsis) > 1 or named > rank:
        return None
    fill = [slice(None)] * (rank - named)
    place = next((k for k, entry in enumerate(key) if entry is Ellipsis), None)
    return (*key, *fill) if place is None else (*key[:place], *fill, *key[place + 1 :])
