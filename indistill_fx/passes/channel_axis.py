"""Which axis of each tensor holds the channels: carried along the graph from the operations that fix it.

Convolutions put channels on axis 1 and linear layers on the last; layout operations move the axis; everything else keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import fx

from indistill_fx.graphs import tensor_nodes
from indistill_fx.ops import op_name

_FIRST = frozenset(
    "conv conv_transpose batch_norm instance_norm group_norm max_pool avg_pool adaptive_avg_pool adaptive_max_pool".split()
)
_LAST = frozenset("linear embedding layer_norm multihead_attention".split())
_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze".split())
Shape = tuple[int, ...]


def channel_axes(
    graph_module: fx.GraphModule, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]
) -> dict[str, int | None]:
    """The channel axis of every node in `shapes`; None where no axis holds channels."""
    axes: dict[str, int | None] = {}
    for node in graph_module.graph.nodes:
        if node.name in shapes:
            floating = dtypes[node.name].is_floating_point
            axes[node.name] = _axis(node, shapes, axes) if floating else None
    return axes


def _axis(node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None]) -> int | None:
    shape, name = shapes[node.name], op_name(node)
    rank = len(shape)
    if rank < 2 or node.op == "get_attr":
        return rank - 1 if rank else None
    if node.op == "placeholder" or name in _FIRST:
        return 1
    if name in _LAST:
        return rank - 1
    source = _main_source(node, shapes, axes)
    if source is None:
        return {2: 1, 3: 2, 4: 1, 5: 1}.get(rank)
    before, axis = shapes[source.name], axes[source.name]
    if axis is None:
        return None if rank > 2 else 1
    if name == "permute":
        order = _ints(node.args[1:])
        return [d % rank for d in order].index(axis) if len(order) == rank else None
    if name == "transpose" and (dims := _ints(node.args[1:]) or _ints(tuple(node.kwargs.values()))):
        a, b = (d % rank for d in dims)
        return {a: b, b: a}.get(axis, axis)
    if name in _RESHAPES or len(before) != rank:
        return _through_reshape(before, shape, axis)
    return axis


def _main_source(node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None]) -> fx.Node | None:
    """The input that the output's layout follows: the first of the same rank that grows with the batch, else the first with a shape."""
    inputs = [n for n in tensor_nodes((node.args, node.kwargs)) if n.name in shapes and n.op != "get_attr"]
    same = [n for n in inputs if len(shapes[n.name]) == len(shapes[node.name]) and axes[n.name] is not None]
    full = [n for n in same if shapes[n.name] == shapes[node.name]]
    return next(iter((*full, *same, *inputs)), None)


def _through_reshape(before: Shape, after: Shape, axis: int) -> int | None:
    """Where the axis goes when a tensor is reshaped: the axis of the same size and the same product of sizes before it.

    >>> _through_reshape((2, 64, 7, 7), (2, 64, 49), 1)
    1
    >>> _through_reshape((2, 64, 1, 1), (2, 64), 1)
    1
    >>> _through_reshape((2, 49, 64), (2, 7, 7, 64), 2)
    3
    """
    outer = prod(before[:axis])
    for k, n in enumerate(after):
        if n == before[axis] and prod(after[:k]) == outer:
            return k
    if len(after) == 2:
        return 1
    return None


def _ints(values: tuple[object, ...]) -> list[int]:
    flat = values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values
    return [v for v in flat if isinstance(v, int)]
