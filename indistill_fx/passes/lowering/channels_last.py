"""Run overlapping max-poolings channels last, and the chain of layers before them.

PyTorch's max-pooling on a CPU looks at one channel of one window at a time; with channels last it takes as many channels as the
processor can at once, ten times faster forward. So a chain convolution → norm → ReLU → max-pooling, the stem of most networks, is
brought into that layout once, at its beginning, and out of it after the pooling. Values are those of the same layers in another
order of summation.

Only stock 2-d poolings. On other devices, and under torch.compile, which lays tensors out by itself, the stock operation runs and
nothing is moved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from indistill_fx.graph.edit import copy_graph
from indistill_fx.graph.ops import UNARY, attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.passes.lowering.layout import in_channels_last
from indistill_fx.passes.lowering.max_pool import Pooling, pooling_of, small

# Operations whose random numbers depend on the memory layout.
_RANDOM = frozenset("dropout alpha_dropout rrelu stochastic_depth drop_path".split())
_FREE = UNARY - _RANDOM - {"contiguous"} | {"batch_norm"}


def stem_channels_last(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Run max-poolings, and the chains that lead to them, channels last; nothing is done where the whole graph is so already."""
    nodes = graph_module.graph.nodes
    if any(node.target is in_channels_last for node in nodes) or not any(pooling_of(n, graph_module) for n in nodes):
        return PassResult(graph_module, Rewrite())
    new, _ = copy_graph(graph_module)
    graph = new.graph
    done = []
    for node in list(graph.nodes):
        pooling = pooling_of(node, new)
        if pooling is None:
            continue
        first = _first_of_chain(node, new)
        with graph.inserting_before(first):
            first.update_arg(0, graph.call_function(channels_last, (first.args[0],)))
        with graph.inserting_before(node):
            pooled = graph.call_function(max_pool_channels_last, (node.args[0], *_sizes(pooling), pooling.ceil_mode))
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)
        done.append(f"{node.name}: channels last from {first.name} on")
    new.delete_all_unused_submodules()
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(done)))


def channels_last(x: Tensor) -> Tensor:
    """The same tensor (batch, channels, height, width), on a CPU with the channels of a place beside each other in memory."""
    return x.contiguous(memory_format=torch.channels_last) if _moves(x) else x


def max_pool_channels_last(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """`F.max_pool2d` of (batch, channels, height, width), computed channels last; the result is laid out as usual."""
    if not _moves(x):
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    result: Tensor = _Pool.apply(channels_last(x), kernel_size, stride, padding, dilation, ceil_mode)
    return result.contiguous()


class _Pool(torch.autograd.Function):
    """Max pooling that stores its indices in two or four bytes each, where torch's takes eight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        value, places = torch.ops.aten.max_pool2d_with_indices(x, *options)
        ctx.save_for_backward(x, small(places, x))
        ctx.options = options
        return value  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, places = ctx.saved_tensors
        gradient = channels_last(gradients[0])  # otherwise the kernel copies all its inputs into the contiguous layout
        given = torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *ctx.options, places.long())
        return given, None, None, None, None, None


def _moves(x: Tensor) -> bool:
    return x.is_cpu and x.ndim == 4 and not torch.compiler.is_compiling()


def _sizes(pooling: Pooling) -> tuple[tuple[int, int], ...]:
    return pooling.kernel_size, pooling.stride, pooling.padding, pooling.dilation


def _first_of_chain(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node:
    """The first node of a chain of convolutions and elementwise operations, each of which only the next one reads."""
    while True:
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) != 1 or not _runs_in_any_layout(source, graph_module):
            return node
        node = source


def _runs_in_any_layout(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if not node.args or not isinstance(node.args[0], fx.Node) or len(node.all_input_nodes) != 1:
        return False
    if op_name(node) == "conv":
        return node.op == "call_module" and type(attribute(graph_module, str(node.target))) is torch.nn.Conv2d
    return op_name(node) in _FREE
