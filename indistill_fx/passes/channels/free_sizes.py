"""The sizes of the axes that a selection does not touch, read when the graph runs: of any batch and any picture, not the example's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Any

from torch import fx

from indistill_fx.passes.channels.call import Call
from indistill_fx.passes.channels.selection import Emitter, Shape
from indistill_fx.passes.channels.sizes import sizes_given

Span = tuple[int, int]
Size = int | Callable[[], Any]
"""A number, or what writes its computation into the graph."""


def free_sizes(out: Emitter, call: Call, new: fx.Node, span: Span, made: Span) -> tuple[list[Any], list[Any]]:
    """Sizes of the output's axes before and after those that hold the selection; at most one of them is -1.

    Args:
        out: writes the graph.
        call: a reshape.
        new: its selected input, in which the axes of `span` are one.
        span: the input's axes that hold the selection.
        made: the output's axes that hold it.
    """
    before, after = call.shape(call.input) or (), call.output_shape

    def size_of(axis: int) -> fx.Node:
        return out.method("size", new, axis if axis < span[0] else axis - (span[1] - span[0]) + 1)

    groups = [*_groups(before, after, (0, span[0]), (0, made[0]))]
    groups += _groups(before, after, (span[1], len(before)), (made[1], len(after)))
    given, sizes = _given(out, call), dict[int, Size]()
    for axes, out_axes in groups:
        sizes.update(_sizes(out, axes, out_axes, given, after, size_of))
    computed = [axis for axis in sizes if callable(sizes[axis])]
    left_open = [axis for axis in sizes if sizes[axis] == -1]
    # torch computes one: the one that the code leaves open, if there is one
    inferred = next(iter((*left_open, *computed[-1:])), None)
    written = {axis: -1 if axis == inferred else size() if callable(size) else size for axis, size in sizes.items()}
    return [written[k] for k in range(made[0])], [written[k] for k in range(made[1], len(after))]


def _groups(before: Shape, after: Shape, span: Span, made: Span) -> list[tuple[list[int], list[int]]]:
    """Axes of the input, and the axes of the output that hold the same entries, as few together as the sizes allow."""
    ins, outs = list(range(*span)), list(range(*made))
    found = []
    while ins or outs:
        axes, out_axes = ins[:1], outs[:1]
        while (size := prod(before[k] for k in axes)) != (other := prod(after[k] for k in out_axes)):
            longer, rest = (axes, ins) if size < other else (out_axes, outs)
            longer.append(rest[len(longer)])
        ins, outs = ins[len(axes) :], outs[len(out_axes) :]
        found.append((axes, out_axes))
    return found


def _given(out: Emitter, call: Call) -> dict[int, Size]:
    """The sizes that the code itself gives, by axis of the output: numbers, -1, and what writes a computed one."""
    rank, given = len(call.output_shape), call.arguments.get("shape")
    if isinstance(given, tuple) and len(given) == 1 and rank > 1 and isinstance(like := given[0], fx.Node):
        tensor = call.shape(like) is not None  # `x.view_as(y)`, otherwise `x.view(y.shape)`
        return {axis: _size_of(out, like, axis) if tensor else _computed(out, like, axis) for axis in range(rank)}
    return {
        axis: _computed(out, size) if isinstance(size, fx.Node) else size for axis, size in sizes_given(call).items()
    }


def _size_of(out: Emitter, tensor: fx.Node, axis: int) -> Callable[[], Any]:
    return lambda: out.method("size", tensor, axis)


def _computed(out: Emitter, size: fx.Node, entry: int | None = None) -> Callable[[], Any]:
    """What writes a size that the code computes, or one of the sizes of a shape."""
    return lambda: out.size(size) if entry is None else out.function(operator.getitem, out.size(size), entry)


def _sizes(
    out: Emitter,
    axes: Sequence[int],
    out_axes: Sequence[int],
    given: dict[int, Size],
    after: Shape,
    size_of: Callable[[int], fx.Node],
) -> dict[int, Size]:
    """The sizes of a few output axes, which hold the entries of a few input axes."""

    def quotient(others: Sequence[Any]) -> Callable[[], Any]:
        def write() -> Any:
            product = reduce(lambda a, b: out.function(operator.mul, a, b), [size_of(k) for k in axes])
            return reduce(lambda a, b: out.function(operator.floordiv, a, b), [n for n in others if n != 1], product)

        return write

    numbers: dict[int, Size] = {k: n for k in out_axes if isinstance(n := given.get(k), int) and n >= 0}
    numbers |= {k: 1 for k in out_axes if after[k] == 1 and k not in given and len(out_axes) > 1}
    rest = [k for k in out_axes if k not in numbers]
    if len(rest) == 1 and axes:
        return {**numbers, rest[0]: quotient([*numbers.values()])}
    return {**numbers, **{k: given.get(k, after[k]) for k in rest}}
