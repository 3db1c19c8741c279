"""From nested scopes to blocks of code: the lines of `__init__` and of `forward`."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from indistill_fx.compression.source_forward import Forward, Network, relative, self_path
from indistill_fx.compression.source_layers import layer_of
from indistill_fx.compression.source_pieces import (
    Block,
    Construct,
    Imports,
    Line,
    Piece,
    constructor,
    is_name,
    tensor_value,
)
from indistill_fx.compression.source_scopes import Body, Dissolve, Places, Scope, below
from indistill_fx.graph.edit import output_node
from indistill_fx.graph.ops import attribute


class Parts(nn.Module):
    """Layers and tensors under one name."""

    def __init__(self, **parts: nn.Module | Tensor):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def __getitem__(self, name: int | str) -> nn.Module | Tensor:
        """The part of that name."""
        if not hasattr(self, str(name)):
            raise IndexError(name)  # ends a loop over the parts
        part: nn.Module | Tensor = getattr(self, str(name))
        return part


@dataclass
class _Tree:
    """What is below a path in `self`: layers, tensors and blocks by name, or one of these."""

    children: dict[str, _Tree] = field(default_factory=dict)
    leaf: nn.Module | Tensor | Scope | None = None

    def put(self, path: str, leaf: nn.Module | Tensor | Scope) -> None:
        """Add the entry at a path."""
        first, _, rest = path.partition(".")
        child = self.children.setdefault(first, _Tree())
        if rest:
            child.put(rest, leaf)
        else:
            child.leaf = leaf

    @property
    def is_list(self) -> bool:
        """Whether the names are 0, 1, 2 and so on."""
        return sorted(self.children) == sorted(str(k) for k in range(len(self.children)))


class Writer:
    """Makes the blocks of one network.

    Args:
        graph_module: the network.
        places: where everything stands.
        tensors: names of the nodes that hold one tensor.

    Attributes:
        state: the network's tensors by their path in the source.
        imports: what the code needs.
    """

    def __init__(self, graph_module: fx.GraphModule, places: Places, tensors: Container[str]):
        self.imports, self.state = Imports(), dict[str, Tensor]()
        self.graph_module, self.places = graph_module, places
        self.network = Network(graph_module, places, tensors, self.imports)
        self._ties: list[tuple[str, str]] = []
        self._first: dict[int, str] = {}

    def root(self, scope: Scope) -> Block:
        """The block of the whole network.

        Raises:
            ExportError: a construct has no code.
            Dissolve: a module that cannot be a block.
        """
        body = scope.bodies[0]
        inputs = [node for node in self.graph_module.graph.nodes if node.op == "placeholder"]
        result = output_node(self.graph_module.graph).args[0]
        chain = self._chain(scope, "layer") if body.outputs == [result] and len(inputs) == 1 else None
        if chain is not None and not self._ties:
            super_call = Construct("super().__init__", chain.arguments)
            return Block("Student", ((super_call,),), (), "nn.Sequential")
        forward = Forward(self.network, scope, body, inputs)
        lines = forward.lines(result)
        setup = self._setup(scope, self._tree(scope))
        setup += [(f"{self_path(path)} = {self_path(other)}",) for path, other in self._ties]
        return Block("Student", tuple(setup), tuple(lines))

    def block(self, scope: Scope, name: str) -> Block | Construct:
        """A block below the root: a class, or a Sequential."""
        made = self._layer(scope, name) or self._chain(scope, name)
        if made is not None:
            return made
        written = [Forward(self.network, scope, body, body.inputs).lines(None) for body in scope.bodies]
        if any(lines != written[0] for lines in written[1:]):
            raise Dissolve(scope.path)
        return Block(_class_name(scope), tuple(self._setup(scope, self._tree(scope))), tuple(written[0]))

    def _layer(self, scope: Scope, name: str) -> Construct | None:
        """A layer of torch.nn, if the module's forward is one call that such a layer makes."""
        layers: list[nn.Module | None] = []
        tensors = {path: target for target, path in self.places.tensors.items() if self._owner(path, scope)}
        for body in scope.bodies:
            node = body.steps[0]
            if len(body.steps) != 1 or not isinstance(node, fx.Node) or body.outputs != [node] or len(body.inputs) != 1:
                return None
            reads = {source: str(source.target) for source in node.all_input_nodes if source.op == "get_attr"}
            if (
                node.op == "call_module"
                or {*reads.values()} != {*tensors.values()}
                or node.args[:1] != (body.inputs[0],)
            ):
                return None
            layers.append(layer_of(node, {n: relative(self.places.tensors[t], scope) for n, t in reads.items()}))
        if not layers or layers[0] is None or any(str(layer) != str(layers[0]) for layer in layers):
            return None
        for path, target in tensors.items():
            self._note(path, attribute(self.graph_module, target))
        return constructor(scope.path, name, layers[0], self.imports)

    def _chain(self, scope: Scope, name: str) -> Construct | None:
        """A Sequential, if every layer reads only the one before."""
        names: list[str] = []
        for body in scope.bodies:
            if len(body.inputs) != 1 or len(body.outputs) != 1:
                return None
            before, own = body.inputs[0], []
            for step in body.steps:
                path, reads, result = self._link(step)
                place = relative(path, scope)
                if reads != [before] or not place.isdecimal() or result is None:
                    return None
                own.append(place)
                before = result
            if before is not body.outputs[0] or (names and own != names):
                return None
            names = own
        numbers = [int(name) for name in names]
        if numbers != sorted(set(numbers)) or not numbers or numbers[-1] > 3 * len(numbers):
            return None
        tree = self._tree(scope)
        if tree.children.keys() != set(names):
            return None
        parts: list[Line] = []
        for k in range(numbers[-1] + 1):
            child = tree.children.get(str(k))
            made = (
                self._piece(_joined(scope.path, str(k)), f"{name}_{k}", child)
                if child
                else Construct("nn.Identity", ())
            )
            parts.append((made,))
        return Construct("nn.Sequential", tuple(parts))

    def _link(self, step: fx.Node | tuple[Scope, Body]) -> tuple[str, list[fx.Node], fx.Node | None]:
        """A step of a chain: the layer it calls, its input and its output."""
        if isinstance(step, fx.Node):
            plain = step.op == "call_module" and len(step.args) == 1 and not step.kwargs
            return self.places.modules.get(step, ""), list(step.all_input_nodes) if plain else [], step
        scope, body = step
        return scope.path, body.inputs, body.outputs[0] if len(body.outputs) == 1 else None

    def _tree(self, scope: Scope) -> _Tree:
        """Everything that the `__init__` of a scope creates."""
        tree = _Tree()
        for body in scope.bodies:
            for step in body.steps:
                if isinstance(step, fx.Node):
                    self._put_node(tree, scope, step)
                else:
                    tree.put(relative(step[0].path, scope), step[0])
        for target, path in self.places.tensors.items():
            if self._owner(path, scope):
                tree.put(relative(path, scope), attribute(self.graph_module, target))
        return tree

    def _put_node(self, tree: _Tree, scope: Scope, node: fx.Node) -> None:
        if node in self.places.modules:
            module = attribute(self.graph_module, str(node.target))
            tree.put(relative(self.places.modules[node], scope), module)

    def _owner(self, path: str, scope: Scope) -> bool:
        """Whether this scope itself, not one inside it, creates the tensor."""
        if not below(path, scope.path):
            return False
        inner = {step[0].path for body in scope.bodies for step in body.steps if not isinstance(step, fx.Node)}
        nodes = [step for body in scope.bodies for step in body.steps if isinstance(step, fx.Node)]
        layers = {self.places.modules[node] for node in nodes if node in self.places.modules}
        return not any(below(path, other) for other in inner | layers)

    def _setup(self, scope: Scope, tree: _Tree) -> list[Line]:
        lines: list[Line] = []
        for name, child in tree.children.items():
            if isinstance(child.leaf, Tensor) and not child.children:
                self._note(_joined(scope.path, name), child.leaf)
                value = tensor_value(name, child.leaf)
                buffer = not isinstance(child.leaf, nn.Parameter)
                lines.append(
                    (f'self.register_buffer("{name}", ', *value, ")") if buffer else (f"self.{name} = ", *value)
                )
            elif is_name(name):
                lines.append((f"self.{name} = ", self._piece(_joined(scope.path, name), name, child)))
            else:
                made = self._piece(_joined(scope.path, name), f"part_{name}", child)
                lines.append((f'self.add_module("{name}", ', made, ")"))
        return lines

    def _piece(self, path: str, name: str, tree: _Tree) -> Piece:
        """The code that creates the entry at a path."""
        if isinstance(tree.leaf, Scope):
            if tree.children:
                raise Dissolve(tree.leaf.path)
            return self.block(tree.leaf, name)
        if isinstance(tree.leaf, nn.Module):
            for key in tree.leaf.state_dict():
                self._note(f"{path}.{key}", attribute(tree.leaf, key))
            return constructor(path, name, tree.leaf, self.imports)
        holder = self._holder(path, name, tree)
        if holder is not None:
            return holder
        tensors = {key: child.leaf for key, child in tree.children.items() if isinstance(child.leaf, Tensor)}
        items: dict[str, Line] = {}
        for key, child in tree.children.items():
            if isinstance(child.leaf, Tensor):
                self._note(f"{path}.{key}", child.leaf)
                items[key] = tensor_value(f"{name}_{key}", child.leaf)
            else:
                items[key] = (self._piece(f"{path}.{key}", f"{name}_{key}", child),)
        if tree.is_list and not tensors:
            entries = tuple(items[str(k)] for k in range(len(items)))
            return Construct("nn.ModuleList", entries, ("([", "])"))
        self.imports.own["Parts"] = Parts
        if all(map(is_name, items)):
            return Construct("Parts", tuple((f"{key}=", *line) for key, line in items.items()))
        pairs = tuple((f'"{key}": ', *line) for key, line in items.items())
        return Construct("Parts", pairs, ("(**{", "})"))

    def _holder(self, path: str, name: str, tree: _Tree) -> Piece | None:
        """A linear layer or an embedding that is never called: a function reads its weights."""
        tensors = {key: child.leaf for key, child in tree.children.items()}
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or tensors.keys() - {"weight", "bias"}:
            return None
        if bias is not None and (not isinstance(bias, nn.Parameter) or bias.shape != weight.shape[:1]):
            return None
        for key, tensor in tensors.items():
            self._note(f"{path}.{key}", tensor)
        readers = {user.target for node in self._reads(f"{path}.weight") for user in node.users}
        if readers == {F.embedding} and bias is None:
            return constructor(path, name, nn.Embedding(weight.shape[0], weight.shape[1], device="meta"), self.imports)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        return constructor(path, name, layer, self.imports)

    def _reads(self, path: str) -> list[fx.Node]:
        """The nodes that read a tensor."""
        nodes = self.graph_module.graph.find_nodes(op="get_attr")
        return [node for node in nodes if self.places.tensors.get(str(node.target)) == path]

    def _note(self, path: str, tensor: Any) -> None:
        self.state[path] = tensor
        first = self._first.setdefault(id(tensor), path)
        if first != path and (path, first) not in self._ties:
            self._ties.append((path, first))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _class_name(scope: Scope) -> str:
    kind = scope.kind.rpartition(".")[2]
    if kind in ("Sequential", "Module", "GraphModule", "ModuleList", "Student") or not kind.isidentifier():
        kind = next((part for part in reversed(scope.path.split(".")) if not part.isdecimal()), "block")
        kind = "".join(word.capitalize() for word in re.split(r"[_\W]+", kind))
    return kind
