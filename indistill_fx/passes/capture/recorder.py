"""Records what a module computes while its own code runs on an example. See `shapes` for the rules."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any
from unittest.mock import patch
from weakref import ref

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from indistill_fx.errors import FrontendError
from indistill_fx.graph.ops import writes_first
from indistill_fx.passes.capture.captured import Captured, assemble, is_leaf, returned, tensor_names, tensors
from indistill_fx.passes.capture.symbolic_sizes import Book, Size, current_place, new_size
from indistill_fx.passes.capture.torch_functions import (
    DATA,
    SHAPES,
    SILENT,
    AppliedFunction,
    as_call,
    is_wrapped,
    name_of,
    plain,
    refused_write,
    writes_itself,
)

_call_module = nn.Module.__call__
_apply = inspect.getattr_static(torch.autograd.Function, "apply")
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
    torch.Generator,
)


class Recorder(TorchFunctionMode):
    """One run of a module, recorded.

    Args:
        module: the module; its code is run, its weights are not changed, its buffers may be.
        leaves: paths of submodules to keep as one node.
        give_up_submodules: keep the smallest submodule that cannot be traced as one node, instead of failing.
    """

    def __init__(self, module: nn.Module, leaves: Sequence[str], *, give_up_submodules: bool):
        super().__init__()
        self.module, self.wanted, self.give_up_submodules = module, frozenset(leaves), give_up_submodules
        self.paths = {id(part): path for path, part in module.named_modules()}
        self.names = tensor_names(module)
        self.graph = fx.Graph()
        self.book = Book(self.create)
        self.order: list[fx.Node] = []
        self.nodes = WeakTensorKeyDictionary()
        self.tracked: list[tuple[ref[Tensor], fx.Node | None]] = []
        self.targets: dict[str, Any] = {}
        self.stack: dict[str, tuple[str, type]] = {}
        self.calls: Counter[str] = Counter()
        self.outputs: list[tuple[str, fx.Node, fx.Node]] = []
        self.of_input: set[fx.Node] = set()
        self.of_sizes: set[fx.Node] = set()
        self.of_state: set[fx.Node] = set()
        self.given_up: list[str] = []
        self.functions: dict[str, str] = {}
        self.paused, self.grad = False, False
        self.hopeless: BaseException | None = None
        self.first: Tensor | None = None
        self.first_node: fx.Node | None = None

    def run(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Run the module once and record it.

        Raises:
            FrontendError: a part of the code cannot be traced.
        """
        self._placeholders(inputs, kwargs)
        self.grad = torch.is_grad_enabled()
        recorder = self

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return recorder.call(module, args, kwargs)

        def apply(function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            return recorder.apply(function, args, kwargs)

        functions = (
            patch.object(torch.autograd.Function, "apply", classmethod(apply))
            if self.give_up_submodules
            else nullcontext()
        )
        try:
            with patch.object(nn.Module, "__call__", call), functions, self:
                result = self.module(*inputs, **kwargs)
            self.graph.output(self.argument(result))
        except FrontendError:
            raise
        except Exception as error:  # the caller's code may raise anything, the more so on what it does not expect
            raise FrontendError(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            ) from error

    def captured(self, already: Sequence[str] = ()) -> Captured:
        """The recorded graph over the module's own parts."""
        for node in reversed(self.order):
            if node.target in (operator.getitem, getattr) and not node.users:
                self.graph.erase_node(node)
        position = {node: k for k, node in enumerate(self.graph.nodes, 1)}
        outputs = [
            (name, node.name, _position(last, position)) for name, node, last in self.outputs if not node._erased
        ]
        used = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        targets = {name: value for name, value in self.targets.items() if name in used}
        leaves = tuple(dict.fromkeys((*already, *self.given_up)))
        return Captured(
            assemble(self.graph, targets, type(self.module).__name__),
            tuple(outputs),
            leaves=(
                *(leaf for leaf in leaves if leaf in used),
                *(self.functions[name] for name in self.functions if name in used),
            ),
            specialisations=tuple(
                dict.fromkeys(str(decision) for decision in self.book.decisions if decision.reported)
            ),
        )

    # ---- nodes and arguments ----------------------------------------------------------------------------------------
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
            return self._node_of(value)
        if isinstance(value, Size):
            return value.emit()
        if isinstance(value, torch.device) and self.first is not None and value == self.first.device:
            return self._device_node()
        if value is None or value is ... or isinstance(value, _PLAIN):
            return value
        if isinstance(value, slice):
            return slice(*map(self.argument, (value.start, value.stop, value.step)))
        if isinstance(value, PackedSequence):  # its constructor looks at the tensors, so it must run with the graph
            return self.create("call_function", PackedSequence, tuple(map(self.argument, value)), {})
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.argument, value))
        if isinstance(value, (tuple, list)):
            return (list if isinstance(value, list) else tuple)(map(self.argument, value))
        if is_dataclass(value) and not isinstance(value, type):
            entries = {field.name: self.argument(getattr(value, field.name)) for field in fields(value)}
            return self.create(
                "call_function", type(value), (), {key: entry for key, entry in entries.items() if entry is not None}
            )
        if isinstance(value, Mapping):
            return {key: self.argument(entry) for key, entry in value.items()}
        if type(value).__module__.startswith("torch") and not isinstance(value, nn.Module):
            return value
        raise FrontendError(
            f"{self._here()} passes a {type(value).__name__}, which no graph can hold",
            hint="Pass and return tensors, or dicts, tuples or dataclasses of them; for a Hugging Face model, set use_cache=False.",
        )

    def _placeholders(self, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        names = [name for name in inspect.signature(self.module.forward).parameters if name != "self"]
        names += [f"input_{k}" for k in range(len(names), len(inputs))]
        for name, value in (*zip(names, inputs, strict=False), *kwargs.items()):
            node = self.create("placeholder", name, (), {})
            self._track(value, node)
        self.first = next(iter(tensors((inputs, kwargs))), None)
        self.first_node = None if self.first is None else self._node_of(self.first)

    def _node_of(self, tensor: Tensor) -> fx.Node:
        node: fx.Node | None = self.nodes.get(tensor)
        if node is not None and not node._erased:
            return node
        if is_wrapped(tensor):
            raise FrontendError(f"{self._here()} computes inside vmap or grad")
        name = self.names.get(id(tensor), "")
        constant = not name
        if constant:
            name = f"_tensor_constant{sum(key.startswith('_tensor_constant') for key in self.targets)}"
        self.targets[name] = tensor.detach().clone() if constant else tensor
        node = self.create("get_attr", name, (), {})
        if not constant:
            self.of_state.add(node)
        self._remember(tensor, node)
        return node

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

    def _track(self, value: Any, node: fx.Node) -> None:
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
                self._track(entry, self.create("call_function", access, (node, key), {}))

    # ---- functions --------------------------------------------------------------------------------------------------
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Torch calls this instead of each of its functions."""
        kwargs, name = kwargs or {}, name_of(func)
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if not self.paused and isinstance(source, nn.Parameter) and writes_itself(func, args, kwargs):
            raise refused_write(self._here(), self.names.get(id(source), ""))
        if self.paused or name in SILENT:
            return func(*plain(args), **plain(kwargs))
        known = self.nodes.get(source) if source is not None else None
        if (
            name in SHAPES
            and source is not None
            and known is not None
            and (known in self.of_input or known in self.of_sizes)
        ):
            return self._shape(source, known, name, *args[1:], **kwargs)
        result = self._take_data(func, args, kwargs) if name in DATA else func(*plain(args), **plain(kwargs))
        op, target, arguments = as_call(func, args)
        written = source if target is operator.setitem else None
        if not tensors(result) and written is None:
            return result
        inplace = writes_first(op, target, kwargs)
        if not inplace:
            result = _distinct(result, args)
        if isinstance(result, (tuple, list)) and known in self.of_input:
            self.book.decide(len(result), reported=False)
        node = self.create(op, target, self.argument(arguments), self.argument(kwargs))
        if inplace and source is not None and self._node_of(source).op == "get_attr":
            self.of_state.update((self._node_of(source), node))
        self._track(result if written is None else written, node)
        return result

    def _shape(self, tensor: Tensor, node: fx.Node, name: str, dim: int | None = None) -> Any:
        if name in ("shape", "size") and dim is None:
            return torch.Size([new_size(self.book, n, "size", (node, k)) for k, n in enumerate(tensor.shape)])  # type: ignore[misc]
        if name == "size" and dim is not None:
            return new_size(self.book, tensor.shape[dim], "size", (node, int(dim)))
        if name == "__len__":
            return new_size(self.book, len(tensor), "size", (node, 0)).plain()  # Python insists on an int
        return new_size(self.book, tensor.numel(), "numel", (node,))

    def _take_data(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rule 3; data made of sizes alone is a decision like any on sizes, and constants are free."""
        of_sizes = False
        for tensor in tensors(args):
            node = self.nodes.get(tensor)
            of_sizes |= node in self.of_sizes
            if id(tensor) in self.names or node in self.of_input or node in self.of_state:
                place, expression = current_place()
                raise FrontendError(
                    f"{self._here()} decides by the data at {place}: `{expression}`",
                    where=place,
                    got=expression,
                    expected="code that computes the same operations for all data of a shape",
                    hint="Use torch.where, or move that line into a submodule of its own, which then stays one node in the graph.",
                )
        result = func(*plain(args), **plain(kwargs))
        if of_sizes:
            self.book.decide(str(result))
        return result

    # ---- modules ----------------------------------------------------------------------------------------------------
    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for `nn.Module.__call__`."""
        path = self.paths.get(id(module))
        if self.paused or path is None:
            return _call_module(module, *args, **kwargs)
        self.calls[path] += 1
        name = path if self.calls[path] == 1 else f"{path}@{self.calls[path]}"
        before, outside = self._mark(), self.book.module
        self.stack[name], self.book.module = (path, type(module)), path
        try:
            if path in self.wanted or (path and is_leaf(module)):
                result = self._call_leaf(module, path, args, kwargs)
            else:
                try:
                    result = _call_module(module, *args, **kwargs)
                except Exception as error:
                    if not self.give_up_submodules or not path or error is self.hopeless:
                        raise
                    self._roll_back(before)
                    self.given_up.append(path)
                    result = self._call_leaf(module, path, args, kwargs)
        finally:
            self.stack.pop(name, None)
            self.book.module = outside
        for tap, tensor in returned(name, result, Tensor):
            node = self.nodes.get(tensor)
            if node is not None:
                self.outputs.append((tap, node, self.order[-1]))
        return result

    def apply(self, function: type[torch.autograd.Function], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for `autograd.Function.apply` in the third method: one node, since its gradient is its own."""
        if self.paused:
            return _apply.__get__(None, function)(*args, **kwargs)
        name = f"_function{len(self.functions)}"
        self.functions[name] = f"{self.book.module}:{function.__name__}"
        return self._call_leaf(AppliedFunction(function), name, args, kwargs)

    def _call_leaf(self, module: nn.Module, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments, keywords = self.argument(args), self.argument(kwargs)
        self.paused = True
        try:
            result = _call_module(module, *plain(args), **plain(kwargs))
            if getattr(module, "inplace", False) is not True:
                result = _distinct(result, (args, kwargs))
        except Exception as error:
            self.hopeless = error
            raise
        finally:
            self.paused = False
        self.targets[path] = module
        self._track(result, self.create("call_module", path, arguments, keywords))
        return result

    def _mark(self) -> tuple[int, int, int, int]:
        return len(self.order), len(self.tracked), len(self.outputs), len(self.book.decisions)

    def _roll_back(self, mark: tuple[int, int, int, int]) -> None:
        """Take back all that was recorded since the mark."""
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

    def _here(self) -> str:
        return f"`{self.book.module}`" if self.book.module else f"the forward of {type(self.module).__name__}"


def _distinct(result: Any, args: Any) -> Any:
    """The result, as a tensor object of its own where a function hands back its argument (dropout in eval, contiguous, to)."""
    if isinstance(result, Tensor):
        return result.view_as(result) if any(result is given for given in tensors(args)) else result
    return result


def _position(last: fx.Node, positions: Mapping[fx.Node, int]) -> int:
    return positions.get(last, len(positions))
