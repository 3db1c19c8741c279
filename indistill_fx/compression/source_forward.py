"""The lines of a block's `forward`."""

from __future__ import annotations

import operator
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import fx

from indistill_fx.compression.source_expressions import expression, is_arithmetic, is_size, write_into
from indistill_fx.compression.source_pieces import (
    Imports,
    Line,
    Literal,
    Piece,
    commas,
    constructor,
    is_name,
    literal,
    unwritable,
)
from indistill_fx.compression.source_scopes import Body, Places, Scope, reads_flag
from indistill_fx.graph.edit import output_node, writes_alive
from indistill_fx.graph.ops import attribute, with_item
from indistill_fx.passes.capture.both_modes import ByMode

_LONG = 24
"""Pieces of a sum that is not written inside another expression."""
_NAMES = ("x", "y", "z", "u", "v", "w", "s", "t", "a", "b", "c", "d")


@dataclass(frozen=True)
class Network:
    """What is written: the graph, where its parts stand, the names of the nodes that hold one tensor, and what the code needs."""

    graph_module: fx.GraphModule
    places: Places
    tensors: Container[str]
    imports: Imports


class Forward:
    """Writes one body: names values, so that a value's name is free again after its last use."""

    def __init__(self, network: Network, scope: Scope, body: Body, inputs: Iterable[fx.Node]):
        self.network, self.scope, self.body, self.inputs = network, scope, body, list(inputs)
        self.names: dict[fx.Node, str] = {}
        self.inline: dict[fx.Node, Line] = {}
        self.last = self._last_uses()
        self.joined = self._joined()

    def lines(self, result: Any) -> list[Line]:
        """The lines of `forward`; `result` is what the network returns, None in a block."""
        if self.joined is not None:
            head = "*features"
        elif self.scope.path:
            for node in self.inputs:
                self.names[node] = self._free()
            head = ", ".join(self.names.values())
        else:
            self.names.update((node, str(node.target).lstrip("*")) for node in self.inputs)
            head = ", ".join(_parameter(node) for node in self.inputs)
        lines: list[Line] = [(f"def forward({', '.join(filter(None, ('self', head)))}):",)]
        for k, step in enumerate(self.body.steps):
            lines += self._step(k, step)
        returned = commas([self._value(node) for node in self.body.outputs]) if result is None else ()
        values = self._structure(result) if result is not None else returned
        lines = _with_loops(lines)
        if len(values) == 1 and lines[-1][0] == f"{values[0]} = ":
            return [*lines[:-1], ("return ", *lines[-1][1:])]
        return [*lines, ("return ", *values)]

    def _step(self, k: int, step: fx.Node | tuple[Scope, Body]) -> list[Line]:
        if isinstance(step, fx.Node):
            if step.op == "call_module" and isinstance(
                by_mode := attribute(self.network.graph_module, str(step.target)), ByMode
            ):
                return self._both_ways(k, step, by_mode)
            if step is self.joined:
                dim = Literal(str(step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)), "dim")
                return [(f"{self._name(step, [step], k)[0]} = ", "torch.cat(features, ", dim, ")")]
            if step.target is with_item:
                return self._written(k, step)
            module = self._self(self.network.places.modules[step]) if step in self.network.places.modules else ""
            code = expression(step, self._value, (module,), self.network.imports)
            if self._inlined(step) and not (is_arithmetic(step) and len(code) > _LONG):
                self.inline[step] = code
                return []
            name = self._name(step, [step], k)
            return [((f"{name[0]} = " if step.users else ""), *code)]
        scope, body = step
        values = [self._value(node) for node in body.inputs]
        code = (self._self(scope.path), "(", *commas(values), ")")
        if not body.outputs:
            return [code]
        return [(f"{', '.join(self._name(step, body.outputs, k))} = ", *code)]

    def _written(self, k: int, step: fx.Node) -> list[Line]:
        """`y = x.clone()` and `y[index] = value`."""
        source, index, value = write_into(step, self._value)
        old, fresh = step.all_input_nodes[0], self._free()
        ends = old in self.names and self.last[old] <= k
        self._name(step, [step], k)
        if not ends:  # what the index or the value is called must not be written over
            self.names[step] = fresh
        name = self.names[step]
        copied = old.target == "clone" and len(old.users) == 1 and source == (name,)
        write = (f"{name}[", *index, "] = ", *value)
        return [write] if copied else [(f"{name} = ", *source, ".clone()"), write]

    def _joined(self) -> fx.Node | None:
        """The concatenation of all of a block's inputs, if they have no other use: the block then takes any number of inputs (DenseNet)."""
        first = self.body.steps[0] if self.scope.path and self.body.steps else None
        if (
            not isinstance(first, fx.Node)
            or first.target is not torch.cat
            or not isinstance(first.args[0], (list, tuple))
        ):
            return None
        steps = self.body.steps[1:]
        later = {n for step in steps for n in (step.all_input_nodes if isinstance(step, fx.Node) else step[1].inputs)}
        dim = first.args[1] if len(first.args) > 1 else first.kwargs.get("dim", 0)
        alone = later.isdisjoint(self.inputs) and list(first.args[0]) == self.inputs and isinstance(dim, int)
        return first if alone and all(self._is_tensor(node) for node in self.inputs) else None

    def _both_ways(self, k: int, step: fx.Node, by_mode: ByMode) -> list[Line]:
        """The lines of a step that computes one thing in train mode and another in eval mode."""
        given = [self._value(arg) for arg in step.args if isinstance(arg, fx.Node)]
        sides = [self._side(side, given) for side in (by_mode.trained, by_mode.evaluated)]
        name = next(iter(self._name(step, [step] if step.users else [], k)), "")
        trained, evaluated = (_named(name, *side) for side in sides)
        lines: list[Line] = [("if self.training:",) if trained else ("if not self.training:",)]
        lines += [("    ", *line) for line in trained or evaluated]
        if trained and evaluated:
            lines += [("else:",), *(("    ", *line) for line in evaluated)]
        return lines if trained or evaluated else []

    def _side(self, side: fx.GraphModule, given: list[Line]) -> tuple[list[Line], list[Line]]:
        """The lines of one mode, and its results."""
        values: dict[fx.Node, Line] = {}
        lines: list[Line] = []
        results: list[Line] = []
        numbers = set[fx.Node]()
        used_names, arguments = set(self.names.values()), iter(given)
        for node in side.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                results = [values[result] for result in node.args[0]]
            elif node.users or writes_alive(node):
                layer: Line = (self._layer(node, side),) if node.op == "call_module" else ()
                code = expression(node, values.__getitem__, layer, self.network.imports)
                if _is_number(node, numbers):
                    numbers.add(node)
                    if not is_arithmetic(node) or (len(node.users) == 1 and len(code) <= _LONG):
                        values[node] = code
                        continue
                name = next(name for name in self._fresh() if name not in used_names)
                used_names.add(name)
                lines.append((f"{name} = " if node.users else "", *code))
                values[node] = (name,)
        return lines, results

    def _layer(self, node: fx.Node, side: fx.GraphModule) -> Piece:
        """The constructor of a layer that one mode alone calls."""
        layer = attribute(side, str(node.target))
        if layer.state_dict():
            raise unwritable(str(node.target), "it has weights, and is only called in one of the two modes")
        return constructor(str(node.target), str(node.target), layer, self.network.imports)

    def _inlined(self, node: fx.Node) -> bool:
        """Sizes, entries of tuples and numbers with one reader, which are written inline where they are read."""
        if node not in self.last or node in self.body.outputs:
            return False
        if is_size(node) or (is_arithmetic(node) and len(node.users) == 1 and not self._is_tensor(node)):
            return True
        if node.op == "call_function" and node.target is getattr:
            return True
        reads = node.all_input_nodes
        small = (
            node.op == "call_function"
            and getattr(node.target, "__name__", "") == "getitem"
            and isinstance(node.args[1], int)
        )
        source = node.args[0] if small else None
        if isinstance(source, fx.Node) and not self._is_tensor(source):
            return True
        return not reads and node.op == "call_function" and not self._is_tensor(node)

    def _is_tensor(self, node: fx.Node) -> bool:
        return node.name in self.network.tensors

    def _value(self, node: fx.Node) -> Line:
        if reads_flag(node):
            return ("self.training",)
        if node in self.inline:
            return self.inline[node]
        if node.op == "get_attr" and node not in self.names:
            return (self._self(self.network.places.tensors[str(node.target)]),)
        return (self.names[node],)

    def _self(self, path: str) -> str:
        """The expression for a layer: `self.layers[0].conv`."""
        return self_path(relative(path, self.scope))

    def _structure(self, value: Any) -> Line:
        if isinstance(value, fx.Node):
            return self._value(value)
        if isinstance(value, (tuple, list)):
            opening, closing = "()" if isinstance(value, tuple) else "[]"
            trailing = "," if isinstance(value, tuple) and len(value) == 1 else ""
            return (opening, *commas([self._structure(v) for v in value]), trailing, closing)
        if isinstance(value, dict):
            return ("{", *commas([(f"{literal(key)}: ", *self._structure(v)) for key, v in value.items()]), "}")
        return (literal(value),)

    def _last_uses(self) -> dict[fx.Node, int]:
        """The last step that reads each node, directly or through inline expressions."""
        last: dict[fx.Node, int] = {}
        steps = self.body.steps
        for k, step in enumerate(steps):
            for source in step.all_input_nodes if isinstance(step, fx.Node) else step[1].inputs:
                last[source] = k
        for node in (*self.body.outputs, *output_node(self.network.graph_module.graph).all_input_nodes):
            last[node] = len(steps)
        self.last = last
        for step in reversed(steps):
            if isinstance(step, fx.Node) and step in last and self._inlined(step):
                for source in step.all_input_nodes:
                    last[source] = max(last.get(source, 0), last[step])
        return last

    def _name(self, step: Any, results: list[fx.Node], k: int) -> list[str]:
        """Names for a step's results: first those of values that it reads for the last time, then new ones."""
        expiring = [n for n, name in self.names.items() if self.last.get(n, -1) <= k]
        reads = step.all_input_nodes if isinstance(step, fx.Node) else step[1].inputs
        order = sorted(expiring, key=lambda n: reads.index(n) if n in reads else len(reads))
        free = [self.names.pop(node) for node in order]
        names = []
        for node in results:
            name = free.pop(0) if free else self._free()
            self.names[node] = name
            names.append(name)
        return names

    def _free(self) -> str:
        used_names = set(self.names.values())
        return next(name for name in self._fresh() if name not in used_names)

    def _fresh(self) -> Iterator[str]:
        return chain(_NAMES, (f"x{k}" for k in range(1, 10_000)))


