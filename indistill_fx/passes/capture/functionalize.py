"""Make in-place operations out of place: a later write can then never change a tensor that a tap holds.

Rules, in order:
  1. A write into a parameter or buffer is the model's state, not its data flow, and stays (batch norm counting its batches). A
     graph has no `no_grad`, without which torch refuses a write into a parameter: the write is done past autograd.
  2. `relu_`, `iadd`, `inplace=True` and their like become the operation that returns a new tensor; modules are copied without the
     flag. Of dropouts and their like, the mode of the user's own layer counts: it stays, and writes into a copy of its input, as does a
     method without a functional twin (`uniform_`). `x[i] = v` becomes `with_item(x, i, v)`. `f(x, out=y)` is `y.copy_(f(x).detach())`,
     because torch allows it only where there are no gradients.
  3. Every later reader of the overwritten tensor, under any of its names, reads the new one, as it did in the module.
  4. A write into `x[i]` also makes a new `x`. Other writes into views are refused if another view of the data is read later.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Argument
from torch.nn import functional

from indistill_fx.errors import FrontendError
from indistill_fx.graph.edit import add_module, with_tensors
from indistill_fx.graph.ops import attribute, is_inplace, is_users_function, op_name, with_item
from indistill_fx.passes.capture.captured import Captured

VIEWS = frozenset(
    "view reshape flatten unflatten transpose permute t mt numpy_t movedim squeeze unsqueeze expand expand_as narrow select chunk "
    "split unbind getitem slice detach alias contiguous getattr diagonal unfold identity".split()
)
"""Operations whose result may share its storage with their first argument."""
_BY_MODE = (nn.modules.dropout._DropoutNd, nn.RReLU)
"""Layers that compute something else in train mode."""
_FRESH = frozenset("topk sort max min median nanmedian mode kthvalue cummax cummin".split())
"""Operations that return new tensors, so that taking one of these is no view."""
_PIECES = frozenset("chunk split unbind tensor_split split_with_sizes hsplit".split())
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
    """Rewrite the captured graph, which nobody else holds, without in-place operations, and compile it.

    Raises:
        FrontendError: a write into a view (rule 4); `where` is the path of the module that does it.
    """
    graph_module = captured.graph_module
    for node in list(graph_module.graph.nodes):
        if isinstance(node.kwargs.get("out"), fx.Node):
            _copy_afterwards(node)
    order = {node: position for position, node in enumerate(graph_module.graph.nodes)}
    writers = [node for node in graph_module.graph.nodes if is_inplace(node)]
    renamed: dict[str, tuple[int, str]] = {}
    copies: dict[str, str] = {}
    for writer in writers:
        target = _written(writer)
        if target is None:
            continue
        if (base := base_of(target)).op == "get_attr" and writer.target is not operator.setitem:
            if isinstance(value := attribute(graph_module, str(base.target)), nn.Parameter) and value.requires_grad:
                _write_past_autograd(writer, target)
            continue
        indexed = _indexed(target)
        _refuse_views(writer, target, order, indexed)
        _make_functional(writer, graph_module, copies)
        _redirect(target, writer, order, renamed, since=order[writer])
        if indexed is not None and any(order.get(user, 0) > order[writer] for user in indexed.users):
            with graph_module.graph.inserting_after(writer):
                updated = graph_module.graph.call_function(with_item, (indexed, target.args[1], writer))
            updated.meta = dict(writer.meta)
            order[updated] = order[writer]
            _redirect(indexed, updated, order, renamed, since=order[writer])
    if not writers:
        _compile(graph_module)
        return captured
    outputs = tuple((name, _renamed(node, position, renamed), position) for name, node, position in captured.outputs)
    graph_module.graph.lint()
    _compile(graph_module)
    return replace(captured, outputs=outputs)


def _copy_afterwards(node: fx.Node) -> None:
    """Rule 2, for `out=`."""
    target = node.kwargs["out"]
    node.kwargs = {name: value for name, value in node.kwargs.items() if name != "out"}
    with node.graph.inserting_after(node):
        detached = node.graph.call_method("detach", (node,))
    with node.graph.inserting_after(detached):
        copied = node.graph.call_method("copy_", (target, detached))
    detached.meta, copied.meta = dict(node.meta), dict(node.meta)
    node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not detached)


def _write_past_autograd(writer: fx.Node, target: fx.Node) -> None:
    """Rule 1: a parameter is written through another name of its memory, and read under its own."""
    writer.replace_all_uses_with(target)
    with writer.graph.inserting_before(writer):
        detached = writer.graph.call_method("detach", (target,))
    detached.meta = dict(writer.meta)
    writer.replace_input_with(target, detached)


def _compile(graph_module: fx.GraphModule) -> None:
    try:
        graph_module.recompile()
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise FrontendError(f"an argument cannot be written into the graph's source (`{line}`)") from error


def _redirect(
    old: fx.Node, new: fx.Node, order: dict[fx.Node, int], renamed: dict[str, tuple[int, str]], *, since: int
) -> None:
    """Rule 3."""
    for user in [user for user in old.users if user is not new and order.get(user, 0) > since]:
        user.replace_input_with(old, new)
    renamed[old.name] = (since, new.name)


def _written(writer: fx.Node) -> fx.Node | None:
    first: Argument = writer.args[0] if writer.args else next(iter(writer.kwargs.values()), None)
    return first if isinstance(first, fx.Node) else None


def _is_view(node: fx.Node) -> bool:
    if op_name(node) not in VIEWS or not node.all_input_nodes:
        return False
    return node.target is not operator.getitem or op_name(node.all_input_nodes[0]) not in _FRESH


def _source(view: fx.Node) -> fx.Node | None:
    return view.all_input_nodes[0] if _is_view(view) else None


def base_of(node: fx.Node) -> fx.Node:
    """The tensor whose storage a node's value shares, through views and the writes that stay (`buffer.mul_(0.9).add_(x)`)."""
    while (source := _written(node) if is_inplace(node) else _source(node)) is not None:
        node = source
    return node


