"""The fourth capture method: `torch.export`, and the way back from its flat graph to one over the module's own parts.

Rules, in order:
  1. The batch is dynamic, and the lengths of sequences of whole numbers where the code allows it; other sizes are the example's.
  2. Parameters and buffers are the module's own objects, under their own names, so that training the graph trains the module.
  3. The operations that one leaf module made (`aten.conv2d` of a `Conv2d`) become a call of that module again: it follows `train()`
     and `eval()`, and every pass knows it. What other code made stays as ATen operations, in the mode it was exported in.
  4. Taps are named by the module stack that `torch.export` keeps with each operation.
"""

from __future__ import annotations

import io
import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import tree_leaves, tree_unflatten

from indistill_fx.errors import FrontendError
from indistill_fx.graph.ops import attribute, has_attribute, op_name, writes_first
from indistill_fx.passes.capture.captured import Captured, Request, argument_names, assemble, children, is_leaf
from indistill_fx.passes.capture.functionalize import VIEWS, base_of

_CHECKS = (
    "_assert_scalar",
    "_assert_tensor_metadata",
    "_assert_async",
    "sym_constrain_range",
    "sym_constrain_range_for_size",
)


def capture_exported(asked: Request) -> Captured:
    """Export and rebuild. Code that assigns tensors to attributes other than buffers is refused by `torch.export` itself.

    Raises:
        FrontendError: `torch.export` refuses the module, or freezes the batch size.
    """
    module, leaves, size = asked.module, asked.leaves, 2
    inputs, kwargs = asked.batch_of(size)
    try:
        program = _export(module, inputs, kwargs, size, lengths=True)
    except FrontendError:
        program = _export(module, inputs, kwargs, size, lengths=False)
    if any(str(node.target) == "wrap_with_autocast" for node in program.graph.nodes):
        raise FrontendError("the part under autocast would be one node")
    if any(_writes_view(node) or _is_functorch(node) for node in program.graph.nodes):
        with _quiet():
            program = program.run_decompositions({})
    graph, targets, fixed = _rebuild(program, module, inputs, kwargs)
    _refuse_lasting_writes(graph, module)
    stacks = _stacks(graph, module)
    outputs = _raise_modules(graph, targets, stacks, module, frozenset(leaves))
    used = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
    graph_module = assemble(
        graph, {name: value for name, value in targets.items() if name in used}, type(module).__name__
    )
    shown = ", ".join(
        f"`{name}` to {'x'.join('any' if n is None else str(n) for n in axes)}" for name, axes in fixed.items()
    )
    note = f"exported: operations outside torch.nn modules no longer follow train() and eval(){'; fixed sizes: ' if shown else ''}{shown}"
    kept = tuple(leaf for leaf in leaves if leaf in used)
    return Captured(graph_module, outputs, leaves=kept, notes=(note,), fixed=fixed)


