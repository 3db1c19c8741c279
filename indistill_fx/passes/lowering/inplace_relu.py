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

from indistill_fx.graph.edit import copy_graph
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.passes.lowering.channels_last import channels_last, max_pool_channels_last

_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip
_FUNCTIONS = (max_pool_channels_last,)


def inplace_relu(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Let ReLUs overwrite what only they read; the last of all passes."""
    verdicts = {node.name: _refusal(node, graph_module) for node in graph_module.graph.nodes if _is_relu(node)}
    skipped = tuple(f"{name}: {why}" for name, why in verdicts.items() if why)
    if all(verdicts.values()):
        return PassResult(graph_module, Rewrite(skipped=skipped))
    new, nodes = copy_graph(graph_module)
    done = []
    for name, why in verdicts.items():
        if not why:
            node, source = nodes[name], nodes[name].args[0]
            node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (source,), {"inplace": True}
            done.append(f"{name}: overwrites {source}")
    new.delete_all_unused_submodules()
    new.recompile()
    return PassResult(new, Rewrite(tuple(done), skipped))


def _is_relu(node: fx.Node) -> bool:
    return node.op in ("call_module", "call_function", "call_method") and op_name(node) == "relu"


def _refusal(node: fx.Node, graph_module: fx.GraphModule) -> str:
    """Why a ReLU may not overwrite what it reads; empty if it may."""
    source = node.args[0] if len(node.args) == 1 and len(node.all_input_nodes) == 1 else None
    if not isinstance(source, fx.Node):
        return "it reads no single tensor"
    if node.op == "call_module":
        module = attribute(graph_module, str(node.target))
        if type(module) is not nn.ReLU:
            return f"it is a {type(module).__name__}"
        if _hooked(module):
            return "it has hooks"
    if len(source.users) != 1:
        return f"`{source.name}` is read by others too"
    if not _may_be_overwritten(source, graph_module):
        return f"the gradient of `{source.name}` may need its value, or it has hooks"
    return ""


def _may_be_overwritten(source: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Rules 2 and 3."""
    if source.op == "call_module":
        module = attribute(graph_module, str(source.target))
        return type(module) in _LAYERS and not _hooked(module)
    if source.op != "call_function":
        return False
    if source.target is channels_last:  # which may give the very tensor it was given
        origin = source.args[0]
        return isinstance(origin, fx.Node) and len(origin.users) == 1 and _may_be_overwritten(origin, graph_module)
    return source.target in _FUNCTIONS or (op_name(source) == "add" and len(source.all_input_nodes) == 2)


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
