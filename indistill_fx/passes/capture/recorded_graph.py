"""The graph of a recorded run while it is written: nodes, and which tensors and sizes they stand for."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.weak import WeakTensorKeyDictionary

from indistill_fx.errors import FrontendError
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.capture.captured import Captured, argument_names, assemble, made_from, tensor_names, tensors
from indistill_fx.passes.capture.symbolic_sizes import Book, Size
from indistill_fx.passes.capture.torch_functions import SHAPES, is_wrapped, refused_line

_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
"""What torch takes Python's types for (`dtype=float`)."""


class RecordedGraph:
    """Nodes by tensor, in the order in which they were computed.

    Args:
        module: what runs.
        unregistered: tensors that are held in attributes, are not buffers, and are changed by the code; by name.
    """

    def __init__(self, module: nn.Module, unregistered: Mapping[str, Tensor]):
        self.module = module
        self.names = tensor_names(module, unregistered)
        self.state = {**dict(module.named_buffers()), **unregistered}
        self.graph = fx.Graph()
        self.book = Book(self.create, self.refused_data)
        self.order: list[fx.Node] = []
        self.nodes = WeakTensorKeyDictionary()
        self.tracked: list[tuple[ref[Tensor], fx.Node | None]] = []
        self.targets: dict[str, Any] = {}
        self.outside: list[Tensor] = []
        self.stack: dict[str, tuple[str, type]] = {}
        self.outputs: list[tuple[str, fx.Node, fx.Node]] = []
        self.of_input: set[fx.Node] = set()
        self.of_sizes: set[fx.Node] = set()
        self.of_state: set[fx.Node] = set()
        self.functions: dict[str, str] = {}
        self.notes: list[str] = []
        self.grad = False
        self.first: Tensor | None = None
        self.first_node: fx.Node | None = None

    def create(self, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """A new node, at the end of the graph."""
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["nn_module_stack"] = dict(self.stack)
        self.order.append(node)
        sources = node.all_input_nodes
        if op == "placeholder":
            self.of_input.add(node)
        elif target in SHAPES:
            self.of_sizes.add(node)
        else:
            for family in (self.of_input, self.of_sizes, self.of_state):
                if not family.isdisjoint(sources):
                    family.add(node)
        return node

    def argument(self, value: Any) -> Any:
        """A value as an argument of a node."""
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, Size):
            return value.emit()
        if isinstance(value, np.generic):  # `np.sqrt(0.1)`, which generated code could not write
            return value.item()
        if isinstance(value, np.ndarray):  # a place to look up; rule 7 of `recording`
            return self.node_of(torch.from_numpy(value))
        if isinstance(value, torch.device) and self.first is not None and value == self.first.device:
            return self._device_node()
        if value is None or value is ... or isinstance(value, _PLAIN):
            return value
        if isinstance(value, type) and value in _DTYPES:
            return _DTYPES[value]
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if isinstance(value, PackedSequence):  # the constructor reads the tensors, so it must run inside the graph
            return self.create("call_function", PackedSequence, tuple(map(self.argument, value)), {})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.argument, value))
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self.argument, value))
        if is_dataclass(value) and not isinstance(value, type):
            entries = {name: self.argument(entry) for name, entry in made_from(value).items()}
            return self.create("call_function", type(value), (), entries)
        if isinstance(value, Mapping):
            return {key: self.argument(entry) for key, entry in value.items()}
        if type(value).__module__.startswith("torch") and not isinstance(value, (nn.Module, torch.Generator)):
            return value
        raise FrontendError(
            f"{self.here()} passes a {type(value).__name__}, which no graph can hold",
            hint="Pass and return tensors, or dicts, tuples or dataclasses of them; for a Hugging Face model, set use_cache=False.",
        )

    def placeholders(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """One placeholder for each argument."""
        names = argument_names(self.module, len(inputs))
        for name, value in (*zip(names, inputs, strict=True), *kwargs.items()):
            node = self.create("placeholder", name, (), {})
            self.track(value, node)
        self.first = next(iter(tensors((inputs, kwargs))), None)
        self.first_node = None if self.first is None else self.node_of(self.first)

    def node_of(self, tensor: Tensor) -> fx.Node:
        """The node that stands for a tensor; parameters, buffers and unregistered tensors get one at their first use."""
        node: fx.Node | None = self.nodes.get(tensor)
        if node is not None and not node._erased:
            return node
        if is_wrapped(tensor):
            raise FrontendError(f"{self.here()} computes inside vmap or grad")
        name = self.names.get(id(tensor), "")
        constant = not name
        if constant:
            name = f"_tensor_constant{sum(key.startswith('_tensor_constant') for key in self.targets)}"
        self.targets[name] = tensor.detach().clone() if constant else tensor
        self.outside += [tensor] if constant else []
        node = self.create("get_attr", name, (), {})
        if not constant:
            self.of_state.add(node)
        self._remember(tensor, node)
        return node

    def is_outside(self, tensor: Tensor) -> bool:
        """Whether a tensor, or its base, existed before the run and is neither a parameter nor state of the module."""
        dense = [other for other in self.outside if other.layout is tensor.layout is torch.strided]
        return any(other.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr() for other in dense)

    def _device_node(self) -> fx.Node:
        """The device of the first input: tensors made in the forward follow it when the graph is moved."""
        first = self.first_node
        assert first is not None
        found = next((user for user in first.users if user.target is getattr and user.args[1] == "device"), None)
        if found is None:
            with self.graph.inserting_after(first):
                found = self.create("call_function", getattr, (first, "device"), {})
            self.of_input.discard(found)
        return found

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self.tracked.append((ref(tensor), self.nodes.get(tensor)))
        self.nodes[tensor] = node

    def track(self, value: Any, node: fx.Node) -> None:
        """Make `node` stand for a result; the tensors inside a tuple, dict or dataclass get nodes of their own."""
        if isinstance(value, Tensor):
            if self.grad and not torch.is_grad_enabled() and value.is_floating_point() and node.op != "placeholder":
                node = self.create("call_method", "detach", (node,), {})
            self._remember(value, node)
            return
        entries: list[tuple[Callable[..., Any], Any, Any]] = []
        if isinstance(value, Mapping):
            entries = [(operator.getitem, key, entry) for key, entry in value.items()]
        elif isinstance(value, (tuple, list)):
            entries = [(operator.getitem, key, entry) for key, entry in enumerate(value)]
        elif is_dataclass(value) and not isinstance(value, type):
            entries = [(getattr, field.name, getattr(value, field.name)) for field in fields(value)]
        for access, key, entry in entries:
            if tensors(entry):
                self.track(entry, self.create("call_function", access, (node, key), {}))

    def write_back(self) -> None:
        """Write tensors that the code assigned to attributes into the former tensors, so that the next call finds them.

        Assigned ones of another shape are caches. What was read before is a copy, which no write changes.
        """
        assigned = {}
        for name, before in self.state.items():
            now = attribute(self.module, name)
            node = self.nodes.get(now) if isinstance(now, Tensor) and now is not before else None
            if node is not None and (now.shape, now.dtype) == (before.shape, before.dtype):
                assigned[name] = node
                self.targets[name] = before
        reads = {
            node: str(node.target) for node in self.graph.nodes if node.op == "get_attr" and node.target in assigned
        }
        copies = {read: self._copied(read) for read in reads}
        for name, node in assigned.items():
            value = copies.get(node, node)
            old = next((read for read in reads if reads[read] == name), None)
            with self.graph.inserting_after(value):
                old = old or self.graph.get_attr(name)
            with self.graph.inserting_after(max(value, copies.get(old, old))):
                detached = self.graph.call_method("detach", (value,))
            with self.graph.inserting_after(detached):
                write = self.graph.call_method("copy_", (old, detached))
            for new in (old, detached, write):
                new.meta = {"nn_module_stack": {}, **node.meta, **new.meta}

    def _copied(self, read: fx.Node) -> fx.Node:
        with self.graph.inserting_after(read):
            copied = self.graph.call_method("clone", (read,))
        copied.meta = dict(read.meta)
        read.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
        return copied

    def mark(self) -> tuple[int, int, int, int]:
        """The current position of the recording, for `roll_back`."""
        return len(self.order), len(self.tracked), len(self.outputs), len(self.book.decisions)

    def roll_back(self, mark: tuple[int, int, int, int]) -> None:
        """Remove everything that was recorded since the mark."""
        nodes, tracked, outputs, decisions = mark
        for reference, node in reversed(self.tracked[tracked:]):
            tensor = reference()
            if tensor is None:
                continue
            if node is None:
                self.nodes.pop(tensor, None)
            else:
                self.nodes[tensor] = node
        for node in reversed(self.order[nodes:]):
            self.graph.erase_node(node)
        del self.order[nodes:], self.tracked[tracked:], self.outputs[outputs:], self.book.decisions[decisions:]

    def here(self) -> str:
        """The module whose code runs, for messages."""
        return f"`{self.book.module}`" if self.book.module else f"the forward of {type(self.module).__name__}"

    def refused_data(self) -> FrontendError:
        """The error for code whose operations depend on the data."""
        return refused_line(
            f"{self.here()} decides by the data",
            expected="code that computes the same operations for all data of a shape",
            instead="Use torch.where",
        )

    def captured(self, leaves: Sequence[str] = ()) -> Captured:
        """The recorded graph over the module's own parts.

        Args:
            leaves: modules that were kept as one node.
        """
        for node in reversed(self.order):
            if node.target in (operator.getitem, getattr) and not node.users:
                self.graph.erase_node(node)
        position = {node: k for k, node in enumerate(self.graph.nodes, 1)}
        outputs = [
            (name, node.name, _position(last, position)) for name, node, last in self.outputs if not node._erased
        ]
        used = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        targets = {name: value for name, value in self.targets.items() if name in used}
        return Captured(
            assemble(self.graph, targets, type(self.module).__name__),
            tuple(outputs),
            leaves=(
                *(leaf for leaf in leaves if leaf in used),
                *(self.functions[name] for name in self.functions if name in used),
            ),
            notes=tuple(dict.fromkeys(self.notes)),
            specialisations=tuple(
                dict.fromkeys(str(decision) for decision in self.book.decisions if decision.reported)
            ),
        )


def _position(last: fx.Node, positions: Mapping[fx.Node, int]) -> int:
    return positions.get(last, len(positions))