def _indexed(target: fx.Node) -> fx.Node | None:
    """The tensor that the written one is an indexed part of, as in `x[1:, 0]`."""
    if target.target is not operator.getitem or not isinstance(target.args[0], fx.Node):
        return None
    source, index = target.args[0], target.args[1]
    entries = index if isinstance(index, tuple) else (index,)
    plain = all(entry is None or entry is ... or isinstance(entry, (int, slice)) for entry in entries)
    return source if plain and op_name(source) not in _PIECES else None


def _refuse_views(writer: fx.Node, target: fx.Node, order: dict[fx.Node, int], indexed: fx.Node | None) -> None:
    """Rule 4: after the write, only the target and the tensor it is a part of may be read, not other views of the storage."""
    base, pieces = target, {}
    while (source := _source(base)) is not None:
        if op_name(source) in _PIECES and base.target is operator.getitem:
            pieces[source] = base  # the other pieces hold other data
        base = source
    sharing, new = {base}, [base]
    while new:
        new = [
            user
            for node in new
            for user in _views_of(node, pieces)
            if order.get(user, 0) < order[writer] and user not in sharing
        ]
        sharing.update(new)
    free = {target, indexed}
    others = (user for node in sharing - free for user in node.users if node not in pieces or user is pieces[node])
    if any(order.get(user, 0) > order[writer] for user in others):
        stack = [str(key).split("@")[0] for key in writer.meta.get("nn_module_stack", {})]
        writing = f"`{stack[-1]}`" if stack and stack[-1] else "the forward"
        raise FrontendError(
            f"{writing} writes in place into a tensor that is also read through a view (`{writer.name}`)",
            where=stack[-1] if stack else "",
        )


def _views_of(node: fx.Node, pieces: dict[fx.Node, fx.Node]) -> Iterator[fx.Node]:
    if node in pieces:
        yield pieces[node]
    else:
        yield from (user for user in node.users if _is_view(user))


def _make_functional(writer: fx.Node, graph_module: fx.GraphModule, copies: dict[str, str]) -> None:
    if writer.op == "call_module":
        path = str(writer.target)
        if isinstance(attribute(graph_module, path), _BY_MODE):
            _copy_first(writer)
            return
        if path not in copies:
            copies[path] = add_module(
                graph_module, path, with_tensors(attribute(graph_module, path), {}, inplace=False)
            )
        writer.target = copies[path]
    elif writer.target is operator.setitem:
        writer.target = with_item
    elif writer.op == "call_method":
        name = str(writer.target).rstrip("_")
        if name in ("copy", "fill", "zero"):
            writer.op, writer.target = "call_function", with_item
            everywhere: Any = ...
            writer.args = (writer.args[0], everywhere, writer.args[1] if name != "zero" else 0)
            return
        if hasattr(Tensor, name):
            writer.target = name
        else:
            _copy_first(writer)
    elif writer.kwargs.get("inplace") is True:
        writer.kwargs = {**writer.kwargs, "inplace": False}
    else:
        functional_version = _functional_twin(writer.target)
        if functional_version is None:
            _copy_first(writer)
        else:
            writer.target = functional_version


def _copy_first(writer: fx.Node) -> None:
    first = _written(writer)
    assert first is not None
    with writer.graph.inserting_before(writer):
        copy = writer.graph.call_method("clone", (first,))
    copy.meta = dict(writer.meta)
    writer.replace_input_with(first, copy)


def _functional_twin(target: Any) -> Any:
    if target in _FUNCTIONAL:
        return _FUNCTIONAL[target]
    schema = getattr(target, "_schema", None)
    if schema is not None:
        library, _, name = schema.name.rpartition("::")
        overloads = getattr(getattr(torch.ops, library), name.rstrip("_"), None)
        return getattr(overloads, schema.overload_name or "default", None)
    if is_users_function(target):
        return None
    name = str(getattr(target, "__name__", "")).rstrip("_")
    modules = (module for module in (functional, torch) if callable(getattr(module, name, None)))
    module = next(modules, None)
    return getattr(module, name) if module is not None else None


def _renamed(node: str, position: int, renamed: dict[str, tuple[int, str]]) -> str:
    """The node that holds, at `position`, the tensor that `node` named: a module that overwrites its value returns the new one."""
    while node in renamed and renamed[node][0] < position:
        node = renamed[node][1]
    return node
