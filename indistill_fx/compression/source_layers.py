"""What a person would write: layers of torch.nn in place of functions and copies that only tracing needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from indistill_fx.graph.edit import with_tensors
from indistill_fx.graph.ops import attribute

_ACTIVATIONS: Mapping[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.sigmoid: nn.Sigmoid, torch.sigmoid: nn.Sigmoid, "sigmoid": nn.Sigmoid,
    F.tanh: nn.Tanh, torch.tanh: nn.Tanh, "tanh": nn.Tanh, F.gelu: nn.GELU, F.silu: nn.SiLU, F.mish: nn.Mish, F.relu6: nn.ReLU6,
    F.hardswish: nn.Hardswish, F.hardsigmoid: nn.Hardsigmoid, F.softplus: nn.Softplus, F.softsign: nn.Softsign,
}  # fmt: skip
"""Functions and methods that a layer without tensors computes."""


def layer_of(node: fx.Node, tensors: Mapping[fx.Node, str]) -> nn.Module | None:
    """The layer of torch.nn that does what a module with this one call does; None if there is none.

    Args:
        node: the call.
        tensors: the names in that module of the parameters that the call reads.

    Returns:
        A layer with the same attributes and names of parameters, on the meta device.
    """
    if len(node.all_input_nodes) != len(tensors) + 1:
        return None
    target: Any = node.target
    if target in _ACTIVATIONS and len(node.args) == 1 and not tensors:
        kept = {key: value for key, value in node.kwargs.items() if (key, value) != ("inplace", False)}
        return _ACTIVATIONS[target](**kept) if kept.keys() <= {"approximate"} else None
    if node.op != "call_function" or target not in _WITH_WEIGHTS:
        return None
    names, make = _WITH_WEIGHTS[target]
    given: dict[str, Any] = {"weight": None, "bias": None} | dict(zip(names, node.args, strict=False)) | node.kwargs
    read_by_name = {name: given[name] for name in ("weight", "bias") if given[name] is not None}
    if read_by_name != {name: source for source, name in tensors.items()}:
        return None
    owner = node.graph.owning_module
    read = {} if owner is None else {name: attribute(owner, str(n.target)) for n, name in tensors.items()}
    if "weight" not in read or not all(isinstance(tensor, nn.Parameter) for tensor in read.values()):
        return None
    with torch.device("meta"):
        return make(read["weight"], given)


def _layer_norm(weight: nn.Parameter, given: Mapping[str, Any]) -> nn.Module | None:
    if not _has_axes_of(weight, given["normalized_shape"]):
        return None
    return nn.LayerNorm(tuple(weight.shape), eps=given.get("eps", 1e-5), bias=given["bias"] is not None)


def _rms_norm(weight: nn.Parameter, given: Mapping[str, Any]) -> nn.Module | None:
    if not _has_axes_of(weight, given["normalized_shape"]):
        return None
    return nn.RMSNorm(tuple(weight.shape), eps=given.get("eps"))


def _has_axes_of(weight: nn.Parameter, normalized_shape: Any) -> bool:
    """Whether the shape is written down, not computed, and is the weight's."""
    return isinstance(normalized_shape, (tuple, list)) and tuple(normalized_shape) == tuple(weight.shape)


def _linear(weight: nn.Parameter, given: Mapping[str, Any]) -> nn.Module | None:
    return nn.Linear(weight.shape[1], weight.shape[0], bias=given["bias"] is not None) if weight.dim() == 2 else None


_WITH_WEIGHTS: Mapping[Any, tuple[tuple[str, ...], Callable[[nn.Parameter, Mapping[str, Any]], nn.Module | None]]] = {
    F.layer_norm: (("input", "normalized_shape", "weight", "bias", "eps"), _layer_norm),
    F.rms_norm: (("input", "normalized_shape", "weight", "eps"), _rms_norm),
    F.linear: (("input", "weight", "bias"), _linear),
}


def without_copies(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Replace in-place dropouts of copies by dropouts that are not in place, in a graph that the caller has just made.

    Tracing puts the copy there, because a tap may hold what the dropout overwrites. The results are the same to the bit.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    for target, nodes in calls.items():
        module = attribute(graph_module, target)
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.inplace and all(map(_is_of_copy, nodes)):
            name = f"out_of_place_{target.replace('.', '_')}"
            graph_module.add_module(name, with_tensors(module, {}, inplace=False))
            for node in nodes:
                copy = node.all_input_nodes[0]
                node.args, node.target = (copy.all_input_nodes[0],), name
                graph_module.graph.erase_node(copy)
    return graph_module


def _is_of_copy(node: fx.Node) -> bool:
    copy = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(copy, fx.Node) or len(copy.users) > 1 or copy.args[1:] or copy.kwargs:
        return False
    return copy.target in ("clone", torch.clone, torch.ops.aten.clone.default)
