"""From a flat graph back to blocks: which nodes belong to which module's forward.

A module becomes a block of its own if its nodes stand together, its layers are below it, and all its calls do the same. One that
does not is dissolved: its nodes belong to the module around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from indistill_fx.graph.edit import MADE, output_node, writes_alive
from indistill_fx.graph.ops import attribute, is_inplace, op_name
from indistill_fx.passes.capture.both_modes import ByMode, Flag


@dataclass(eq=False)
class Body:
    """What one call of a scope does.

    Attributes:
        steps: nodes, and calls of scopes inside.
        inputs: nodes from outside, in the order of first use.
        outputs: nodes of its own that are read outside.
    """

    steps: list[fx.Node | tuple[Scope, Body]] = field(default_factory=list)
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)

    def nodes(self) -> list[fx.Node]:
        """All nodes in it, including those of inner scopes."""
        found: list[fx.Node] = []
        for step in self.steps:
            found += [step] if isinstance(step, fx.Node) else step[1].nodes()
        return found


@dataclass(eq=False)
class Scope:
    """A module with a forward of its own: its path, its class's name, and what its calls do."""

    path: str
    kind: str
    bodies: list[Body] = field(default_factory=list)


class Dissolve(Exception):  # noqa: N818
    """A module that cannot be a block."""

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


def below(path: str, scope: str) -> bool:
    """Whether a path is in a scope."""
    return not scope or path.startswith(f"{scope}.")


@dataclass(frozen=True)
class Places:
    """Where things stand in the source.

    Attributes:
        stacks: per node, the scopes around it, outermost first: (path, call, class).
        modules: path of the layer that a node calls.
        tensors: path of each parameter and buffer, by its name in the graph.
    """

    stacks: Mapping[fx.Node, Sequence[tuple[str, str, str]]]
    modules: Mapping[fx.Node, str]
    tensors: Mapping[str, str]


def reads_flag(node: fx.Node) -> bool:
    """Whether a node is the training flag of the module that it is read in."""
    owner = node.graph.owning_module
    return node.op == "call_module" and owner is not None and isinstance(attribute(owner, str(node.target)), Flag)


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that do something: read by the output, or writing; without assertions."""
    last = output_node(graph)
    writing = [
        n
        for n in graph.nodes
        if n.op.startswith("call") and op_name(n) != "assert" and (is_inplace(n) or writes_alive(n))
    ]
    needed, todo = {last, *writing}, [last, *writing]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in needed:
                needed.add(source)
                todo.append(source)
    return [n for n in graph.nodes if n in needed]


def places_of(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> Places:
    """Find where everything stands."""
    stacks, modules = {}, {}
    before: list[tuple[str, str, str]] = []
    used_names: dict[str, str] = {}
    for node in nodes:
        if not node.op.startswith("call") or reads_flag(node):
            continue
        module_stack = node.meta.get("nn_module_stack")
        entries = (
            before
            if module_stack is None
            else [(p, key, getattr(c, "__name__", str(c).rpartition(".")[2])) for key, (p, c) in module_stack.items()]
        )
        entries = [entry for entry in entries if entry[0]]
        if node.op == "call_module" and not isinstance(attribute(graph_module, str(node.target)), ByMode):
            path = entries.pop()[0] if module_stack is not None and entries else str(node.target)
            if used_names.setdefault(path, str(node.target)) != str(node.target):
                path = str(node.target)
            modules[node] = path
        stacks[node] = before = entries
    # An item taken from a layer's result, such as an attention's, was recorded inside that layer: leave the layer out.
    layers = {*modules.values()}
    stacks = {node: [entry for entry in entries if entry[0] not in layers] for node, entries in stacks.items()}
    return Places(stacks, modules, _tensor_paths(nodes, stacks, modules.values()))


def _tensor_paths(
    nodes: Sequence[fx.Node], stacks: Mapping[fx.Node, Sequence[tuple[str, str, str]]], layers: Iterable[str]
) -> dict[str, str]:
    """Paths of the tensors: they keep their names, but those that a pass put at the root move into the scope that reads them."""
    paths, users, made = dict[str, str](), dict[str, list[fx.Node]](), set[str]()
    for node in nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), []).extend(user for user in node.users if user in stacks)
            made |= {str(node.target)} if node.meta.get(MADE) else set()
    reserved = {*users, *layers}
    for target, readers in users.items():
        around = [[entry[0] for entry in stacks[user]] for user in readers]
        common = ""
        for level in zip(*around, strict=False):
            if len(set(level)) > 1:
                break
            common = level[0]
        if target not in made or "." in target or not common:
            paths[target] = target
            continue
        # A number tells tensors at the root apart. Inside a scope it would only make equal classes differ.
        name = f"{common}.{re.sub(r'_[0-9]+$', '', target)}"
        while name in paths.values() or name in reserved:
            name += "_"
        paths[target] = name
    return paths


def scopes_of(graph_module: fx.GraphModule, dissolved: set[str]) -> tuple[Scope, Places]:
    """The network as nested scopes.

    Args:
        graph_module: the network.
        dissolved: paths of modules that are to be no scopes; those found here are added.
    """
    nodes = live_nodes(graph_module.graph)
    places = places_of(graph_module, nodes)
    calls = [node for node in nodes if node.op.startswith("call") and not reads_flag(node)]
    while True:
        try:
            root = Scope("", "Student")
            root.bodies.append(_body(calls, root, 0, places, dissolved, {"": root}))
        except Dissolve as found:
            dissolved.add(found.path)
        else:
            _connect(root.bodies[0], root, places)
            return root, places


def _body(
    nodes: Sequence[fx.Node], scope: Scope, depth: int, places: Places, dissolved: set[str], scopes: dict[str, Scope]
) -> Body:
    body = Body()
    runs: list[tuple[tuple[str, str, str] | None, list[fx.Node]]] = []
    for node in nodes:
        entries = [entry for entry in places.stacks[node] if entry[0] not in dissolved]
        entry = entries[depth] if len(entries) > depth else None
        if entry is None and node in places.modules and not below(places.modules[node], scope.path):
            raise Dissolve(scope.path)
        if runs and entry is not None and runs[-1][0] is not None and runs[-1][0][:2] == entry[:2]:
            runs[-1][1].append(node)
        else:
            runs.append((entry, [node]))
    seen: set[str] = set()
    for entry, members in runs:
        if entry is None:
            body.steps.append(members[0])
            continue
        path, call, kind = entry
        if call in seen:
            raise Dissolve(path)
        seen.add(call)
        if not below(path, scope.path):
            raise Dissolve(scope.path)
        inner = scopes.setdefault(path, Scope(path, kind))
        part = _body(members, inner, depth + 1, places, dissolved, scopes)
        inner.bodies.append(part)
        body.steps.append((inner, part))
    return body


def _connect(body: Body, scope: Scope, places: Places) -> None:
    """Find the inputs and outputs of all bodies."""
    members = body.nodes()
    inside = set(members)
    inputs: dict[fx.Node, None] = {}
    for node in members:
        inputs.update((n, None) for n in node.all_input_nodes if n not in inside and not reads_flag(n))
    body.inputs = [n for n in inputs if n.op != "get_attr" or not below(places.tensors[str(n.target)], scope.path)]
    body.outputs = [node for node in members if any(user not in inside for user in node.users)]
    for step in body.steps:
        if not isinstance(step, fx.Node):
            _connect(step[1], step[0], places)
