"""Let a student's ReLUs write over what only they read.

`functionalize` makes every operation return a new tensor, so that no tap can be overwritten. Where nothing else reads the old
one, that is memory and time for nothing.

A ReLU overwrites the value it reads if
  1. it is its only reader (the graph's output is a reader too), and
  2. that value is made by a convolution, norm, sum or max-pooling, whose gradients need what they read and not what they gave, and
  3. neither module has hooks when the stage is compiled: a forward hook might keep what it sees, and behind a backward hook
     autograd allows no overwriting.
"""

from __future__ import annotations

from torch import fx, nn
from torch.nn import functional as F

from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.lowering.channels_last import max_pool_channels_last
from indistill_fx.passes.lowering.max_pool import max_pool_by_maxima

_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip
_FUNCTIONS = (max_pool_by_maxima, max_pool_channels_last)


def overwrite(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Rewrite, in place, a graph that nobody else holds, the last of all passes; says which ReLUs overwrite what they read."""
    done = []
    for node in list(graph_module.graph.nodes):
        source = node.args[0] if len(node.args) == 1 else None
        if not _is_relu(node, graph_module) or not isinstance(source, fx.Node) or len(source.users) != 1:
            continue
        if not _may_be_overwritten(source, graph_module):
            continue
        node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (source,), {"inplace": True}
        done.append(node.name)
    if done:
        graph_module.delete_all_unused_submodules()
        graph_module.graph.lint()
        graph_module.recompile()
    return tuple(done)


def _is_relu(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = attribute(graph_module, str(node.target))
        return type(module) is nn.ReLU and not _hooked(module)
    return node.op in ("call_function", "call_method") and op_name(node) == "relu" and len(node.all_input_nodes) == 1


def _may_be_overwritten(source: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Rules 2 and 3."""
    if source.op == "call_module":
        module = attribute(graph_module, str(source.target))
        return type(module) in _LAYERS and not _hooked(module)
    if source.op != "call_function":
        return False
    return source.target in _FUNCTIONS or (op_name(source) == "add" and len(source.all_input_nodes) == 2)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
