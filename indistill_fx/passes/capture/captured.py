"""What every capture method takes and returns, and the rules that all of them share: leaves, module outputs, assembly, names."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.draws import Lines
from indistill_fx.graph.edit import batch_of, batch_size, set_graph
from indistill_fx.graph.names import writable_paths
from indistill_fx.graph.opaque import Opaque
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.traced import NodeFacts

_THROUGH = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


@dataclass(frozen=True, slots=True)
class Request:
    """What a capture method is asked for.

    Attributes:
        module: whose forward is captured.
        inputs: the example's arguments, those by position.
        kwargs: those by name.
        leaves: paths of modules that stay one node each.
        loose: tensors in attributes that are state, by name; other tensors that are not buffers are constants.
        lines: finds the lines that draw random numbers.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    leaves: Sequence[str] = ()
    loose: Mapping[str, Tensor] = field(default_factory=dict)
    lines: Lines = field(default_factory=Lines)

    def batch_of(self, size: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, those by position and those by name, with another batch size."""
        given = self.inputs, dict(self.kwargs)
        inputs, kwargs = batch_of(given, size, example_size=batch_size(given))
        return inputs, kwargs


@dataclass(frozen=True, slots=True)
class Captured:
    """A captured graph, before anything is known of its values.

    Attributes:
        graph_module: the graph over the module's own leaf modules.
        outputs: (tap name, node name, how many nodes stood in the graph when the module returned it), innermost module first.
        leaves: modules kept as one node because their code could not be traced.
        specialisations: decisions taken by the example input.
        notes: anything else for the report.
        draws: whether a leaf draws random numbers outside tensors, by which it may leave out work.
        fixed: sizes of inputs that the graph was captured for and works for alone, by input; None for an axis of any size.
    """

    graph_module: fx.GraphModule
    outputs: tuple[tuple[str, str, int], ...]
    leaves: tuple[str, ...] = ()
    specialisations: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    draws: bool = False
    fixed: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    @property
    def renamed(self) -> tuple[str, ...]:
        """Lines of the report on names that are written differently in the graph."""
        pairs: dict[str, str] = {}
        for new, old in self.graph_module.meta["renamed"].items():
            new_parts, old_parts = new.split("."), old.split(".")
            while new_parts[-1] == old_parts[-1]:
                del new_parts[-1], old_parts[-1]
            pairs[".".join(old_parts)] = ".".join(new_parts)
        return tuple(f"{old!r} is called `{new}` in the graph" for old, new in pairs.items())


_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def argument_names(module: nn.Module, count: int) -> list[str]:
    """What the module's forward calls its first `count` positional arguments; `input_3` where it has no name for one."""
    known = inspect.signature(
        module.forward
    ).parameters.values()  # of the bound method: without `self`, whatever that is called
    names = [parameter.name for parameter in known if parameter.kind in _POSITIONAL][:count]
    return names + [f"input_{k}" for k in range(len(names), count)]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation: those of torch.nn, but not its containers and its transformers, which hold whole networks."""
    if isinstance(module, (torch.jit.ScriptModule, Opaque)):
        return True
    if isinstance(module, (nn.Sequential, *_THROUGH)):
        return False
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of what a module takes or returns, each with its place as Python writes it (`[0]`, `[out]`); fields of dataclasses too.

    >>> list(parts({"out": 1, "aux": (2, 3)}))
    [('[out]', 1), ('[aux][0]', 2), ('[aux][1]', 3)]
    """
    for key, child in children(value) or [(None, None)]:
        if key is None:
            yield path, value
        else:
            yield from parts(child, f"{path}[{key}]")


def children(value: Any) -> list[tuple[Any, Any]]:
    """Key and entry of what a dict, tuple, list, namedtuple or dataclass holds; nothing for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return list(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return []


def made_from(record: Any) -> dict[str, Any]:
    """The arguments that make a dataclass again, without those that are None anyway.

    Raises:
        FrontendError: its `__post_init__` changes what it is given, so that a graph would change it twice.
    """
    given = [(field.name, getattr(record, field.name), field.default) for field in fields(record) if field.init]
    entries = {name: entry for name, entry, default in given if entry is not None or default is not None}
    if hasattr(record, "__post_init__"):
        try:
            again = type(record)(**entries)
            same = all(
                left is right
                for name, entry in entries.items()
                for (_, left), (_, right) in zip(parts(entry), parts(getattr(again, name)), strict=True)
                if isinstance(left, (Tensor, fx.Proxy))
            )
        except Exception:  # the user's own code
            same = False
        if not same:
            raise FrontendError(
                f"`{type(record).__name__}.__post_init__` changes the fields that it is given, so a graph cannot make the record again",
                hint="Compute them in forward, before the record is made; or, in __post_init__, into further fields: `field(init=False)`.",
            )
    return entries


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what a module takes or returns, in order."""
    return [leaf for _, leaf in parts(value) if isinstance(leaf, Tensor)]


def returned(name: str, result: Any, wanted: type) -> list[tuple[str, Any]]:
    """The taps that a module's return value makes: the module's name if it holds one tensor, else the name and the place of each.

    Args:
        name: the module's path, with the number of the call if it is not the first.
        result: what the module returned.
        wanted: class of the tensors (or of what stands for them) in it.
    """
    found = [(place, leaf) for place, leaf in parts(result) if isinstance(leaf, wanted)]
    return [(name if len(found) == 1 else f"{name}{place}", leaf) for place, leaf in found] if name else []


def tensor_names(module: nn.Module, unregistered: Mapping[str, Tensor] = MappingProxyType({})) -> dict[int, str]:
    """Identity of every parameter and buffer -> its first name; and of tensors in attributes, by name, that the forward changes."""
    found: dict[int, str] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers(), *unregistered.items()):
        found.setdefault(id(tensor), name)
    return found


