"""Max-poolings: what each does, and the ReLU that is cheaper behind it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

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


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None
