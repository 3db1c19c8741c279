"""Deep copies of graphs and their layers, at the price of their tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.edit import copy_end, output_node, set_graph

_PLAIN = (int, float, complex, str, bytes, bool, type(None), type, torch.dtype, torch.device)

_SIMPLE = frozenset({int, float, str, bool, type(None)})


def deep_copy(graph_module: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """What `copy.deepcopy` gives, but not compiled yet, and several times faster: that spends its time on empty dictionaries of layers.

    Args:
        graph_module: is not changed. Gradients are not copied.
        memo: copies that are there already, by identity of the original, as `copy.deepcopy` takes them; written.
    """
    new = memo[id(graph_module)] = fx.GraphModule(nn.Module(), fx.Graph(), class_name=type(graph_module).__name__)
    for name, copied in _COPIES.items():
        new.__dict__[name] = copied(vars(graph_module)[name], memo)
    new.__dict__["training"] = graph_module.training
    new.meta = copy.deepcopy(graph_module.meta, memo)
    graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
    result = graph.graph_copy(graph_module.graph, nodes)
    copy_end(graph, result, output_node(graph_module.graph))
    set_graph(new, graph)
    return new


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) not in memo:
        if not _is_plain(module):
            return copy.deepcopy(module, memo)
        new: nn.Module = object.__new__(type(module))
        memo[id(module)] = new
        for name, value in vars(module).items():
            new.__dict__[name] = _COPIES[name](value, memo) if name in _COPIES else _value(value, memo)
    return memo[id(module)]  # type: ignore[no-any-return]


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is one of torch's own and consists of nothing but its attributes."""
    kind = type(module)
    plain = kind is nn.Module or kind.__module__.startswith("torch.nn.modules.")
    return plain and not hasattr(kind, "__deepcopy__") and not isinstance(module, nn.RNNBase)


def _tensors(registry: dict[str, Tensor | None], memo: dict[int, Any]) -> dict[str, Tensor | None]:
    return {name: _tensor(tensor, memo) for name, tensor in registry.items()}


def _modules(registry: dict[str, nn.Module | None], memo: dict[int, Any]) -> dict[str, nn.Module | None]:
    return {name: None if child is None else _module(child, memo) for name, child in registry.items()}


def _tensor(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None or id(tensor) in memo:
        return memo.get(id(tensor))
    if type(tensor) not in (Tensor, nn.Parameter) or vars(tensor) or not tensor.is_leaf:
        return copy.deepcopy(tensor, memo)
    try:
        new = tensor.detach().clone()
    except RuntimeError:  # a quantised one whose zero points are not whole
        return copy.deepcopy(tensor, memo)
    memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return memo[id(tensor)]  # type: ignore[no-any-return]


def _value(value: Any, memo: dict[int, Any]) -> Any:
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(isinstance(entry, _PLAIN) for entry in value)):
        return value
    if type(value) in (dict, list, set, OrderedDict) and not value:
        return type(value)()
    return copy.deepcopy(value, memo)


_COPIES: dict[str, Callable[[Any, dict[int, Any]], Any]] = {
    "_parameters": _tensors,
    "_buffers": _tensors,
    "_modules": _modules,
}
