"""Rules of operations that only rearrange entries: reshapes and permutations. Mostly they vanish into the index."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import fx

from indistill_fx.passes.channels.call import Call, again, axis_of, source, untouched
from indistill_fx.passes.channels.free_sizes import free_sizes
from indistill_fx.passes.channels.selection import (
    Blocked,
    Cut,
    Emitter,
    Index,
    Part,
    Propagation,
    Shape,
    coordinates,
    flat_place,
    group_size,
    spread,
)


def reshape(call: Call, cut: Cut) -> Propagation | Blocked:
    """View, reshape, flatten, unflatten, squeeze, unsqueeze: find the input's axes that hold the same entries."""
    before, after = call.shape(call.input), call.output_shape
    if before is None:
        return Blocked("its input is not a tensor")
    found = _matching_axes(before, after, cut)
    if found is None:
        return Blocked("the selected axis is cut across by the reshape")
    start, stop, first, last = found
    batches = call.facts[call.input.name].batch_axis, call.facts[call.node.name].batch_axis
    mixed = (batches[0] is not None and start <= batches[0] < stop) or (
        batches[1] is not None and first <= batches[1] < last
    )
    everything = cut.index == tuple(range(group_size(after, cut.start, cut.stop)))
    if mixed and not everything:  # the numbers hold for the example's batch alone
        return Blocked("the reshape mixes the selected axis with the batch")
    left, right = prod(after[first : cut.start]), prod(after[cut.stop : last])
    index = spread(cut.index, size=group_size(after, cut.start, cut.stop), before=left, after=right)
    sizes = (*after[first : cut.start], len(cut.index), *after[cut.stop : last])
    same_rest = before[:start] == after[:first] and before[stop:] == after[last:]

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        if same_rest:
            return new[0] if len(sizes) == 1 else out.function(torch.unflatten, new[0], start, sizes)
        front, back = free_sizes(out, call, new[0], (start, stop), (first, last))
        return out.function(torch.reshape, new[0], (*front, *sizes, *back))

    repeated = tuple(k for _ in range(left) for k in range(len(cut.index)) for _ in range(right))
    links = None if left * right == 1 else (repeated, tuple(range(len(index))))
    return Propagation(emit, (Part(Cut(call.input, start, stop, index), links),))


def _matching_axes(before: Shape, after: Shape, cut: Cut) -> tuple[int, int, int, int] | None:
    """(start, stop) of the input and (first, last) of the output: the smallest span around the cut that exists on both sides."""
    spans = [(a, b) for a in range(cut.start + 1) for b in range(cut.stop, len(after) + 1)]
    for first, last in sorted(spans, key=lambda span: (group_size(after, *span), span[1] - span[0])):
        left, size = prod(after[:first]), group_size(after, first, last)
        starts = [a for a in range(len(before)) if prod(before[:a]) == left]
        ends = [(a, b) for a in starts for b in range(a + 1, len(before) + 1) if group_size(before, a, b) == size]
        if ends:
            exact = [(a, b) for a, b in ends if before[:a] == after[:first] and before[b:] == after[last:]]
            start, stop = (exact or [(min(starts), max(b for _, b in ends))])[0]
            return start, stop, first, last
    return None


def permute(call: Call, cut: Cut) -> Propagation | Blocked:
    """Permute, transpose, movedim: the axes move, and entries of merged axes with them."""
    order = permutation(call)
    shape = call.shape(call.input)
    if order is None or shape is None:
        return Blocked("the order of axes is computed")
    axes = order[cut.start : cut.stop]
    low, high = min(axes), max(axes) + 1
    if high - low != len(axes):
        return Blocked("the merged axes stand apart before the transposition")
    index = _moved(cut.index, axes, shape, low, high) if list(axes) != sorted(axes) else cut.index
    merged = [d if d <= low else d - len(axes) + 1 for d in (*order[: cut.start], low, *order[cut.stop :])]
    part = Part(Cut(call.input, low, high, index))
    if merged == list(range(len(merged))):
        return Propagation(source, (part,))
    return Propagation(lambda out, new: out.function(torch.permute, new[0], tuple(merged)), (part,))


