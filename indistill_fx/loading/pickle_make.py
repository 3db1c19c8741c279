"""Make what a pickle describes: modules and tensors, and what they hold; each kind of object by a rule of its own.

1. Module classes are made empty (never called) and filled with data: no entry of their state hides a method.
2. Listed calls have the arguments torch.save writes; a `functools.partial` holds a listed class or function.
3. A tensor must be within its storage. torch would enlarge the storage until it does: 10**12 elements from 100 bytes.
4. Objects of a trusted package are made as the pickle says, by their own code.
5. Everything else is refused, and nothing of it is run.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.loading.allow_list import FUNCTIONS, Named
from indistill_fx.loading.graph_code import UnreadableError, read_graph
from indistill_fx.loading.module_check import find_fault
from indistill_fx.loading.pickle_scan import Made, Scan, Storage, walk
from indistill_fx.loading.quantised import INTEGERS, fill_convolution, pack, quantise

# An expanded tensor has more elements than its storage. More than this in total is an attack on whoever copies them.
MOST_EXPANDED = 1 << 28
_MOST_VIEWS = 8
_MOST_DIMENSIONS = 64
_NOTHING = object()


_HOOKS = "Remove them before the model is saved (weight_norm: torch.nn.utils.remove_weight_norm), or name the code that makes the model."
GRAPH_HINT = "If it is your own, save it by torch.export.save(torch.export.export(model, inputs), 'model.pt2')."
MALICIOUS = "No file of torch.save(model, path) does this: it is damaged or malicious. Do not load it elsewhere."


class UnfitError(Exception):
    """Says what a file would do that cannot be done safely, and what to do about it; by default, that no honest file does it."""

    def __init__(self, problem: str, hint: str = MALICIOUS):
        super().__init__(problem)
        self.hint = hint


class Maker:
    """Makes values that a pickle describes; the same description is made once.

    Args:
        scan: of the pickle.
        read: gives the bytes of a storage.
    """

    def __init__(self, scan: Scan, read: Callable[[Storage], torch.UntypedStorage]):
        self.scan, self.read = scan, read
        self.made: dict[int, Any] = {}
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.shown = 0
        self.stored = sum(storage.elements for storage in scan.storages.values())

    def make(self, wanted: Any) -> Any:
        """Make the value that was described.

        Raises:
            UnfitError: it would be more than modules, tensors and data.
            Exception: any kind, if the description makes no sense.
        """
        needed = {id(part) for part in walk(wanted)}
        for opcode, target, payload in self.scan.steps:
            if id(target) in needed:
                self._do(opcode, target, payload)
        return self.value(wanted)

    def _do(self, opcode: str, target: Made, payload: Any) -> None:
        kind = target.kind
        if isinstance(kind, Named) and kind.use == "trusted":
            self._do_trusted(opcode, target, kind.value, payload)
        elif opcode == "make":
            self.made[id(target)] = self._make(target)
        elif opcode == "state" and len(target.states) == 1:
            self._set_state(target, payload)
        else:
            raise UnfitError(f"changes {name_of(target)} that could change what its code does")

    def _do_trusted(self, opcode: str, target: Made, function: Any, payload: Any) -> None:
        """Carry out a step for a trusted object as Python's own unpickler does."""
        if opcode == "make":
            arguments = self.value(target.arguments)
            self.made[id(target)] = function(*arguments) if target.called else function.__new__(function, *arguments)
            return
        made, payload = self.made[id(target)], self.value(payload)
        if opcode == "items":
            for key, value in payload:
                made[key] = value
        elif opcode == "append":
            for value in payload:
                made.append(value)
        elif hasattr(made, "__setstate__"):
            made.__setstate__(payload)
        else:
            plain, slots = payload if isinstance(payload, tuple) and len(payload) == 2 else (payload, None)
            vars(made).update(plain or {})
            for key, value in (slots or {}).items():
                setattr(made, key, value)

    def value(self, described: Any) -> Any:
        """The value of a description; everything that it consists of is made first."""
        match described:
            case None | bool() | int() | float() | complex() | str() | bytes() | torch.Size():
                return described
            case Made() | list() | dict() | set():
                if id(described) not in self.made:
                    self.made[id(described)] = self._container(described)
                return self.made[id(described)]
            case tuple():
                return tuple(self.value(item) for item in described)
            case frozenset():
                return frozenset(self.value(item) for item in described)
            case Named(use="module" | "plain" | "function" | "enum" | "constant" | "trusted"):
                return described.value
            case Named(path="torch.Tensor"):
                return torch.Tensor
            case Named(path="torch.nn.parameter.Parameter"):
                return nn.Parameter
        raise UnfitError(f"names things outside of modules, tensors and data: {name_of(described)}")

    def _container(self, described: Any) -> Any:
        if isinstance(described, Made):
            raise UnfitError(f"uses {name_of(described)} before it is made")
        if isinstance(described, set):
            return {self.value(item) for item in described}
        made: Any = type(described)()  # list, dict, OrderedDict or Counter
        self.made[id(described)] = made  # registered before it is filled, because it may contain itself
        if isinstance(described, list):
            made.extend(self.value(item) for item in described)
        else:
            for key, item in described.items():
                made[self.value(key)] = self.value(item)
        return made

    def _make(self, target: Made) -> Any:
        kind, arguments = target.kind, target.arguments
        if isinstance(kind, Named) and isinstance(arguments, tuple):
            if kind.use in ("module", "plain") and not target.called and arguments == ():
                return kind.value.__new__(kind.value)
            if kind.use == "enum" and target.called and len(arguments) == 1 and isinstance(arguments[0], (str, int)):
                return kind.value(arguments[0])
            if kind.path == "torch.ScriptObject" and not target.called and arguments == ():
                return _NOTHING  # its state creates it later
            if kind.use == "graph" and target.called:
                return self._graph_module(*arguments)
            if kind.use == "call" and target.called:
                made = self._call(kind.path, arguments)
                if made is not _NOTHING:
                    return made
        verb = "calls" if target.called else "makes"
        given = ", ".join(map(name_of, arguments)) if isinstance(arguments, tuple) else name_of(arguments)
        raise UnfitError(f"{verb} {name_of(kind)}({given})")

    def _graph_module(self, body: Mapping[str, Any], imports: str) -> fx.GraphModule:
        """Make a graph module, with its graph read from the source code in the file."""
        root, held = nn.Module(), {name: self.value(part) for name, part in body.items()}
        code = held.pop("_code", None) or held.pop("code")
        vars(root).update(held)
        if fault := find_fault(root):
            raise UnfitError(f"holds a graph module of which {fault}")
        try:
            return fx.GraphModule(root, read_graph(code, imports, root))
        except UnreadableError as error:
            raise UnfitError(f"has a graph module with source code {error}", GRAPH_HINT) from error

    def _call(self, path: str, arguments: tuple[Any, ...]) -> Any:
        """The result of a call on the list; nothing if the arguments are not those that torch.save writes."""
        if path.startswith(("torch._utils.", "torch._tensor.")):
            return self._tensor(path.rpartition(".")[2], arguments)
        match path, arguments:
            case "functools.partial", (function,) if _may_be_bound(function):
                return functools.partial(function.value)
            case "builtins.getattr", (Made() as owner, str(name)) if name.startswith("forward"):
                module = self.value(owner)
                if isinstance(module, nn.Module) and callable(getattr(type(module), name, None)):
                    return getattr(type(module), name).__get__(module)
            case "builtins.getattr", (Named(path="torch._C._VariableFunctionsClass"), str(name)):
                if name in FUNCTIONS["torch"]:
                    return getattr(torch, name)
            case "torch.device", (str(device), *index) if all(type(number) is int for number in index):
                return torch.device(device, *index)
            case "torch.serialization._get_layout", (str(name),):
                found = vars(torch).get(name.removeprefix("torch."))
                return found if isinstance(found, torch.layout) else _NOTHING
        return _NOTHING

    # ---- tensors ----------------------------------------------------------------------------------------------------
    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> Any:
        match name, arguments:
            case "_rebuild_tensor", (Storage() as storage, *view):
                return self._view(storage, view)
            case "_rebuild_tensor_v2", (Storage() as storage, *view, bool(gradient), OrderedDict() as hooks):
                return _plain(self._view(storage, view), gradient, hooks)
            case "_rebuild_tensor_v2", (Storage() as storage, *view, bool(gradient), OrderedDict() as hooks, math_bits):
                return _with_bits(_plain(self._view(storage, view), gradient, hooks), self.value(math_bits))
            case "_rebuild_tensor_v3", (Storage() as storage, *view, bool(gradient), OrderedDict() as hooks, dtype):
                return _plain(self._view(storage, view, self.value(dtype)), gradient, hooks)
            case "_rebuild_parameter", (data, bool(gradient), OrderedDict() as hooks):
                return _plain(nn.Parameter(self._data(data), requires_grad=False), gradient, hooks)
            case "_rebuild_parameter_with_state", (data, bool(gradient), OrderedDict() as hooks, state):
                return self._attributes(
                    _plain(nn.Parameter(self._data(data), requires_grad=False), gradient, hooks), state
                )
            case "_rebuild_from_type_v2", (Named(use="call") as inner, Named(use="type"), tuple(nested), state):
                return self._attributes(self._tensor(inner.path.rpartition(".")[2], nested), state)
            case "_rebuild_qtensor", (
                Storage() as storage,
                *view,
                tuple(quantizer),
                bool(gradient),
                OrderedDict() as hooks,
            ):
                return _plain(self._quantised(storage, view, quantizer), gradient, hooks)
            case "_rebuild_sparse_tensor", (layout, tuple(parts)):
                return self._sparse(self.value(layout), self.value(parts))
            case "_rebuild_meta_tensor_no_storage", _:
                raise UnfitError(
                    "holds tensors without data, on the device meta", "Give the model its weights before it is saved."
                )
        return _NOTHING

    def _data(self, described: Any) -> Tensor:
        made = self.value(described)
        if not isinstance(made, Tensor):
            raise UnfitError(f"makes a parameter of {name_of(described)}")
        return made.detach()

    def _attributes(self, tensor: Any, state: Any) -> Any:
        """Set a tensor's own attributes, such as those that mark an `nn.Buffer`; none may hide a tensor's methods."""
        attributes = state[0] if isinstance(state, tuple) and len(state) == 2 and not state[1] else state
        if tensor is _NOTHING or not isinstance(attributes, dict):
            return _NOTHING
        if not all(isinstance(key, str) and not hasattr(nn.Parameter, key) for key in attributes):
            raise UnfitError("gives a tensor an attribute that hides one of its own")
        vars(tensor).update(self.value(attributes))
        return tensor

    def _view(self, storage: Storage, view: Sequence[Any], dtype: Any = None) -> Tensor:
        untyped, kind = self._read(storage), storage.dtype if dtype is None else dtype
        if not isinstance(kind, torch.dtype):
            raise UnfitError("has a tensor of an unknown type")
        offset, size, stride = self._checked(storage.declared // kind.itemsize, view)
        empty = torch.empty(0, dtype=kind)
        return empty.set_(untyped, offset, size, stride)

    def _checked(self, elements: int, view: Sequence[Any]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        match view:
            case (int(offset), tuple(size), tuple(stride)) if len(size) == len(stride) <= _MOST_DIMENSIONS:
                numbers = (offset, *size, *stride)
                if all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
                    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
                    shown = math.prod(size)
                    self.shown += shown
                    # Many views of one storage are legitimate (tied weights); an unlimited number of elements is not.
                    few = (
                        shown <= max(elements, MOST_EXPANDED)
                        and self.shown <= _MOST_VIEWS * self.stored + MOST_EXPANDED
                    )
                    if (shown == 0 or last < elements) and few:
                        return offset, size, stride
        raise UnfitError(f"declares a tensor of size {str(view[1:2])[:40]} and has {elements:,} elements for it")

    def _read(self, storage: Storage) -> torch.UntypedStorage:
        if storage.key not in self.storages:
            self.storages[storage.key] = self.read(storage)
        return self.storages[storage.key]

    def _quantised(self, storage: Storage, view: Sequence[Any], quantizer: Any) -> Tensor:
        offset, size, stride = self._checked(storage.elements, view)
        values = torch.empty(0, dtype=INTEGERS[storage.kind]).set_(self._read(storage), offset, size, stride)
        made = quantise(values, self.value(quantizer))
        if made is None:
            raise UnfitError("has a quantised tensor of an unknown kind", "Save the model before it is quantised.")
        return made

    def _sparse(self, layout: Any, parts: tuple[Any, ...]) -> Tensor:
        size = parts[2 if layout is torch.sparse_coo else 3]
        if not all(type(length) is int and length >= 0 for length in size) or math.prod(size) > MOST_EXPANDED:
            raise UnfitError(f"has a sparse tensor of size {str(tuple(size))[:60]}")
        match layout, parts:
            case torch.sparse_coo, (Tensor() as indices, Tensor() as values, _, *coalesced):
                made = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
                return made.coalesce() if coalesced == [True] else made
            case torch.sparse_csr | torch.sparse_csc | torch.sparse_bsr | torch.sparse_bsc, (
                Tensor() as compressed, Tensor() as plain, Tensor() as values, _,
            ):  # fmt: skip
                return torch.sparse_compressed_tensor(
                    compressed, plain, values, size, layout=layout, check_invariants=True
                )
        raise UnfitError("has a sparse tensor of an unknown kind")

    # ---- states -----------------------------------------------------------------------------------------------------
    def _set_state(self, target: Made, state: Any) -> None:
        kind = target.kind
        if isinstance(kind, Named) and kind.use in ("module", "plain") and isinstance(state, dict):
            if not all(_is_attribute(kind.value, key, value) for key, value in state.items()):
                raise UnfitError(f"sets a state on a {kind.path} that could change what its code does")
            made = self.made[id(target)]
            if isinstance(made, nn.Module):
                made.__setstate__(self.value(state))
            else:
                vars(made).update(self.value(state))
        elif target.path == "functools.partial" and _is_partial_state(state):
            self.made[id(target)].__setstate__((self.value(state[0]), self.value(state[1]), self.value(state[2]), None))
        elif target.path == "torch.ScriptObject":
            self.made[id(target)] = pack(self.value(state))
            if self.made[id(target)] is None:
                raise UnfitError("has packed weights of an unknown kind", "Save the model before it is quantised.")
        elif isinstance(made := self.made[id(target)], nn.Module) and fill_convolution(made, self.value(state)):
            pass
        else:
            raise UnfitError(f"sets a state on {name_of(target)} that could change what its code does")


def name_of(value: Any) -> str:
    """What a described value is, in a few words."""
    if isinstance(value, Named):
        return value.path
    if isinstance(value, Made):
        return f"a {name_of(value.kind)}"
    if isinstance(value, (str, int, float, bytes)):
        return repr(value)[:40]
    return f"a {type(value).__name__.strip('_').lower()}"


def _plain(tensor: Any, gradient: bool, hooks: Mapping[Any, Any]) -> Tensor:
    if hooks:
        raise UnfitError("attaches hooks to modules or tensors", _HOOKS)
    if gradient and not (tensor.is_floating_point() or tensor.is_complex()):
        raise UnfitError("has a tensor of integers with a gradient")
    made: Tensor = tensor.requires_grad_(gradient)
    return made


def _with_bits(tensor: Tensor, bits: Any) -> Tensor:
    """Make a tensor with the lazy conjugation or negation bit."""
    if not isinstance(bits, dict) or not all(bits[key] is True and key in ("conj", "neg") for key in bits):
        raise UnfitError("has a tensor of an unknown kind")
    torch._utils.set_tensor_metadata(tensor, bits)
    return tensor


def _may_be_bound(function: Any) -> bool:
    return isinstance(function, Named) and function.use in ("module", "function", "trusted")


def _is_partial_state(state: Any) -> bool:
    match state:
        case (function, tuple(), dict(keywords), attributes):
            return _may_be_bound(function) and not attributes and all(isinstance(key, str) for key in keywords)
    return False


def _is_attribute(kind: type, key: Any, value: Any) -> bool:
    """Whether an entry of a module's state is harmless data: it hides no method, and hooks are empty.

    A `forward` chosen at construction among the class's own is the one exception.
    """
    if not isinstance(key, str) or (key.startswith("__") and key.endswith("__")):
        return False
    if key == "_compiled_call_impl":
        return value is None
    if key in ("_all_weights", "all_weights"):  # otherwise RNNs would loop over whatever the file gives
        return isinstance(value, list) and all(isinstance(name, str) for names in value for name in names)
    if key.endswith("_hooks") and value:
        raise UnfitError("attaches hooks to modules or tensors", _HOOKS)
    if key.startswith("forward") and isinstance(value, Made) and value.path == "builtins.getattr":
        return True
    return not callable(getattr(kind, key, None))