def assemble(graph: fx.Graph, targets: Mapping[str, Any], class_name: str) -> fx.GraphModule:
    """A GraphModule whose modules, parameters and buffers are the very objects given, under the names given.

    `fx.GraphModule` does this too, but registers a buffer again on a module that already has it, which changes the caller's module.
    The graph is not compiled; `functionalize`, through which every capture goes, does that.
    Names that cannot be written into the graph's source stand under others; `meta["renamed"]` holds them, new to old.
    """
    graph_module = fx.GraphModule(nn.Module(), fx.Graph(), class_name=class_name)
    paths = writable_paths(targets)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = paths[str(node.target)]
    graph_module.meta["renamed"] = {new: old for old, new in paths.items() if new != old}
    for path in sorted(targets, key=lambda path: path.count(".")):
        *parents, name = paths[path].split(".")
        home: nn.Module = graph_module
        for parent in parents:
            if parent not in home._modules and not hasattr(home, parent):
                home.add_module(parent, nn.Module())
            home = attribute(home, parent)
        value = targets[path]
        if getattr(home, name, None) is value:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            home.register_buffer(name, value)
        else:
            setattr(home, name, value)
    set_graph(graph_module, graph)
    return graph_module


def name_taps(captured: Captured, facts: Mapping[str, NodeFacts]) -> dict[str, tuple[str, ...]]:
    """Names for every node that has facts, the preferred one first, in graph order: as people would name its tensor.

    In order of preference: the outermost module that returns the tensor (`layer3`), inner ones (`layer3.1`), the second call of a module
    (`layer3.1.relu@2`), a part of what a module returns (`lstm[0]`), the enclosing module and the operation (`layer3.1:add`, the next one
    `layer3.1:add_1`).

    Args:
        captured: the graph and the record of module outputs, innermost first.
        facts: nodes whose value is one tensor; others cannot be tapped.
    """
    nodes = {node.name: node for node in captured.graph_module.graph.nodes}
    modules: dict[str, list[str]] = {}
    for name, node, _ in captured.outputs:
        if name and not name.startswith("@"):
            for place, part in _tensors_of(nodes[node], facts) if node in nodes else ():
                modules.setdefault(part, []).insert(0, f"{name}{place}")
    seen: Counter[str] = Counter()
    named: dict[str, tuple[str, ...]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.name in facts and node.op not in ("get_attr", "output"):
            named[node.name] = (*modules.get(node.name, ()), _local_name(node, facts[node.name].path, seen))
    return named


def _tensors_of(node: fx.Node, facts: Mapping[str, NodeFacts], place: str = "") -> Iterator[tuple[str, str]]:
    """A node's tensors and their places in its value: `[0]`, `[1][0]` of an LSTM; the node itself where it is one tensor."""
    if node.name in facts:
        yield place, node.name
        return
    for user in node.users:
        if user.target is operator.getitem and user.args[0] is node:
            yield from _tensors_of(user, facts, f"{place}[{user.args[1]}]")


def _local_name(node: fx.Node, module: str, seen: Counter[str]) -> str:
    if node.op == "placeholder":
        return f":{node.target}"
    base = f"{module}:{op_name(node)}"
    seen[base] += 1
    return base if seen[base] == 1 else f"{base}_{seen[base] - 1}"
