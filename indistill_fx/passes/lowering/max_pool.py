"""What a max-pooling does, in whatever form the model's author wrote it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from indistill_fx.graph.ops import attribute, op_name

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
        options = {name: getattr(module, name) for name in _NAMES}
    elif node.op == "call_function":
        name = str(getattr(node.target, "__name__", ""))
        keywords = {key: value for key, value in node.kwargs.items() if key != "input"}
        options = {**_DEFAULTS, **dict(zip(_NAMES, node.args[1:], strict=False)), **keywords}
    else:
        return None
    kernel, padding, dilation = (_pair(options.get(key)) for key in ("kernel_size", "padding", "dilation"))
    stride = _pair(options["stride"]) if options["stride"] is not None else kernel
    if "2d" not in name or options["return_indices"] or not isinstance(options["ceil_mode"], bool):
        return None
    if kernel is None or stride is None or padding is None or dilation is None:
        return None
    return Pooling(kernel, stride, padding, dilation, options["ceil_mode"])


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None
