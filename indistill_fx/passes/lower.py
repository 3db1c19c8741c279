"""Replace operations by cheaper ones that compute the same value: max-pooling by elementwise maxima.

PyTorch's max-pooling on a CPU walks through every window by itself; maxima of shifted slices run many entries at a
time and give exactly the same values, and, because the first of equal entries is chosen too, the same gradient.

Only windows that do not overlap, without padding, dilation or ceil mode; on other devices the stock kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from indistill_fx.ops import attribute, op_name

_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_DEFAULTS = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}


def lower(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Rewrite, in place, a graph that nobody else holds; says which nodes were replaced."""
    done = []
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if node.args else None
        if op_name(node) != "max_pool" or not isinstance(source, fx.Node):
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
        (batch, channels, height // rows, width // columns), equal to `F.max_pool2d(x, window)`; so is the gradient.
    """
    if not x.is_cpu or torch.compiler.is_compiling():  # inductor writes a loop of its own, and a good one
        return F.max_pool2d(x, window)
    result: Tensor = _Maxima.apply(x, window)
    return result


class _Maxima(torch.autograd.Function):
    """Maxima over windows and their places; the gradient is that of the stock operation, which needs nothing but the places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int]) -> Tensor:
        height, width = x.shape[2] // window[0] * window[0], x.shape[3] // window[1] * window[1]
        offsets = [(row, column) for row in range(window[0]) for column in range(window[1])]
        parts = [x[:, :, row : height : window[0], column : width : window[1]] for row, column in offsets]
        maxima = parts[0].clone()
        chosen = torch.zeros(maxima.shape, dtype=torch.int32)
        for (row, column), part in zip(offsets[1:], parts[1:], strict=True):
            if x.requires_grad:
                larger = part > maxima
                chosen.mul_(~larger).add_(
                    larger, alpha=row * x.shape[3] + column
                )  # torch.where is ten times slower here
            torch.maximum(maxima, part, out=maxima)
        if x.requires_grad:
            first = torch.arange(0, height, window[0])[:, None] * x.shape[3] + torch.arange(0, width, window[1])
            ctx.save_for_backward(x, first + chosen)
            ctx.window = window
        return maxima

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, places = ctx.saved_tensors
        window = ctx.window
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradients[0], x, window, window, (0, 0), (1, 1), False, places
        ), None


def _window(node: fx.Node, graph_module: fx.GraphModule) -> tuple[int, int] | None:
    """The window, if the pooling is of the kind that can be replaced."""
    if node.op == "call_module":
        module = attribute(graph_module, str(node.target))
        told = {name: getattr(module, name) for name in _NAMES}
    elif node.op == "call_function":
        told = {
            **_DEFAULTS,
            **dict(zip(_NAMES, node.args[1:], strict=False)),
            **{k: v for k, v in node.kwargs.items() if k != "input"},
        }
    else:
        return None
    sizes = {name: _pair(told.get(name)) for name in _NAMES[:4]}
    kernel = sizes["kernel_size"]
    plain = (
        sizes["padding"] == (0, 0)
        and sizes["dilation"] == (1, 1)
        and not told["ceil_mode"]
        and not told["return_indices"]
    )
    if kernel is None or not plain or sizes["stride"] not in (None, kernel) or not _is_2d(node):
        return None
    return kernel


def _is_2d(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    name = (
        type(attribute(owner, str(node.target))).__name__
        if node.op == "call_module" and owner
        else str(getattr(node.target, "__name__", ""))
    )
    return "2d" in name


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None
