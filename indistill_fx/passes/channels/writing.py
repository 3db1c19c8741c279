"""Rules of writes into a part of a tensor, and of the constants that are made to be written into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from indistill_fx.graph.ops import with_item
from indistill_fx.passes.channels.call import Call, again, source
from indistill_fx.passes.channels.keys import full_key, taken
from indistill_fx.passes.channels.selection import Blocked, Cut, Emitter, Index, Part, Propagation
from indistill_fx.passes.channels.sizes import shape_lender

Key = tuple[Any, ...]


def written(call: Call, cut: Cut) -> Propagation | Blocked:
    """`x[key] = value`, out of place: entries that are written come from the value, all others from the tensor."""
    parsed = taken(call)
    if parsed is None or None in parsed[0]:
        return Blocked("it is written into at computed places")
    key, entries = whole_key(call), dict(parsed[1])
    entries |= {axis: (entry,) for axis, entry in enumerate(key) if isinstance(entry, int)}
    axes = range(cut.start, cut.stop)
    if any(key[axis] != slice(None) and axis not in entries for axis in axes):
        return Blocked("the selected axis is written into from a computed place on")
    if cut.width > 1 and any(axis in entries for axis in axes):
        return Blocked("one of the merged axes is written into")
    chosen = entries.get(cut.start)
    place = {k: j for j, k in enumerate(chosen)} if chosen is not None else {k: k for k in cut.index}
    inside = tuple(p for p, k in enumerate(cut.index) if k in place)
    below = Part(Cut(call.input, cut.start, cut.stop, cut.index))
    if not inside:
        return Propagation(source, (below,))
    if isinstance(key[cut.start], slice) and chosen is not None and any(isinstance(entry, int) for entry in key):
        return Blocked("it is written into at single places of other axes")
    part = _of_value(call, cut, key, tuple(place[cut.index[p]] for p in inside), inside)
    if isinstance(part, Blocked):
        return part

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        entry = slice(None) if chosen is None else inside[0] if isinstance(key[cut.start], int) else places(out, inside)
        value = new[1] if part is not None else call.get("value")
        return out.function(with_item, new[0], (*key[: cut.start], entry, *key[cut.stop :]), value)

    return Propagation(emit, (below,) if part is None else (below, part))


def whole_key(call: Call) -> Key:
    """The key of a write, as long as the tensor has axes."""
    key = call.get("key")
    return full_key(key if isinstance(key, tuple) else (key,), len(call.output_shape)) or ()


def _of_value(call: Call, cut: Cut, key: Key, index: Index, inside: Index) -> Part | Blocked | None:
    """The selection of the written value; None if the value is constant along the selected axis."""
    shape = call.shape(call.get("value"))
    if shape is None or isinstance(key[cut.start], int):
        return None
    left = [axis for axis, entry in enumerate(key) if not isinstance(entry, int)]
    start = left.index(cut.start) - (len(left) - len(shape))
    sizes = shape[max(start, 0) : max(start + cut.width, 0)]
    if all(n == 1 for n in sizes):
        return None
    if len(sizes) < cut.width or (cut.width > 1 and 1 in sizes):
        return Blocked("what is written broadcasts along some of the merged axes")
    links = None if inside == tuple(range(len(cut.index))) else (inside, tuple(range(len(inside))))
    return Part(Cut(call.get("value"), start, start + cut.width, index), links)


def places(out: Emitter, index: Index) -> slice | fx.Node:
    """Places of an axis as an entry of a key: a slice where they are evenly spaced."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index == tuple(range(index[0], index[-1] + 1, step)):
        return slice(index[0], index[-1] + 1, step)
    return out.tensor("places", torch.tensor(index))


def filled(call: Call, cut: Cut) -> Propagation | Blocked:
    """A tensor of one value (`zeros`, `new_full`): the same of another size, or of the shape of another tensor's selection."""
    sizes, lender = call.arguments.get("shape"), shape_lender(call)
    if lender is not None:
        below = Cut(lender, cut.start, cut.stop, cut.index)
        return Propagation(lambda out, new: resized(out, call, out.function(getattr, new[0], "shape")), (Part(below),))
    if (
        not isinstance(sizes, (tuple, list))
        or len(sizes) < cut.stop
        or cut.width > 1
        or not isinstance(sizes[cut.start], int)
    ):
        return Blocked("its sizes are computed")
    new = tuple(len(cut.index) if axis == cut.start else n for axis, n in enumerate(sizes))
    return Propagation(lambda out, _: resized(out, call, new))


def resized(out: Emitter, call: Call, sizes: tuple[Any, ...] | fx.Node) -> fx.Node:
    """A tensor of one value, of these sizes or of a computed shape."""
    if "shape" in call.places:
        return again(call, [], shape=sizes)(out, [])
    named = (sizes,) if isinstance(sizes, fx.Node) else sizes
    args = (*(n for n in call.node.args[:1] if n is call.arguments.get("input")), *named)
    if call.node.op == "call_method":
        return out.method(str(call.node.target), *args, **call.node.kwargs)
    return out.function(call.node.target, *args, **call.node.kwargs)  # type: ignore[arg-type]
