"""A student's graph in both modes: what its code decides by `self.training` is decided again each time the graph runs.

Rules, in order:
  1. Where code outside torch.nn's own layers reads a `training` flag, the module is captured in eval mode too, by the same method.
  2. The two graphs are laid side by side. Where only a number differs (`F.dropout(x, p, self.training)`), the graph chooses it by the
     flag of the module whose code it is, which it reads from that very module.
  3. Where operations differ (stochastic depth, a norm written by hand), both ways become one node that takes the one or the other.
  4. Graphs that cannot be brought together, or that return different things, stay as they were in train mode, and the report says so.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any
from unittest.mock import patch

from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.edit import tensor_nodes
from indistill_fx.graph.elementwise import is_elementwise
from indistill_fx.graph.ops import attribute, is_inplace, op_name
from indistill_fx.passes.capture.captured import Captured, assemble, is_leaf


class Flag(nn.Module):
    """The training flag of one of the user's modules, read and written where it stands.

    Args:
        owner: that module; None (in a copy): the flag is stored in this module.
    """

    def __init__(self, owner: nn.Module | None):
        self.__dict__["of"] = owner
        super().__init__()

    @property
    def training(self) -> bool:
        """The flag of the user's module."""
        owner = self.__dict__["of"]
        return bool(self.__dict__.get("own", True) if owner is None else owner.training)

    @training.setter
    def training(self, flag: bool) -> None:
        owner = self.__dict__["of"]
        # without `_parameters`: torch sets the flag while it constructs the module
        if owner is None or "_parameters" not in self.__dict__:
            self.__dict__["own"] = flag
        else:
            owner.training = flag

    def __deepcopy__(self, memo: dict[int, Any]) -> Flag:
        new = Flag(None)
        new.training = self.training
        return new

    def forward(self) -> bool:
        """Whether the module is in train mode."""
        return self.training


class ByMode(nn.Module):
    """Two ways to compute the same tensors: in train mode and in eval mode.

    Args:
        flag: which mode it is.
        trained: takes the inputs, returns a tuple.
        evaluated: likewise.
        writes: whether one of them writes buffers, so that it must run even where nobody reads its result.
    """

    def __init__(self, flag: Flag, trained: fx.GraphModule, evaluated: fx.GraphModule, *, writes: bool):
        super().__init__()
        self.flag, self.trained, self.evaluated, self.writes = flag, trained, evaluated, writes

    def forward(self, *inputs: Tensor) -> Any:
        """The tensors; one alone if there is only one."""
        found = (self.trained if self.flag() else self.evaluated)(*inputs)
        return found[0] if len(found) == 1 else found


class OnlyInTraining(ByMode):
    """An elementwise operation of train mode that hands its input on in eval mode, such as stochastic depth."""


def choose(training: bool, trained: Any, evaluated: Any) -> Any:
    """One of two values, by the mode."""
    return trained if training else evaluated


@contextmanager
def noticing_flags() -> Iterator[list[str]]:
    """Note the classes of the modules whose `training` is read inside the block, except by torch.nn's own layers."""
    noticed: list[str] = []

    def read(module: nn.Module) -> bool:
        if not is_leaf(module) or not _reads_in_torch():
            noticed.append(type(module).__name__)
        return bool(module.__dict__["training"])

    def write(module: nn.Module, flag: bool) -> None:
        module.__dict__["training"] = flag

    with patch.object(nn.Module, "training", property(read, write), create=True):
        yield noticed


def _reads_in_torch() -> bool:
    """Whether torch's code reads the flag; a forward may pass on that of a layer (`F.dropout(x, 0.5, self.drop.training)`)."""
    return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("torch.")


def merge_modes(trained: Captured, evaluated: Captured, module: nn.Module) -> Captured:
    """Rules 2 and 3: the graph of train mode, with what eval mode does otherwise.

    Raises:
        FrontendError: the two graphs cannot be brought together.
    """
    return _Merge(trained, evaluated, module).run()


Pairs = tuple[tuple[fx.Node, fx.Node], ...]
"""Nodes of the two graphs that stand in one place."""


@dataclass
class _Region:
    """Nodes that only one of the graphs has, between two positions that both have.

    Attributes:
        trained: of the graph of train mode.
        evaluated: of the other.
        results: what is read of it further on: the value of train mode and that of eval mode.
    """

    trained: list[fx.Node]
    evaluated: list[fx.Node]
    results: dict[tuple[fx.Node, fx.Node], int] = field(default_factory=dict)


