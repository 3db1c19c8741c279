"""Run a network of 2-d convolutions channels last from end to end, as kernels in bfloat16 and float16 want it: a GPU's and a CPU's.

Rules, in order:
  1. Every convolution is 2-d, there is one at least, and all operations are among those that take any layout; else nothing is done, and
     the operation that stands in the way is named.
  2. Images are laid out channels last where they come in; convolutions and what is elementwise keep the layout.
  3. A teacher's weights are laid out so once. The student's are the user's own, which no pass touches: the trainer lays them out while
     it trains (`laid_out`).
  4. What takes one piece of memory for another shape (`view`), and every output, gets the usual layout: a loss may call `view` too.

Dropout of maps draws in the order of the memory, so other entries are dropped than in the usual layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from indistill_fx.graph.edit import add_module, copy_graph, output_node, stand_in, with_tensors
from indistill_fx.graph.ops import BINARY, UNARY, attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite

_CONVOLUTIONS = {"conv", "conv_transpose", "fused_conv", "cudnn_conv"}
_ANY_LAYOUT = (
    UNARY
    | BINARY
    | _CONVOLUTIONS
    | frozenset(
        "batch_norm group_norm instance_norm layer_norm rms_norm max_pool avg_pool adaptive_avg_pool adaptive_max_pool linear cat stack "
        "mean sum flatten reshape view softmax log_softmax interpolate pad permute _permute transpose movedim narrow _first_channels "
        "chunk split squeeze unsqueeze getitem size getattr shape resized rescaled index_select pixel_shuffle channel_shuffle matmul "
        "placeholder get_attr output".split()
    )
)


def keep_channels_last(graph_module: fx.GraphModule, *, frozen: bool) -> PassResult[fx.GraphModule, Rewrite]:
    """Run a half of a stage channels last, if all of it can.

    Args:
        graph_module: the half.
        frozen: whether its weights are the stage's own (a teacher's), and are laid out here.
    """
    reason = _obstacle(graph_module)
    if reason is not None:
        return PassResult(graph_module, Rewrite(skipped=(reason,)))
    new, _ = copy_graph(graph_module)
    done = []
    for node in list(new.graph.nodes):
        if node.op == "placeholder" and node.users:
            with new.graph.inserting_after(node):
                laid = new.graph.call_function(in_channels_last, (node,))
            node.replace_all_uses_with(laid, delete_user_cb=lambda user, laid=laid: user is not laid)
            done.append(f"{node.target}: channels last from here on")
        elif op_name(node) == "view":
            with new.graph.inserting_before(node):
                node.update_arg(0, new.graph.call_method("contiguous", (node.args[0],)))
            done.append(f"{node.name}: in the default layout")
        elif frozen and op_name(node) in _CONVOLUTIONS:
            layer = attribute(new, str(node.target))
            if not layer._forward_pre_hooks and not is_parametrized(layer):
                weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
                stand_in(node, add_module(new, f"{node.target}_laid", with_tensors(layer, {"weight": weight})))
    plain_outputs(new)
    new.delete_all_unused_submodules()
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(done)))


def in_channels_last(x: Any) -> Any:
    """The same images (batch, channels, height, width), the channels of a place beside each other in memory; all else as it is."""
    return x.contiguous(memory_format=torch.channels_last) if isinstance(x, Tensor) and x.ndim == 4 else x


def plain_outputs(graph_module: fx.GraphModule) -> None:
    """Lay out, in place, the features that a half delivers as usual; only for a graph the caller has just made."""
    output = output_node(graph_module.graph)
    outputs: Any = output.args[0]
    features, result = outputs
    plain = {}
    for tap, value in features.items():
        with graph_module.graph.inserting_before(output):
            plain[tap] = graph_module.graph.call_method("contiguous", (value,))
    output.args = ((plain, result),)


@contextmanager
def laid_out(module: nn.Module) -> Iterator[None]:
    """Within the block the weights (out, in, height, width) of a module are channels last; after it as before.

    Parameters stay the same objects, with the same values.
    """
    usual = [parameter for parameter in module.parameters() if parameter.ndim == 4 and parameter.is_contiguous()]
    for parameter in usual:
        parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for parameter in usual:
            parameter.data = parameter.data.contiguous()


def _obstacle(graph_module: fx.GraphModule) -> str | None:
    """Rule 1."""
    found = False
    for node in graph_module.graph.nodes:
        name = op_name(node)
        if name not in _ANY_LAYOUT:
            return f"{node.name}: it is not known whether `{name}` works in any layout"
        if name not in _CONVOLUTIONS:
            continue
        if node.op != "call_module":
            return f"{node.name}: its weights are computed"
        if attribute(graph_module, str(node.target)).weight.ndim != 4:
            return f"{node.name}: not 2-d"
        found = True
    return None if found else "no convolutions"
