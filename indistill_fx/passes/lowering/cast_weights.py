"""Keep a frozen teacher's weights in the dtype that it is computed in, so that no step casts them again.

Autocast casts the weights of convolutions and matrix products in every call, unless they are trained. Here that is done once, with the
same values.

Rules, in order:
  1. Only layers of torch.nn whose operation autocast runs in the lower precision: convolutions, linear layers, attention.
  2. Their weights and biases are cast once, their inputs at every call.
  3. Outside autocast the value gets the input's dtype again, so that what follows finds what it would have found.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_map

from indistill_fx.graph.edit import add_module, copy_graph, stand_in, with_tensors
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.passes.lowering.fused_conv import CudnnConv

_REDUCED = (torch.bfloat16, torch.float16)
_KINDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.Linear, nn.MultiheadAttention, CudnnConv),
)


class InDtype(nn.Module):
    """A frozen layer that computes in a dtype, and gives its value in that of its input, or of autocast.

    Args:
        layer: its tensors are in that dtype.
        dtype: float16 or bfloat16.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.layer, self.dtype = layer, dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, computed in the other dtype."""
        cast: dict[int, Any] = {}  # attention compares its inputs by identity, so equal inputs must stay one tensor

        def once(value: Any) -> Any:
            return cast.setdefault(id(value), _cast(value, self.dtype))

        cast_args, cast_kwargs = tree_map(once, ((x, *args), kwargs))
        found = self.layer(*cast_args, **cast_kwargs)
        if torch.is_autocast_enabled(x.device.type):
            return found
        return tree_map(lambda value: _cast(value, x.dtype), found)

    def extra_repr(self) -> str:
        """The dtype, for printing."""
        return str(self.dtype).removeprefix("torch.")


def cast_weights(graph_module: fx.GraphModule, dtype: torch.dtype | None) -> PassResult[fx.GraphModule, Rewrite]:
    """Cast the weights of a frozen graph to the dtype it is computed in.

    Args:
        graph_module: after `fold`.
        dtype: of the target; other than float16 and bfloat16 there is nothing to do.
    """
    fitting = [node for node in graph_module.graph.nodes if _fits(node, graph_module)]
    if dtype not in _REDUCED or not fitting:
        return PassResult(graph_module, Rewrite())
    new, nodes = copy_graph(graph_module)
    cast: dict[str, str] = {}  # a layer with several calls is cast once
    for node in (nodes[old.name] for old in fitting):
        path = str(node.target)
        if path not in cast:
            cast[path] = add_module(new, f"{path}_cast", InDtype(_in_dtype(attribute(new, path), dtype), dtype))
        stand_in(node, cast[path])
    new.delete_all_unused_submodules()
    new.recompile()
    dtype_name = str(dtype).removeprefix("torch.")
    return PassResult(new, Rewrite(done=tuple(f"{path}: weights in {dtype_name}" for path in cast)))


def _fits(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if node.op != "call_module" or not node.args:
        return False
    layer = attribute(graph_module, str(node.target))
    tensors = [*layer.parameters()]
    if type(layer) not in _KINDS or any(is_parametrized(part) for part in layer.modules()):
        return False
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    return not hooked and all(p.dtype == torch.float32 and not p.requires_grad for p in tensors)


def _in_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    parameters = {name: p.detach().to(dtype) for name, p in layer._parameters.items() if p is not None}
    new = with_tensors(layer, dict(parameters))
    for name, child in layer._modules.items():
        if child is not None:
            new._modules[name] = _in_dtype(child, dtype)
    return new


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
