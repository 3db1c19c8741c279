"""Replace operations by cheaper ones that compute the same value: max-pooling by elementwise maxima.

PyTorch's max-pooling on a CPU searches every window for the place of its maximum, because the gradient needs it; maxima of shifted slices are
many times faster and give exactly the same values.

Rules, in order:
  1. Only windows that do not overlap, without padding, dilation or ceil mode, and only on a CPU (elsewhere the stock kernel runs).
  2. On a graph that is trained, only behind a ReLU. Where two entries of a window are equal the two ways send the gradient to different
     places; behind a ReLU equal entries are zeros, through which no gradient passes, so that the gradients are equal too.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from indistill_fx.ops import attribute, op_name

_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_DEFAULTS = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}


def lower(graph_module: fx.GraphModule, *, trained: bool) -> tuple[str, ...]:
    """Rewrite, in place, a graph that nobody else holds; says which nodes were replaced.

    Args:
        graph_module: from `cut`.
        trained: whether gradients flow through the graph (rule 2).
    """
    done = []
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if node.args else None
        if op_name(node) != "max_pool" or not isinstance(source, fx.Node) or (trained and op_name(source) not in ("relu", "relu6")):
            continue
        window = _window(node, graph_module)
        if window is not None:
            with graph_module.graph.inserting_before(node):
                new = graph_module.graph.call_function(max_pool_by_maxima, (source, window))
            node.replace_all_uses_with(new)
            graph_module.graph.erase_node(node)
            done.append(node.name)
    if done:
        graph_module.delete_all_unused_submodules()
        graph_module.recompile()
    return tuple(done)


def max_pool_by_maxima(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Max-pooling over windows that do not overlap.

    Args:
        x: (batch, channels, height, width).
        window: (rows, columns).

    Returns:
        (batch, channels, height // rows, width // columns), equal to `F.max_pool2d(x, window)`.
    """
    if not x.is_cpu:
        return F.max_pool2d(x, window)
    for axis, size in zip((2, 3), window, strict=True):
        count = x.shape[axis] // size
        parts = [_every(x, axis, first, size, count) for first in range(size)]
        x = parts[0]
        for part in parts[1:]:
            x = torch.maximum(x, part)
    return x


def _every(x: Tensor, axis: int, first: int, step: int, count: int) -> Tensor:
    stop = first + step * (count - 1) + 1
    return x[:, :, first:stop:step] if axis == 2 else x[:, :, :, first:stop:step]


def _window(node: fx.Node, graph_module: fx.GraphModule) -> tuple[int, int] | None:
    """The window of a pooling that rule 1 allows."""
    if node.op == "call_module":
        module = attribute(graph_module, str(node.target))
        told = {name: getattr(module, name) for name in _NAMES}
    elif node.op == "call_function":
        told = {**_DEFAULTS, **dict(zip(_NAMES, node.args[1:], strict=False)), **{k: v for k, v in node.kwargs.items() if k != "input"}}
    else:
        return None
    sizes = {name: _pair(told.get(name)) for name in _NAMES[:4]}
    kernel = sizes["kernel_size"]
    plain = sizes["padding"] == (0, 0) and sizes["dilation"] == (1, 1) and not told["ceil_mode"] and not told["return_indices"]
    if kernel is None or not plain or sizes["stride"] not in (None, kernel) or not _is_2d(node):
        return None
    return kernel


def _is_2d(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    name = type(attribute(owner, str(node.target))).__name__ if node.op == "call_module" and owner else str(getattr(node.target, "__name__", ""))
    return "2d" in name


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None
