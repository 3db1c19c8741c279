"""Write into a graph what no input can change: the sizes of channels as numbers, and lists of parts as lists of their tensors.

Rules, in order:
  1. An axis is open if its size follows the batch, the image's height and width (the length of the ids), or the frames or steps that
     come after the batch; all others are static. The graph is run on tensors without data to see which. Where it runs at no other image
     size, only axes of channels count as static; where that is because it takes numbers out of tensors (`item`), none do.
  2. What is computed from static sizes alone is a number, and stands where it was used. Sizes of open axes stay computed, and so do
     `x.dtype` and `x.device`.
  3. A list of tensors that is used as a whole (`cat(x.chunk(2, 1)[::-1], 1)`) is written out, if every run gives as many.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_aggregate

from indistill_fx.graph.edit import copy_graph, tensor_nodes
from indistill_fx.graph.ops import function_name

Shape = tuple[int, ...]
_OPEN = object()
"""An entry of a tuple of sizes that an input can change."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The shape of one node's tensor, and which of its axes are open."""

    shape: Shape
    open: frozenset[int]


def has_sizes(graph_module: fx.GraphModule, shapes: Mapping[str, Shape]) -> bool:
    """Whether any operation of the graph reads a size, or hands on a list of tensors."""
    return any(node.op.startswith("call") and node.name not in shapes for node in graph_module.graph.nodes)


def fold_static(
    graph_module: fx.GraphModule, axes: Mapping[str, Axes], counts: Mapping[str, int]
) -> tuple[fx.GraphModule, bool]:
    """Rules 2 and 3.

    Args:
        graph_module: the captured graph; it is not changed.
        axes: per node whose value is one tensor.
        counts: per node whose value is a flat tuple of tensors, how many.

    Returns:
        The new graph, in which all other nodes keep their names, and whether anything changed.
    """
    new, _ = copy_graph(graph_module)
    values: dict[fx.Node, Any] = {}
    changed = False
    for node in list(new.graph.nodes):
        if node.op == "placeholder":
            continue
        args, kwargs = _written(node, node.args, values), _written(node, node.kwargs, values)
        if (args, kwargs) != (node.args, node.kwargs):
            node.args, node.kwargs, changed = args, kwargs, True
        if node.op in ("call_function", "call_method") and node.name not in axes:
            values[node] = _value(node, axes, values)
            if values[node] is _OPEN and node.name in counts and any(map(_reads_whole, node.users)):
                values[node] = _parts(node, counts[node.name])
    for node in reversed(list(new.graph.nodes)):
        if node in values and not _is_open(values[node]) and not node.users:
            new.graph.erase_node(node)
    if not changed:
        return graph_module, False
    new.graph.lint()
    new.recompile()
    return new, True


def _written(reader: fx.Node, given: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Arguments in which known values replace the nodes that compute them."""

    def write(leaf: Any) -> Any:
        value = values.get(leaf, _OPEN) if isinstance(leaf, fx.Node) else _OPEN
        keeps = _is_open(value) or (_is_list(value) and not _reads_whole(reader)) or reader.op == "output"
        return leaf if keeps else value

    return map_aggregate(given, write)


def _reads_whole(user: fx.Node) -> bool:
    return user.op != "output" and (user.target is not operator.getitem or not isinstance(user.args[1], int))


def _parts(node: fx.Node, count: int) -> tuple[fx.Node, ...]:
    """The tensors of a list, each as a node before all readers of the list."""
    list_readers = [user for user in node.users if _reads_whole(user)]
    ready = {user.args[1]: user for user in node.users if all(user < other for other in list_readers)}
    found, last = [], node
    for k in range(count):
        if k not in ready:
            with node.graph.inserting_after(last):
                last = ready[k] = node.graph.call_function(operator.getitem, (node, k))
            last.meta = dict(node.meta)
        found.append(ready[k])
    return tuple(found)


def _is_list(value: Any) -> bool:
    return isinstance(value, tuple) and any(isinstance(entry, fx.Node) for entry in value)


def _is_open(value: Any) -> bool:
    return value is _OPEN or (isinstance(value, (tuple, list)) and any(map(_is_open, value)))


def _value(node: fx.Node, axes: Mapping[str, Axes], values: Mapping[fx.Node, Any]) -> Any:
    """A node's number, or tuple of numbers or nodes; the whole or single entries may be unknown."""
    first: Any = node.args[0] if node.args else None
    if isinstance(first, fx.Node) and first.name in axes:
        return _size(node, axes[first.name])
    known = values.get(first) if isinstance(first, fx.Node) else tuple(first) if isinstance(first, list) else first
    if node.target is operator.getitem and isinstance(known, tuple):
        picked = known[node.args[1]] if not tensor_nodes(node.args[1]) else _OPEN  # type: ignore[index]
        return picked
    if node.target is len and isinstance(known, tuple):
        return len(known)
    if not _is_arithmetic(node) or tensor_nodes((node.args, node.kwargs)):
        return _OPEN
    try:
        found = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
    except Exception:  # running the graph will raise the same error
        return _OPEN
    return found if isinstance(found, (bool, int, float, tuple)) else _OPEN


def _size(node: fx.Node, axes: Axes) -> Any:
    """The number that an operation reads from a tensor's shape."""
    attribute = node.target is getattr
    name = str(node.args[1]) if attribute else function_name(node.target)
    sizes = tuple(_OPEN if k in axes.open else n for k, n in enumerate(axes.shape))
    if name in ("size", "shape"):
        dims = () if attribute else (*node.args[1:], *node.kwargs.values())
        if not dims or dims[0] is None:
            return sizes
        return sizes[dims[0]] if isinstance(dims[0], int) and -len(sizes) <= dims[0] < len(sizes) else _OPEN
    if name in ("dim", "ndim", "ndimension"):
        return len(sizes)
    if name in ("len", "__len__"):
        return sizes[0] if sizes else _OPEN
    return math.prod(axes.shape) if name in ("numel", "nelement") and not axes.open else _OPEN


def _is_arithmetic(node: fx.Node) -> bool:
    """Whether a node calls an operator or function of Python that computes with numbers."""
    name = str(getattr(node.target, "__name__", ""))
    return node.target is not getattr and any(
        getattr(home, name, None) is node.target for home in (operator, math, builtins)
    )


def static_axes(runs: Sequence[Mapping[str, Shape]], channels: Mapping[str, int | None] | None) -> dict[str, Axes]:
    """Rule 1.

    Args:
        runs: per run the shapes of all tensors; they differ in the batch, in the image's size and in frames, where those may be others.
        channels: the axis of channels per node, where nothing is known of other image sizes; else None.
    """
    found = {}
    for name, shape in runs[0].items():
        others = [run[name] for run in runs if name in run]
        varying = {k for other in others for k in range(len(shape)) if len(other) != len(shape) or other[k] != shape[k]}
        if channels is not None:
            varying |= {k for k in range(len(shape)) if k != channels.get(name)}
        found[name] = Axes(shape, frozenset(varying))
    return found


def count_of(value: Any) -> int | None:
    """How many tensors a flat tuple or list holds; None for anything else."""
    flat = type(value) in (tuple, list) and value and all(isinstance(entry, Tensor) for entry in value)
    return len(value) if flat else None