class _Merge:
    """Builds one graph from those of train mode and eval mode."""

    def __init__(self, trained: Captured, evaluated: Captured, module: nn.Module):
        self.trained, self.evaluated, self.module = trained, evaluated, module
        self.names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        self.weights: dict[fx.Node, str] = {}
        self.same: dict[fx.Node, fx.Node] = {}
        self.region_of: dict[fx.Node, _Region] = {}
        self.graph = fx.Graph()
        self.new: dict[fx.Node, fx.Node] = {}
        self.made: dict[int, list[fx.Node]] = {}
        self.flags: dict[str, Flag] = {}
        self.modules: dict[str, nn.Module] = {}

    def run(self) -> Captured:
        parts = self._lay_side_by_side()
        for part in parts:
            if not isinstance(part, _Region):
                self._find_results(part)
        for part in parts:
            if isinstance(part, _Region):
                self._write_region(part)
            else:
                for trained, other in part:
                    self._write(trained, other)
        self.graph.lint()
        graph_module = self.trained.graph_module
        targets = {
            str(n.target): attribute(self.module if n in self.weights else graph_module, str(n.target))
            for n in self.new
            if n.op in ("get_attr", "call_module")
        }
        names = {trained.name: new.name for trained, new in self.new.items()}
        outputs = [(tap, names[node], place) for tap, node, place in self.trained.outputs if node in names]
        merged = assemble(self.graph, {**targets, **self.modules}, type(graph_module).__name__)
        merged.recompile()
        return replace(
            self.trained,
            graph_module=merged,
            outputs=tuple(outputs),
        )

    def _lay_side_by_side(self) -> list[Pairs | _Region]:
        self._match_weights()
        trained, evaluated = (
            [node for node in captured.graph_module.graph.nodes if node not in self.weights]
            for captured in (self.trained, self.evaluated)
        )
        matcher = SequenceMatcher(None, list(map(_key, trained)), list(map(_key, evaluated)), autojunk=False)
        parts: list[Pairs | _Region] = []
        for kind, a, b, c, d in matcher.get_opcodes():
            if kind == "equal":
                parts.append(tuple(zip(trained[a:b], evaluated[c:d], strict=True)))
                self.same.update(
                    (evaluated_node, trained_node)
                    for trained_node, evaluated_node in zip(trained[a:b], evaluated[c:d], strict=True)
                )
            else:
                region = _Region(trained[a:b], evaluated[c:d])
                parts.append(region)
                self.region_of.update(dict.fromkeys((*region.trained, *region.evaluated), region))
        return parts

    def _match_weights(self) -> None:
        """Match nodes that read the same parameter or buffer of the module, in either graph."""
        first: dict[str, fx.Node] = {}
        for captured in (self.trained, self.evaluated):
            for node in captured.graph_module.graph.nodes:
                name = str(node.target)
                if node.op == "get_attr" and name in self.names:
                    self.weights[node] = name
                    self.same[node] = first.setdefault(name, node)

    def _at(self, old: fx.Node) -> fx.Node:
        """The new node for one of the old graphs; weights are read where they are first needed."""
        old = self.same.get(old, old) if old in self.weights else old
        if old in self.weights and old not in self.new:
            self.new[old] = self.graph.get_attr(self.weights[old])
            self.new[old].meta = dict(old.meta)
        return self.new[old]

    def _find_results(self, pairs: Pairs) -> None:
        for trained, other in pairs:
            given = tensor_nodes((trained.args, trained.kwargs)), tensor_nodes((other.args, other.kwargs))
            if len(given[0]) != len(given[1]):
                raise FrontendError(f"`{trained.name}` reads different things in the two modes")
            for a, b in zip(*given, strict=True):
                if self.same.get(b) is not self.same.get(a, a):
                    region = self.region_of.get(a) or self.region_of.get(b)
                    if region is None or any(self.region_of.get(node, region) is not region for node in (a, b)):
                        raise FrontendError(f"`{trained.name}` reads tensors of different places in the two modes")
                    # a named tuple or a dataclass, not a tensor
                    if isinstance(a.target, type) or isinstance(b.target, type):
                        raise FrontendError(f"`{trained.name}` reads different things in the two modes")
                    region.results.setdefault((a, b), len(region.results))

    def _write(self, trained: fx.Node, other: fx.Node) -> None:
        args = self._merged(trained.args, other.args, trained)
        kwargs = self._merged(trained.kwargs, other.kwargs, trained)
        self.new[trained] = self.graph.create_node(trained.op, trained.target, args, kwargs, name=trained.name)
        self.new[trained].meta = dict(trained.meta)

    def _merged(self, trained: Any, other: Any, reader: fx.Node) -> Any:
        """The argument of train mode if eval mode has the same; otherwise a node that chooses between the two."""
        if isinstance(trained, fx.Node):
            if self.same.get(other) is self.same.get(trained, trained):
                return self._at(trained)
            region = self.region_of.get(trained) or self.region_of[other]
            return self.made[id(region)][region.results[trained, other]]
        if isinstance(trained, (tuple, list)) and type(trained) is type(other) and len(trained) == len(other):
            entries = [self._merged(a, b, reader) for a, b in zip(trained, other, strict=True)]
            return type(trained)(*entries) if hasattr(trained, "_fields") else type(trained)(entries)
        if isinstance(trained, Mapping) and isinstance(other, Mapping) and trained.keys() == other.keys():
            return {key: self._merged(trained[key], other[key], reader) for key in trained}
        if isinstance(trained, slice) and isinstance(other, slice):
            ends = (
                self._merged(getattr(trained, end), getattr(other, end), reader) for end in ("start", "stop", "step")
            )
            return slice(*ends)
        if type(trained) is type(other) and trained == other:
            return trained
        if isinstance(trained, (tuple, list, Mapping)) or reader.op == "output":
            raise FrontendError(f"`{reader.name}` reads different things in the two modes")
        flag = self._read_flag(_module_of([reader]))
        return flag if trained is True and other is False else self.graph.call_function(choose, (flag, trained, other))

    def _read_flag(self, path: str) -> fx.Node:
        self._flag(path)
        return self.graph.call_module(_flag_name(path))

    def _flag(self, path: str) -> Flag:
        if path not in self.flags:
            self.flags[path] = self.modules[_flag_name(path)] = Flag(attribute(self.module, path))
        return self.flags[path]

    def _write_region(self, region: _Region) -> None:
        """Rule 3."""
        sides = (region.trained, self.trained), (region.evaluated, self.evaluated)
        own_code = (*region.trained, *region.evaluated)
        for side, _ in sides:
            self._take_along(side)
        kind = OnlyInTraining if self._passes_on(region) else ByMode
        nodes = (*region.trained, *region.evaluated)
        read = [source for node in nodes for source in node.all_input_nodes]
        read += [node for result in region.results for node in result]
        inputs = list(dict.fromkeys(self._outside(node) for node in read if node not in nodes))
        if not region.results and not any(is_inplace(node) or node in self.weights for node in (*nodes, *read)):
            return
        made = [self._side(side, captured, inputs, region, k) for k, (side, captured) in enumerate(sides)]
        path = _module_of(own_code)
        name = f"by_mode_{len(self.made)}"
        self.modules[name] = kind(self._flag(path), *made, writes=any(map(is_inplace, nodes)))
        node = self.graph.call_module(name, tuple(self._at(source) for source in inputs))
        node.meta = {"nn_module_stack": _common_stack(own_code)}
        count = len(region.results)
        self.made[id(region)] = (
            [node] if count == 1 else [self.graph.call_function(operator.getitem, (node, k)) for k in range(count)]
        )

    def _take_along(self, side: list[fx.Node]) -> None:
        """Add to the nodes what they read from earlier parts of only this graph (mostly sizes), so that it is computed again."""
        todo = list(side)
        while todo:
            for source in todo.pop().all_input_nodes:
                alone = source in self.region_of and source.op != "placeholder" and not is_inplace(source)
                if source not in side and alone:
                    side.append(source)
                    todo.append(source)
        order = {node: k for k, node in enumerate(side[0].graph.nodes)} if side else {}
        side.sort(key=order.__getitem__)

    def _outside(self, node: fx.Node) -> fx.Node:
        counterpart = self.same.get(node, node)
        if counterpart not in self.new and counterpart not in self.weights:
            raise FrontendError(f"`{node.name}` stands elsewhere in the two modes")
        return counterpart

    def _side(
        self, nodes: list[fx.Node], captured: Captured, inputs: list[fx.Node], region: _Region, which: int
    ) -> fx.GraphModule:
        graph = fx.Graph()
        places = {node: graph.placeholder(node.name) for node in inputs}
        memo: dict[fx.Node, fx.Node] = {}

        def inner(node: fx.Node) -> fx.Node:
            return memo[node] if node in memo else places[self.same.get(node, node)]

        for node in nodes:
            memo[node] = graph.node_copy(node, inner)
        graph.output(tuple(inner(result[which]) for result in region.results))
        names = {str(node.target) for node in nodes if node.op in ("get_attr", "call_module")}
        side_module = assemble(graph, {name: attribute(captured.graph_module, name) for name in names}, "Way")
        side_module.recompile()
        return side_module

    def _passes_on(self, region: _Region) -> bool:
        """Whether eval mode returns a tensor unchanged that train mode changes elementwise, by masks that treat all channels alike."""
        if region.evaluated or len(region.results) != 1:
            return False
        (_, handed_on), *_ = region.results
        tensor = self.same.get(handed_on)
        devices = [node for node in region.trained if op_name(node) == "getattr" and node.args[1:] == ("device",)]
        read = {source for node in region.trained if node not in devices for source in node.all_input_nodes}
        if tensor is None or read - {*region.trained} != {tensor} or not is_elementwise(region.trained, tensor):
            return False
        for node in devices:  # tracing reads the device of the network's input, which is another tensor
            node.args = (tensor, "device")
        return True


def _key(node: fx.Node) -> tuple[object, ...]:
    return node.op, str(node.target), tuple(map(str, node.meta.get("nn_module_stack", {}))), len(node.all_input_nodes)


def _common_stack(nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """The module calls that contain all the nodes."""
    stacks = [node.meta.get("nn_module_stack", {}) for node in nodes]
    return {call: value for call, value in stacks[0].items() if all(call in stack for stack in stacks)}


def _module_of(nodes: Iterable[fx.Node]) -> str:
    """Path of the innermost module whose code contains all the nodes."""
    return next(reversed([str(call).partition("@")[0] for call in _common_stack(nodes)]), "")


def _flag_name(path: str) -> str:
    return f"training_{path.replace('.', '_')}" if path else "training_flag"
