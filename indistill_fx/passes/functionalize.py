"""Make in-place operations out of place: a later write can then never change a tensor that a tap holds.

Rules, in order:
  1. `relu_`, `iadd`, `inplace=True` and their like become the operation that returns a new tensor; modules are copied without the flag.
  2. Every later reader of the overwritten tensor, under any of its names, reads the new one, as it did in the module.
  3. A write into a view, or into a tensor that a view made before is still read, cannot be told apart so simply: the rung is refused.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

from torch import fx
from torch.fx.node import Argument

from indistill_fx.errors import FrontendError
from indistill_fx.graphs import add_module, with_tensors
from indistill_fx.ops import attribute, is_inplace, op_name
from indistill_fx.passes.symbolic import Captured

_VIEWS = frozenset(
    "view reshape flatten unflatten transpose permute t mt movedim squeeze unsqueeze expand expand_as narrow select chunk split unbind getitem "
    "slice detach alias contiguous getattr diagonal unfold".split()
)
_FUNCTIONAL = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


def functionalize(captured: Captured) -> Captured:
    """Rewrite the captured graph, which nobody else holds, without in-place operations.

    Raises:
        FrontendError: a write into a view (rule 3), or an in-place function without a functional twin.
    """
    graph_module = captured.graph_module
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    writers = [node for node in graph_module.graph.nodes if is_inplace(node)]
    if not writers:
        return captured
    renamed: list[tuple[int, fx.Node, fx.Node]] = []
    for writer in writers:
        target = _written(writer)
        if target is None:
            continue
        _refuse_views(writer, target, order)
        _make_functional(writer, graph_module)
        for user in [user for user in target.users if order.get(user, 0) > order[writer]]:
            user.replace_input_with(target, writer)
        renamed.append((order[writer], target, writer))
    outputs = tuple((name, _renamed(node, position, renamed), position) for name, node, position in captured.outputs)
    graph_module.graph.lint()
    graph_module.recompile()
    return replace(captured, outputs=outputs)


def _written(writer: fx.Node) -> fx.Node | None:
    first: Argument = writer.args[0] if writer.args else next(iter(writer.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


def _refuse_views(writer: fx.Node, target: fx.Node, order: dict[fx.Node, int]) -> None:
    """Rule 3: of all tensors that share the target's storage only the target itself may be read after the write."""
    base = target
    while op_name(base) in _VIEWS and base.all_input_nodes:
        base = base.all_input_nodes[0]
    sharing, new = {base}, [base]
    while new:
        new = [user for node in new for user in node.users if op_name(user) in _VIEWS and order.get(user, 0) < order[writer]]
        sharing.update(new)
    others = (user for node in sharing - {target} for user in node.users)
    if writer.target is operator.setitem or any(order.get(user, 0) > order[writer] for user in others):
        raise FrontendError(f"`{writer.name}` writes into a tensor that is also read through a view", where=writer.name)


def _make_functional(writer: fx.Node, graph_module: fx.GraphModule) -> None:
    if writer.op == "call_module":
        module = attribute(graph_module, str(writer.target))
        writer.target = add_module(graph_module, str(writer.target), with_tensors(module, {}, inplace=False))
    elif writer.op == "call_method":
        writer.target = str(writer.target).rstrip("_")
    elif writer.kwargs.get("inplace") is True:
        writer.kwargs = {**writer.kwargs, "inplace": False}
    else:
        writer.target = _functional_twin(writer)


def _functional_twin(writer: fx.Node) -> Any:
    if writer.target in _FUNCTIONAL:
        return _FUNCTIONAL[writer.target]
    import torch
    from torch.nn import functional

    name = str(getattr(writer.target, "__name__", "")).rstrip("_")
    for home in (functional, torch):
        if callable(getattr(home, name, None)):
            return getattr(home, name)
    raise FrontendError(f"`{writer.name}` works in place and has no functional twin", where=writer.name)


def _renamed(node: str, position: int, renamed: list[tuple[int, fx.Node, fx.Node]]) -> str:
    """The node that holds, at `position`, the tensor that `node` named: a module that overwrites its value returns the new one."""
    for written_at, target, writer in renamed:
        if target.name == node and written_at < position:
            node = writer.name
    return node
