"""Replace operations by cheaper ones that compute the same value: max-pooling by elementwise maxima.

PyTorch's max-pooling on a CPU walks through every window by itself; maxima of shifted slices run many entries at a
time and give exactly the same values, and, because the first of equal entries is chosen too, the same gradient.

Only windows that do not overlap, without padding, dilation or ceil mode; on other devices the stock kernel runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from indistill_fx.graph.edit import copy_graph
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite


def relu_after_pool(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Take a ReLU behind the max-pooling that follows it, where it mostly has a quarter of the entries.

    max(relu(a), relu(b)) = relu(max(a, b)), exactly. The gradient is the same too: where a window's maximum is above 0 it is at the
    same place, the first of equal ones; elsewhere both orders let nothing through. A value that others read stays where it is.
    """
    if not any(_movable_relu(node, graph_module) for node in graph_module.graph.nodes):
        return PassResult(graph_module, Rewrite())
    new, _ = copy_graph(graph_module)
    done = []
    for pool in list(new.graph.nodes):
        relu = _movable_relu(pool, new)
        if relu is None:
            continue
        pool.update_arg(0, relu.args[0])
        pool.replace_all_uses_with(relu)
        pool.append(relu)  # moves it
        relu.update_arg(0, pool)
        done.append(f"{relu.name}: moved behind {pool.name}")
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(done)))


def _movable_relu(pool: fx.Node, graph_module: fx.GraphModule) -> fx.Node | None:
    relu = pool.args[0] if pooling_of(pool, graph_module) is not None else None
    if isinstance(relu, fx.Node) and op_name(relu) == "relu" and len(relu.users) == 1 and len(relu.args) == 1:
        return relu
    return None


_NAMES = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_DEFAULTS = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}


def pool_by_maxima(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Replace max-poolings whose windows do not overlap by `max_pool_by_maxima`."""
    poolings = {node.name: pooling_of(node, graph_module) for node in graph_module.graph.nodes}
    windows = {name: _window(pooling) for name, pooling in poolings.items() if pooling is not None}
    skipped = tuple(f"{name}: its windows overlap, or are padded" for name, window in windows.items() if window is None)
    if not any(windows.values()):
        return PassResult(graph_module, Rewrite(skipped=skipped))
    new, nodes = copy_graph(graph_module)
    done = []
    for name, window in windows.items():
        if window is not None:
            node = nodes[name]
            with new.graph.inserting_before(node):
                maxima = new.graph.call_function(max_pool_by_maxima, (node.args[0], window))
            node.replace_all_uses_with(maxima)
            new.graph.erase_node(node)
            done.append(f"{name}: maxima over {window[0]}x{window[1]}")
    new.delete_all_unused_submodules()
    new.recompile()
    return PassResult(new, Rewrite(tuple(done), skipped))


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
            ctx.save_for_backward(x, small(first + chosen, x))
            ctx.window = window
        return maxima

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        x, places = ctx.saved_tensors
        window = ctx.window
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradients[0], x, window, window, (0, 0), (1, 1), False, places.long()
        ), None


def small(places: Tensor, x: Tensor) -> Tensor:
    """The places in `x` (…, height, width), as row * width + column, in the smallest type that holds them: they are kept for long."""
    return places.to(torch.int16 if x.shape[-2] * x.shape[-1] <= 2**15 else torch.int32)


@dataclass(frozen=True, slots=True)
class Pooling:
    """What a 2-d max-pooling does; sizes are (rows, columns)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool


def pooling_of(node: fx.Node, graph_module: fx.GraphModule) -> Pooling | None:
    """What the node does, if it is a 2-d max-pooling of one tensor that gives one tensor."""
    if op_name(node) != "max_pool" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module":
        module = attribute(graph_module, str(node.target))
        name = type(module).__name__
        told = {name: getattr(module, name) for name in _NAMES}
    elif node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        own = {key: value for key, value in node.kwargs.items() if key != "input"}
        told = {**_DEFAULTS, **dict(zip(_NAMES, node.args[1:], strict=False)), **own}
    else:
        return None
    kernel, padding, dilation = (_pair(told.get(key)) for key in ("kernel_size", "padding", "dilation"))
    stride = _pair(told["stride"]) if told["stride"] is not None else kernel
    if "2d" not in name or told["return_indices"] or not isinstance(told["ceil_mode"], bool):
        return None
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    return Pooling(kernel, stride, padding, dilation, told["ceil_mode"])


def _window(pooling: Pooling | None) -> tuple[int, int] | None:
    """The window, if the pooling is of the kind that can be replaced by maxima."""
    if pooling is None or pooling.stride != pooling.kernel_size or pooling.ceil_mode:
        return None
    return pooling.kernel_size if pooling.padding == (0, 0) and pooling.dilation == (1, 1) else None


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None