def _moved(index: Index, axes: Sequence[int], shape: Shape, low: int, high: int) -> Index:
    sizes = [shape[axis] for axis in axes]
    places = (dict(zip(axes, coordinates(k, sizes), strict=True)) for k in index)
    return tuple(flat_place([place[axis] for axis in range(low, high)], shape[low:high]) for place in places)


def permutation(call: Call) -> list[int] | None:
    """For every axis of the output, the axis of the input it was."""
    rank = len(call.output_shape)
    if call.op == "permute":
        dims = call.arguments.get("dims", call.get("dims"))
        return [axis_of(d, rank) for d in dims] if isinstance(dims, (tuple, list)) and len(dims) == rank else None
    order = list(range(rank))
    if call.op == "numpy_t":
        return order[::-1]
    if call.op in ("t", "mt"):
        order[-1], order[-2] = order[-2], order[-1]
        return order
    if call.op == "transpose":
        a, b = call.get("dim0", call.get("axis0")), call.get("dim1", call.get("axis1"))
        if not (isinstance(a, int) and isinstance(b, int)):
            return None
        order[a], order[b] = order[b], order[a]
        return order
    moves = call.get("source"), call.get("destination")
    pairs = [(m,) if isinstance(m, int) else m for m in moves]
    if not all(isinstance(p, (tuple, list)) and all(isinstance(axis, int) for axis in p) for p in pairs):
        return None
    placed = {axis_of(to, rank): axis_of(source, rank) for source, to in zip(*pairs, strict=True)}
    rest = iter(axis for axis in range(rank) if axis not in placed.values())
    return [placed[axis] if axis in placed else next(rest) for axis in range(rank)]


def expand(call: Call, cut: Cut) -> Propagation | Blocked:
    """Expanded axes come from one entry; the others are selected below."""
    before, after = call.shape(call.input), call.output_shape
    given = call.arguments.get("shape")
    if before is None or cut.width > 1 or not isinstance(given, tuple):
        return Blocked("expansion of merged axes")
    axis = cut.start - (len(after) - len(before))
    parts: tuple[Part, ...] = ()
    if axis >= 0 and before[axis] == after[cut.start] != 1:
        parts = (Part(Cut(call.input, axis, axis + 1, cut.index)),)
    sizes = [len(cut.index) if k == cut.start else value for k, value in enumerate(given)]
    return Propagation(lambda out, new: out.method("expand", new[0] if new else call.input, *sizes), parts)


def repeat(call: Call, cut: Cut) -> Propagation | Blocked:
    """Axes repeated once pass; along another, entries come round again. A single entry is repeated as often as is wanted."""
    before, after, given = call.shape(call.input), call.output_shape, call.arguments.get("repeats")
    if before is None or cut.width > 1 or not isinstance(given, tuple) or len(before) != len(after):
        return Blocked("repetition of merged axes")
    axis, size = cut.start, before[cut.start]
    if size == after[axis]:
        below = Cut(call.input, axis, axis + 1, cut.index)
        return Propagation(again(call, [below]), (Part(below),))
    times = [(len(cut.index) if size == 1 else 1) if k == axis else n for k, n in enumerate(given)]
    if size == 1:
        return Propagation(lambda out, _: out.method("repeat", call.input, *times))
    below = Cut(call.input, axis, axis + 1, tuple(k % size for k in cut.index))
    return Propagation(lambda out, new: out.method("repeat", new[0], *times), (Part(below),))


def repeat_interleave(call: Call, cut: Cut) -> Propagation | Blocked:
    """Each entry of one axis stands as many times one after the other; the other axes pass."""
    times, dim = call.get("repeats"), call.get("dim")
    if not isinstance(times, int) or not isinstance(dim, int):
        return Blocked("the repetitions are computed, or of all axes")
    dim = axis_of(dim, len(call.output_shape))
    if not cut.start <= dim < cut.stop:
        return untouched(call, cut, dim=dim if dim < cut.start else dim - cut.width + 1)
    if cut.width > 1:
        return Blocked("repetition of merged axes")
    return Propagation(source, (Part(Cut(call.input, dim, dim + 1, tuple(k // times for k in cut.index))),))


def contiguous(call: Call, cut: Cut) -> Propagation | Blocked:
    """Same entries, another storage."""
    below = Cut(call.input, cut.start, cut.stop, cut.index)
    return Propagation(again(call, [below]), (Part(below),))