def _export(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], size: int, *, lengths: bool
) -> ExportedProgram:
    """Export with a dynamic batch and, if `lengths` is set, dynamic sequence lengths of integer inputs and of inputs that go with them."""
    shapes = ShapesCollection()
    leaves = {id(leaf): leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)}.values()
    sequences = {leaf.shape for leaf in leaves if not leaf.is_floating_point() and leaf.dim() > 1} if lengths else set()
    for leaf in leaves:
        if leaf.dim() and leaf.shape[0] == size:
            open_lengths = {axis: Dim.AUTO for axis in range(1, leaf.dim())} if leaf.shape in sequences else {}
            shapes[leaf] = {0: Dim.DYNAMIC, **open_lengths}
    if lengths and not sequences:
        raise FrontendError("there are no sequences")
    try:
        with _quiet(), torch.no_grad():
            dynamic = shapes.dynamic_shapes(module, inputs, dict(kwargs))
            return torch.export.export(module, inputs, dict(kwargs), dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # torch.export is a compiler and may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        raise FrontendError(f"{type(error).__name__}: {lines[0]}") from error


def _writes_view(node: fx.Node) -> bool:
    """Whether the program writes into a part of a tensor. torch's functionalization handles this, but decomposes operations."""
    first = node.args[0] if node.args else None
    return isinstance(first, fx.Node) and writes_first(node.op, node.target, node.kwargs) and op_name(first) in VIEWS


def _is_functorch(node: fx.Node) -> bool:
    """Whether it enters or leaves a level of `vmap` or `grad`; torch's decompositions replace these by ordinary operations."""
    return str(getattr(node.target, "__module__", "")).startswith("torch._functorch")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what `torch.export` prints and logs when it fails; the error has what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _rebuild(
    program: ExportedProgram, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[fx.Graph, dict[str, Any], dict[str, tuple[int | None, ...]]]:
    """The exported graph with the module's signature, its own tensors (rule 2), its outputs in their own structure; and fixed sizes."""
    graph, memo = fx.Graph(), dict[fx.Node, fx.Node]()
    targets, fixed = dict[str, Any](), dict[str, tuple[int | None, ...]]()
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    given = iter(_arguments(graph, module, inputs, kwargs))
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                memo[node] = value = next(given)
                axes = _sizes(node)
                if any(n is not None for n in axes) and value.op == "placeholder":
                    fixed[str(value.target)] = axes
                continue
            name = str(spec.target)
            targets[name] = _own_tensor(program, module, name)
            memo[node] = graph.get_attr(name)
        elif node.op == "output":
            _write_buffers(program, graph, memo, node, targets, module)
            flat = [memo[value] if isinstance(value, fx.Node) else value for value in _user_outputs(program, node)]
            graph.output(_structure(graph, tree_unflatten(flat, program.call_spec.out_spec)))
        elif node.op == "get_attr":
            targets[str(node.target)] = attribute(program.graph_module, str(node.target))
            memo[node] = graph.node_copy(node, memo.__getitem__)
        elif not _is_check(node):
            memo[node] = graph.node_copy(node, memo.__getitem__)
    return graph, targets, fixed


def _refuse_lasting_writes(graph: fx.Graph, module: nn.Module) -> None:
    """Refuse code that writes into a tensor that outlives the call: the exported graph has only a copy of it."""
    for node in graph.nodes:
        written = base_of(node) if writes_first(node.op, node.target, node.kwargs) else node
        if written is not node and written.op == "get_attr" and not has_attribute(module, str(written.target)):
            raise FrontendError(
                "the forward writes into a tensor that lives on after the call, and is not a buffer",
                got=node.name,
                hint="Keep the tensor with register_buffer.",
            )


def _sizes(node: fx.Node) -> tuple[int | None, ...]:
    """Sizes of an exported program's input; None for a dynamic one."""
    value = node.meta.get("val")
    return tuple(n if isinstance(n, int) else None for n in value.shape) if isinstance(value, Tensor) else ()


def _arguments(graph: fx.Graph, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[fx.Node]:
    """One placeholder per argument of the module; the nodes of the flat leaves inside, which are what `torch.export` takes."""
    named = (*zip(argument_names(module, len(inputs)), inputs, strict=True), *kwargs.items())
    given = [(name, value, graph.placeholder(name)) for name, value in named]
    return [leaf for _, value, node in given for leaf in _flat(graph, value, node)]


def _flat(graph: fx.Graph, value: Any, node: fx.Node) -> list[fx.Node]:
    if isinstance(value, Mapping):
        entries = list(value.items())
    elif isinstance(value, (tuple, list)):
        entries = list(enumerate(value))
    else:
        return [node]
    return [
        leaf
        for key, entry in entries
        for leaf in _flat(graph, entry, graph.call_function(operator.getitem, (node, key)))
    ]


def _own_tensor(program: ExportedProgram, module: nn.Module, name: str) -> Any:
    try:
        return attribute(module, name)
    except AttributeError:
        value = program.constants[name] if name in program.constants else program.state_dict[name]
        return value.detach() if isinstance(value, Tensor) else value


def _user_outputs(program: ExportedProgram, output: fx.Node) -> list[Any]:
    values: Any = output.args[0]
    specs = program.graph_signature.output_specs
    return [value for value, spec in zip(values, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]


def _write_buffers(
    program: ExportedProgram,
    graph: fx.Graph,
    memo: Mapping[fx.Node, fx.Node],
    output: fx.Node,
    targets: dict[str, Any],
    module: nn.Module,
) -> None:
    values: Any = output.args[0]
    for value, spec in zip(values, program.graph_signature.output_specs, strict=True):
        if spec.kind is OutputKind.BUFFER_MUTATION:
            name = str(spec.target)
            targets[name] = _own_tensor(program, module, name)
            graph.call_function(torch.ops.aten.copy_.default, (graph.get_attr(name), memo[value]))


def _structure(graph: fx.Graph, value: Any) -> Any:
    """The module's return value as an argument of the output node; dataclasses are recreated."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_structure(graph, entry) for entry in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_structure(graph, entry) for entry in value)
    if type(value) is dict:
        return {key: _structure(graph, entry) for key, entry in value.items()}
    fields = {str(key): _structure(graph, entry) for key, entry in children(value) if entry is not None}
    return graph.call_function(type(value), (), fields) if fields else value


def _is_check(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", node.target))
    return name.split(".")[0] in _CHECKS or (node.op == "call_module" and name == "_guards_fn")


def _stacks(graph: fx.Graph, module: nn.Module) -> dict[fx.Node, list[tuple[str, str]]]:
    """(module call, module path) of the modules around every node, the outermost first; the second call of `a` is `a@2`.

    A module registered under several paths has the first one, as with the other methods.
    """
    first = {id(part): path for path, part in module.named_modules()}
    paths = {path: first[id(part)] for path, part in module.named_modules(remove_duplicate=False)}
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    stacks: dict[fx.Node, list[tuple[str, str]]] = {}
    for node in graph.nodes:
        stacks[node] = []
        for call, (given, _) in node.meta.get("nn_module_stack", {}).items():
            path = paths.get(str(given).split("@")[0])
            if path is None:  # torch.export's placeholder for code outside any module
                continue
            if call not in names:
                counts[path] += 1
                names[call] = path if counts[path] == 1 else f"{path}@{counts[path]}"
            stacks[node].append((names[call], path))
    return stacks


def _raise_modules(
    graph: fx.Graph,
    targets: dict[str, Any],
    stacks: dict[fx.Node, list[tuple[str, str]]],
    module: nn.Module,
    leaves: frozenset[str],
) -> tuple[tuple[str, str, int], ...]:
    """Rules 3 and 4: returns the module outputs, innermost first."""
    groups: dict[str, list[fx.Node]] = {}
    paths: dict[str, str] = {}
    depth: dict[str, int] = {}
    for node, stack in stacks.items():
        node.meta["nn_module_stack"] = {call: (path, nn.Module) for call, path in stack}
        for level, (call, path) in enumerate(stack):
            groups.setdefault(call, []).append(node)
            paths[call], depth[call] = path, level
    returned: dict[str, list[fx.Node]] = {}
    for call in sorted((call for call in groups if call), key=lambda call: -depth[call]):
        nodes = [node for node in groups[call] if not node._erased]
        inside = set(nodes)
        results = [node for node in nodes if any(user not in inside for user in node.users)]
        path, part = paths[call], attribute(module, paths[call])
        outer = (
            not any(step in leaves for step, _ in list(nodes[0].meta["nn_module_stack"].values())[:-1])
            if nodes
            else False
        )
        if nodes and outer and (path in leaves or is_leaf(part)) and len(results) == 1:
            results = [_replace(graph, nodes, results[0], path, part, targets, groups)]
        returned[call] = results
    position = {node: k for k, node in enumerate(graph.nodes, 1)}
    return tuple(
        (call if len(results) == 1 else f"{call}[{k}]", node.name, position[node])
        for call, results in returned.items()
        for k, node in enumerate(results)
        if node in position
    )


def _replace(
    graph: fx.Graph,
    nodes: list[fx.Node],
    result: fx.Node,
    path: str,
    part: nn.Module,
    targets: dict[str, Any],
    groups: dict[str, list[fx.Node]],
) -> fx.Node:
    """Replace a module's operations by one call of it; without a change if the module is not a function of one tensor."""
    inside = set(nodes)
    sources = dict.fromkeys(
        source for node in nodes for source in node.all_input_nodes if source not in inside and source.op != "get_attr"
    )
    if len(sources) != 1:
        return result
    with graph.inserting_after(nodes[-1]):
        call = graph.call_module(path, tuple(sources))
    call.meta = {**result.meta, "val": result.meta.get("val")}
    targets[path] = part
    result.replace_all_uses_with(call)
    for node in reversed(nodes):
        graph.erase_node(node)
    for group in groups.values():
        if result in group:
            group.append(call)
    return call