_CALL = re.compile(r"(\w+) = (self[\w.]*)\[(\d+)\]\((\w+)\)")


def _with_loops(lines: list[Line]) -> list[Line]:
    """Write `x = self.blocks[0](x)`, `x = self.blocks[1](x)`, … as a loop if it covers the whole list."""
    plain = ["".join(piece if isinstance(piece, str) else "#" for piece in line) for line in lines]
    found = [_CALL.fullmatch(line) for line in plain]
    text = "".join(plain)
    item = next(name for name in ("block", "layer", "part", "each") if not re.search(rf"(?<![\w.]){name}\b", text))
    result: list[Line] = []
    k = 0
    while k < len(lines):
        first, end = found[k], k
        while first and end < len(lines) and (call := found[end]) and call[2] == first[2] and int(call[3]) == end - k:
            if not first[1] == call[1] == call[4]:
                break
            end += 1
        if first and end - k > 2 and text.count(f"{first[2]}[") == end - k:
            result += [(f"for {item} in {first[2]}:",), (f"    {first[1]} = {item}({first[1]})",)]
            k = end
        else:
            result.append(lines[k])
            k += 1
    return result


def _named(name: str, lines: list[Line], results: list[Line]) -> list[Line]:
    """The lines, the result under a name; nothing is named where nobody reads it."""
    result = results[0] if len(results) == 1 else ("(", *commas(results), ")")
    if not name or not results or result == (name,):
        return lines
    if lines and len(result) == 1 and lines[-1][0] == f"{result[0]} = ":
        return [*lines[:-1], (f"{name} = ", *lines[-1][1:])]
    return [*lines, (f"{name} = ", *result)]


def _is_number(node: fx.Node, numbers: Container[fx.Node]) -> bool:
    """Whether a node is a size, or computed from nodes known as such."""
    if is_size(node) or (node.op == "call_method" and node.target in ("dim", "numel")):
        return True
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    known = is_arithmetic(node) or (node.op == "call_function" and node.target is operator.getitem)
    return known and all(source in numbers for source in node.all_input_nodes)


def self_path(path: str) -> str:
    """`self.layers[0].conv` for `layers.0.conv`."""
    first, *rest = path.split(".")
    begin = f"self.{first}" if is_name(first) else f'getattr(self, "{first}")'
    return begin + "".join(f".{part}" if is_name(part) else f"[{_key(part)}]" for part in rest)


def _key(part: str) -> str:
    """An integer index if the name is a number, otherwise a string."""
    return part if part.isdecimal() else f'"{part}"'


def _parameter(node: fx.Node) -> str:
    return str(node.target) if not node.args else f"{node.target}={node.args[0]!r}"


def relative(path: str, scope: Scope) -> str:
    """A path as its scope sees it."""
    return path.removeprefix(f"{scope.path}.") if scope.path else path
