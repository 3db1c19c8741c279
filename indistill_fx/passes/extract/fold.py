"""Make a frozen teacher as cheap as its mathematics: batch norms folded into what they follow, dead operations removed, no gradients.

Rules, in order:
  1. Operations that do nothing in eval mode (dropout, identity, stochastic depth) are removed, unless they have hooks.
  2. A batch norm whose only source is a convolution or linear layer that nobody else reads is folded into its weights.
  3. Every parameter becomes a tensor of its own without gradient, so that moving or freezing the graph never touches the caller's model.
"""

from __future__ import annotations

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from indistill_fx.graph.computed_weights import why_opaque
from indistill_fx.graph.edit import add_module, copy_graph, stand_in, sweep, with_tensors
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.contract import PassResult, Rewrite

_IDLE = frozenset("dropout alpha_dropout identity stochastic_depth drop_path".split())


def fold(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Fold an eval-mode graph into a smaller one that computes the same, up to round-off.

    Args:
        graph_module: in eval mode.

    Returns:
        The new graph; its tensors share storage with the old ones where nothing was folded.
    """
    new, _ = copy_graph(graph_module)
    removed, kept = _remove_idle(new)
    folded: list[str] = []
    for node in list(new.graph.nodes):
        if op_name(node) != "batch_norm":
            continue
        reason = _fold_norm(node, new)
        (kept if reason else folded).append(f"{node.name}: {reason}" if reason else f"{node.name}: folded")
    _freeze(sweep(new))
    new.train(False)
    return PassResult(new, Rewrite(done=(*(f"{name}: removed" for name in removed), *folded), skipped=tuple(kept)))


def _remove_idle(graph_module: fx.GraphModule) -> tuple[list[str], list[str]]:
    """Rule 1: the nodes that were removed, and those that stay for their hooks, with the reason."""
    removed, hooked = [], []
    for node in list(graph_module.graph.nodes):
        idle = node.op in ("call_module", "call_function") and op_name(node) in _IDLE
        if not idle or not node.args or not isinstance(node.args[0], fx.Node) or _active(node, graph_module):
            continue
        if node.op == "call_module" and (reason := why_opaque(attribute(graph_module, str(node.target)))):
            hooked.append(f"{node.name}: {reason}")
            continue
        node.replace_all_uses_with(node.args[0])
        graph_module.graph.erase_node(node)
        removed.append(node.name)
    return removed, hooked


def _active(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    """Whether a dropout is active: a module in train mode, or a function called with training=True (its default)."""
    if op_name(node) == "identity":
        return False
    if node.op == "call_module":
        return bool(attribute(graph_module, str(node.target)).training)
    default = op_name(node) != "drop_path"
    position = 3 if op_name(node) == "stochastic_depth" else 2
    return bool(node.kwargs.get("training", node.args[position] if len(node.args) > position else default))


def _fold_norm(node: fx.Node, graph_module: fx.GraphModule) -> str | None:
    """Fold one batch norm into its source; returns why not, or None when done."""
    source = node.args[0] if node.args else None
    if node.op != "call_module" or not isinstance(source, fx.Node) or source.op != "call_module":
        return "its source is not a layer with weights"
    if len(source.users) > 1:
        return f"`{source.name}` is read by others too"
    norm, layer = attribute(graph_module, str(node.target)), attribute(graph_module, str(source.target))
    # torch.nn.utils.prune recomputes the weight before every call.
    for owner, part in ((source, layer), (node, norm)):
        if (reason := why_opaque(part)) is not None:
            return f"`{owner.name}`: {reason}"
    if norm.training or norm.running_mean is None:
        return "it normalises by the batch"
    kind = op_name(source)
    if kind not in ("conv", "conv_transpose", "linear"):
        return f"`{source.name}` is a {kind}"
    if kind == "linear":
        weight, bias = fuse_linear_bn_weights(
            layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    elif kind == "conv_transpose" and layer.groups > 1:
        return "it follows a grouped transposed convolution"
    else:
        weight, bias = fuse_conv_bn_weights(
            layer.weight,
            layer.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
            transpose=kind == "conv_transpose",
        )
    tensors: dict[str, Tensor | None] = {"weight": weight.detach(), "bias": bias.detach()}
    stand_in(source, add_module(graph_module, f"{source.target}_folded", with_tensors(layer, tensors)))
    node.replace_all_uses_with(source)
    graph_module.graph.erase_node(node)
    return None


def _freeze(graph_module: fx.GraphModule) -> None:
    """Rule 3: every leaf module is replaced by a copy whose parameters are new, frozen Parameter objects over the same memory."""
    called = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for path in called:
        _replace(graph_module, path, _frozen(attribute(graph_module, path)))
    # After the modules: a tensor may belong to one of them, which is a copy by now.
    for path in read:
        value = attribute(graph_module, path)
        if isinstance(value, nn.Parameter):
            _replace(graph_module, path, nn.Parameter(value.detach(), requires_grad=False))


def _replace(graph_module: fx.GraphModule, path: str, value: object) -> None:
    parent, _, name = path.rpartition(".")
    setattr(graph_module.get_submodule(parent), name, value)


def _frozen(module: nn.Module) -> nn.Module:
    new = with_tensors(module, {})
    for name, parameter in module._parameters.items():
        if parameter is not None:
            new._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
    for name, child in module._modules.items():
        if child is not None:
            new._modules[name] = _frozen(child)
    return new
