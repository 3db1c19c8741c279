"""Run what follows a frozen convolution inside it: bias, residual sum and ReLU.

The sum and the ReLU are passes over memory of their own. On a CPU oneDNN also brings every feature map into its own layout and back;
one call does all of it, and with channels last nothing has to be brought anywhere. On a GPU cuDNN has one call for the same.

Rules, in order:
  1. Only 2-d convolutions with zero padding whose value nobody else reads; the graph must be frozen (a teacher's).
  2. relu(convolution) and relu(convolution + other) become one node, other being of the same shape.
  3. A convolution that neither applies to becomes such a node as well, so that the layout stays the same along the graph; cuDNN's call
     always ends in a ReLU, so there it stays as it is.
  4. Outputs are laid out as the student's.

On other devices, in other dtypes and under autocast the same node runs the stock operations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from indistill_fx.graph.computed_weights import why_opaque
from indistill_fx.graph.edit import add_module, copy_graph, stand_in
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.passes.lowering.layout import plain_outputs
from indistill_fx.traced import NodeFacts


class FusedConv(nn.Module):
    """A frozen convolution, perhaps plus another tensor, perhaps with a ReLU.

    Args:
        layer: its tensors are shared.
        relu: whether a ReLU ends it.
    """

    def __init__(self, layer: nn.Conv2d, *, relu: bool):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.stride, self.padding = tuple(layer.stride), tuple(map(int, layer.padding))
        self.dilation, self.groups, self.relu = tuple(layer.dilation), layer.groups, relu

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """The value, (batch, channels, height, width)."""
        if self._applies(x):
            return self._fused(x, other)
        result = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        result = result if other is None else result + other
        return F.relu(result) if self.relu else result

    def _fused(self, x: Tensor, other: Tensor | None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        end = "relu" if self.relu else None
        shape = (self.padding, self.stride, self.dilation, self.groups)
        call = torch.ops.mkldnn._convolution_pointwise
        if other is None:
            fused: Tensor = call(x, self.weight, self.bias, *shape, end or "none", [], "")
        else:
            other = other.contiguous(memory_format=torch.channels_last)
            fused = call.binary(x, other, self.weight, self.bias, *shape, "add", 1.0, end, [], "")
        return fused

    def _applies(self, x: Tensor) -> bool:
        plain = x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
        if not plain or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
            return False
        return torch.backends.mkldnn.is_available() and not (
            torch.is_autocast_enabled("cpu") or (torch.is_grad_enabled() and x.requires_grad)
        )

    def extra_repr(self) -> str:
        """What it does, for printing."""
        return f"stride={self.stride}, padding={self.padding}, groups={self.groups}, relu={self.relu}"


class CudnnConv(FusedConv):
    """The same by cuDNN: a frozen convolution, perhaps plus another tensor, and a ReLU. Other groups than one run the stock operations."""

    def _fused(self, x: Tensor, other: Tensor | None) -> Tensor:
        shape = (self.stride, self.padding, self.dilation, self.groups)
        if other is None:
            fused: Tensor = torch.cudnn_convolution_relu(x, self.weight, self.bias, *shape)
        else:
            fused = torch.cudnn_convolution_add_relu(x, self.weight, other, None, self.bias, *shape)
        return fused

    def _applies(self, x: Tensor) -> bool:
        if not x.is_cuda or x.dtype != self.weight.dtype or x.dtype not in _OF_CUDNN or torch.compiler.is_compiling():
            return False
        return (
            self.relu
            and self.groups == 1
            and torch.backends.cudnn.enabled
            and not (torch.is_grad_enabled() and x.requires_grad)
        )


_OF_CUDNN = (torch.float32, torch.float16, torch.bfloat16)


def fuse_convolutions(
    graph_module: fx.GraphModule, facts: Mapping[str, NodeFacts], kind: type[FusedConv] = FusedConv
) -> PassResult[fx.GraphModule, Rewrite]:
    """Take sums and ReLUs into the frozen convolutions before them.

    Args:
        graph_module: after `fold`.
        facts: of the model it was cut from; they show which sums are of equal shapes.
        kind: whose call it is to be: oneDNN's, or with `CudnnConv` cuDNN's.
    """
    hooked = tuple(_hooked(node, graph_module) for node in graph_module.graph.nodes if _hooked(node, graph_module))
    if not any(_fits(node, graph_module) for node in graph_module.graph.nodes):
        return PassResult(graph_module, Rewrite(skipped=hooked))
    new, _ = copy_graph(graph_module)
    done: list[str] = []
    convolutions = [node for node in new.graph.nodes if _fits(node, new)]
    for node in reversed(convolutions):  # if two convolutions are added, the later one takes the sum
        layer = attribute(new, str(node.target))
        other, last = None, node
        total = _only_reader(node)
        if total is not None and op_name(total) == "add":
            added = _other(total, node, facts)
            if added is not None and _is_relu(_only_reader(total)):
                other, last = added, total
        end = _only_reader(last)
        relu = _is_relu(end)
        if kind is CudnnConv and not relu:
            continue
        summands = [] if last is node else [last]
        summands += [end] if relu and end is not None else []
        done.append(
            f"{node.name}: one oneDNN call"
            if not summands
            else f"{node.name}: one call with {', '.join(o.name for o in summands)}"
        )
        stand_in(node, add_module(new, f"{node.target}_fused", kind(layer, relu=relu)))
        if other is not None:
            node.args, node.kwargs = (node.args[0], other), {}
            last.prepend(node)
        for old in summands:
            old.replace_all_uses_with(node)
        for old in reversed(summands):
            new.graph.erase_node(old)
    plain_outputs(new)
    new.delete_all_unused_submodules()
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(done), skipped=hooked))


def _hooked(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Why a convolution or ReLU is not fused: it has a hook or its own forward."""
    if node.op != "call_module" or op_name(node) not in ("conv", "relu"):
        return ""
    reason = why_opaque(attribute(graph_module, str(node.target)))
    return f"`{node.name}`: {reason}" if reason else ""


def _fits(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = attribute(graph_module, str(node.target))
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return False
    return not any(parameter.requires_grad for parameter in layer.parameters()) and why_opaque(layer) is None


def _only_reader(node: fx.Node) -> fx.Node | None:
    readers = list(node.users)
    return readers[0] if len(readers) == 1 else None


def _is_relu(node: fx.Node | None) -> bool:
    if node is None or op_name(node) != "relu" or len(node.all_input_nodes) != 1:
        return False
    module = attribute(node.graph.owning_module, str(node.target)) if node.op == "call_module" else None  # type: ignore[arg-type]
    return (
        node.op in ("call_module", "call_function")
        and len(node.args) == 1
        and (module is None or not why_opaque(module))
    )


def _other(total: fx.Node, node: fx.Node, facts: Mapping[str, NodeFacts]) -> fx.Node | None:
    """What is added to the node's value, if it is another tensor of the same shape."""
    if len(total.args) != 2 or total.kwargs:
        return None
    others = [arg for arg in total.args if arg is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    shapes = [facts[part.name].shape if part.name in facts else None for part in (node, others[0])]
    return others[0] if shapes[0] is not None and shapes[0] == shapes[1] else None
