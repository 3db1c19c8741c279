"""A pickle gone through on stand-ins: no name in it is imported unasked or called, no tensor is made.

The rules are the shape of what torch.save writes for modules and tensors. Whatever else a pickle can do is a problem:

  1. Only opcodes of protocol 2, and only names that `allowed.py` answers.
  2. Module classes are made empty (never called) and filled with data: no entry of their state may hide a method or be
     a hook. torch's weights-only unpickler would call them with arguments from the file, and run a hidden method.
  3. Listed calls have the arguments torch.save writes; a `functools.partial` holds a listed class or function.
  4. A tensor lies within its storage. torch would enlarge the storage until it does: 10**12 elements from 100 bytes.
  5. Keys are plain: Python's hash of a tuple in a tuple in a tuple … has no end but that of the stack.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from indistill_fx.loading.allow_list import FUNCTIONS, Named, resolve

# The opcodes torch.save writes (protocol 2), which are also those torch's weights-only unpickler reads.
_OPCODES = (
    *(pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_SET, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET, pickle.LONG_BINPUT, pickle.MARK),
    *(pickle.NEWFALSE, pickle.NEWTRUE, pickle.NONE, pickle.PROTO, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.SHORT_BINSTRING, pickle.STOP, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
)
_STANDARD: dict[int, Callable[[Any], None]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}
# An expanded tensor shows more elements than it stores; beyond this it is an attack on whoever copies it.
_MOST_EXPANDED = 1 << 28
_MOST_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class _Storage:
    elements: int
    item_bytes: int


@dataclass(eq=False, slots=True)
class _Made:
    """Stands for an object the pickle would make."""

    kind: Named


@dataclass(slots=True)
class Rehearsal:
    """What a pickle would do.

    Args:
        root: the object it ends in, made of stand-ins.
        named: all globals it names, by path.
        storages: bytes of every storage it declares, by its key.
        problems: what it must not do, in words.
        hooks: containers of hooks, which have to be empty to the end: a pickle may fill them after they were used.
        is_legacy_module: a whole module in the format before 1.6, which carries its classes' source.
    """

    root: Any = None
    named: dict[str, Named] = field(default_factory=dict)
    storages: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)
    is_legacy_module: bool = False

    @property
    def is_module(self) -> bool:
        """Whether the pickle ends in a module, as far as can be said without making it."""
        return isinstance(self.root, _Made) and self.root.kind.role in ("module", "trusted")

    @property
    def tensors(self) -> int:
        """How many tensors the root holds, in itself and in the mappings one level down."""
        if not isinstance(self.root, Mapping):
            return 0
        held = [*self.root.values()]
        held += [item for value in held if isinstance(value, Mapping) for item in value.values()]
        return sum(map(_is_tensor, held))

    def describe_trusted(self) -> tuple[str, ...]:
        """One note per trusted package the file made use of, with what it used."""
        used: dict[str, list[str]] = {}
        for path, named in self.named.items():
            if named.role == "trusted":
                used.setdefault(path.partition(".")[0], []).append(path)
        return tuple(f"trusted package {package}: {', '.join(paths)}" for package, paths in used.items())


def go_through(stream: Any, rehearsal: Rehearsal, *, trust: Sequence[str] = ()) -> Any:
    """Rehearse one pickle, up to its end.

    Args:
        stream: where the pickle begins.
        rehearsal: gets the names, sizes and problems found.
        trust: packages whose classes and functions it may name.

    Returns:
        The object the pickle ends in, made of stand-ins.

    Raises:
        Exception: of any kind, when the bytes are no pickle of torch.save.
    """
    root = _Reader(stream, trust, rehearsal).load()
    if any(rehearsal.hooks):
        rehearsal.problems.append("hangs hooks into modules or tensors")
    return root


class _Reader(pickle._Unpickler):
    """An unpickler that makes and calls nothing: it works on stand-ins and writes down what it is asked to do."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**_STANDARD}
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def __init__(self, file: Any, trust: Sequence[str], rehearsal: Rehearsal):
        super().__init__(file, encoding="utf-8")
        self.trust, self.rehearsal = trust, rehearsal

    def find_class(self, module: str, name: str) -> Any:
        named = resolve(module, name, self.trust)
        return self.rehearsal.named.setdefault(named.path, named)

    def persistent_load(self, pid: Any) -> Named | _Storage:
        match pid:
            case ("storage", Named(role="storage") as kind, str(key), str(), int(elements), *view) if (
                elements >= 0 and not any(view)
            ):
                declared = elements * kind.value
                if self.rehearsal.storages.setdefault(key, declared) != declared:
                    self._complain(f"declares storage {key!r} with two sizes")
                return _Storage(elements, kind.value)
            case ("module", Named() as kind, *_):
                self.rehearsal.is_legacy_module = True
                return kind
            case _:
                self._complain("has a storage of an unknown kind")
        return _Storage(0, 1)

    def _complain(self, problem: str) -> None:
        self.rehearsal.problems.append(problem)

    def _load_proto(self) -> None:
        if (protocol := self.read(1)[0]) != 2:
            raise ValueError(f"pickle protocol {protocol} instead of 2, which torch.save writes")

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if not isinstance(kind, Named) or kind.role not in ("module", "plain", "trusted", "foreign", "missing"):
            self._complain(f"makes an object of {_name(kind)}")
        elif arguments != () and kind.role in ("module", "plain"):
            self._complain(f"makes a {kind.path} with arguments")
        self.append(_Made(kind))

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        kind = target.kind if isinstance(target, _Made) else None
        if isinstance(target, OrderedDict):
            legal = isinstance(state, dict) and state.keys() <= {"_metadata"}
        elif kind is None:
            legal = False
        elif kind.path == "functools.partial":
            legal = _is_partial_state(state)
        elif kind.role in ("module", "plain"):
            legal = isinstance(state, dict) and all(_is_attribute(kind.value, *entry) for entry in state.items())
            self.rehearsal.hooks += [value for key, value in state.items() if key.endswith("_hooks")] if legal else []
        else:
            legal = kind.role in ("trusted", "foreign", "missing")
        if not legal:
            self._complain(f"sets a state on {_name(target)} that could change what its code does")

    def _load_setitem(self) -> None:
        self._require_plain(self.stack[-2:-1])
        _STANDARD[pickle.SETITEM[0]](self)

    def _load_setitems(self) -> None:
        self._require_plain(self.stack[::2])
        _STANDARD[pickle.SETITEMS[0]](self)

    def _require_plain(self, keys: Iterable[Any]) -> None:
        for key in keys:
            parts = key if isinstance(key, tuple) else (key,)
            if any(isinstance(part, (tuple, frozenset)) for part in parts):
                raise ValueError("a key is nested")

    def _call(self, kind: Any, arguments: Any) -> Any:
        if isinstance(kind, Named) and kind.role in ("trusted", "foreign", "missing"):
            return _Made(kind)
        if isinstance(kind, Named) and kind.role == "call" and isinstance(arguments, tuple):
            if kind.path in ("builtins.set", "collections.OrderedDict"):
                self._require_plain(_keys_of(arguments))
            made = _rebuild(kind, arguments)
            if made is not None:
                nested = (item for value in arguments if isinstance(value, tuple) for item in value)
                self.rehearsal.hooks += [value for value in (*arguments, *nested) if isinstance(value, OrderedDict)]
                return made
        self._complain(f"calls {_name(kind)}({', '.join(map(_name, arguments))})")
        return _Made(kind) if isinstance(kind, Named) else kind

    dispatch |= {
        pickle.PROTO[0]: _load_proto,
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
    }


def _name(value: Any) -> str:
    if isinstance(value, Named):
        return value.path
    if isinstance(value, _Made):
        return f"a {_name(value.kind)}"
    if isinstance(value, (str, int, float, bytes)):
        return repr(value)[:40]
    return f"a {type(value).__name__.strip('_').lower()}"


def _keys_of(arguments: tuple[Any, ...]) -> Iterable[Any]:
    """What a set or an ordered mapping made of these arguments would hash."""
    items = arguments[0] if arguments and isinstance(arguments[0], list) else ()
    return (item[0] if isinstance(item, list) and item else item for item in items)


def _rebuild(kind: Named, arguments: tuple[Any, ...]) -> Any:
    """The stand-in for a listed call's result, or None if these are not the arguments torch.save writes."""
    if kind.path.startswith(("torch._utils.", "torch._tensor.")):
        return _Made(kind) if _rebuilds_tensor(kind.path.rpartition(".")[2], arguments) else None
    legal = False
    match kind.path, arguments:
        case "functools.partial", (function,):
            legal = _may_be_bound(function)
        case "builtins.getattr", (_Made(kind=Named(role="module")), str(name)):
            legal = name.startswith("forward")
        case "builtins.getattr", (Named(path="torch._C._VariableFunctionsClass"), str(name)):
            legal = name in FUNCTIONS["torch"]
        case "torch.device", (str(), *index):
            legal = all(isinstance(number, int) for number in index)
        case "timm.layers.format.Format", (str(),):
            legal = True
        case _:
            return _rebuild_plain(kind.path, arguments)
    return _Made(kind) if legal else None


def _rebuilds_tensor(name: str, arguments: tuple[Any, ...]) -> bool:
    match name, arguments:
        case "_rebuild_tensor", (_Storage() as storage, *view):
            return _fits(storage.elements, view)
        case "_rebuild_tensor_v2", (_Storage() as storage, *view, bool(), OrderedDict()):
            return _fits(storage.elements, view)
        case "_rebuild_tensor_v3", (_Storage() as storage, *view, bool(), OrderedDict(), dtype):
            if not (isinstance(dtype, Named) and dtype.role == "dtype"):
                return False
            elements = storage.elements * storage.item_bytes // dtype.value.itemsize
            return _fits(elements, view)
        case "_rebuild_parameter", (data, bool(), OrderedDict()):
            return _is_tensor(data)
        case "_rebuild_parameter_with_state", (data, bool(), OrderedDict(), state):
            return _is_tensor(data) and _is_tensor_state(state)
        case "_rebuild_from_type_v2", (Named(role="call") as inner, Named(role="type"), tuple(nested), state):
            return _is_tensor(_rebuild(inner, nested)) and _is_tensor_state(state)
    return False


def _rebuild_plain(path: str, arguments: tuple[Any, ...]) -> Any:
    """Containers and bytes, which are their own stand-ins."""
    match path, arguments:
        case "collections.OrderedDict", ():
            return OrderedDict()
        case "collections.OrderedDict", (list(pairs),):
            return OrderedDict(pairs)
        case "collections.Counter", (dict(counts),):
            return Counter(counts)
        case "builtins.set", (list(items),):
            return set(items)
        case "torch.Size", ((list() | tuple()) as sizes,):
            return tuple(sizes)
        case "_codecs.encode", (str(text), "latin1"):
            return text.encode("latin1")
    return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, _Made) and value.kind.path.startswith(("torch._utils.", "torch._tensor."))


def _fits(elements: int, view: Sequence[Any]) -> bool:
    """Whether a view (offset, size, stride) lies within its storage; torch would enlarge the storage until it does."""
    match view:
        case (int(offset), tuple(size), tuple(stride)) if len(size) == len(stride) <= _MOST_DIMENSIONS:
            if not all(isinstance(number, int) and 0 <= number < 1 << 63 for number in (offset, *size, *stride)):
                return False
            if 0 in size:
                return True
            last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
            return last < elements and math.prod(size) <= max(elements, _MOST_EXPANDED)
    return False


def _is_tensor_state(state: Any) -> bool:
    from torch.nn import Parameter

    attributes = state[0] if isinstance(state, tuple) and len(state) == 2 and not state[1] else state
    if not isinstance(attributes, dict):
        return False
    return all(isinstance(key, str) and not hasattr(Parameter, key) for key in attributes)


def _may_be_bound(function: Any) -> bool:
    return isinstance(function, Named) and function.role in ("module", "function", "trusted")


def _is_partial_state(state: Any) -> bool:
    match state:
        case (function, tuple(), dict(keywords), attributes):
            return _may_be_bound(function) and not attributes and all(isinstance(key, str) for key in keywords)
    return False


def _is_attribute(kind: type, key: Any, value: Any) -> bool:
    """Whether an entry of a module's state is data: it hides no method, and it is no hook.

    A `forward` chosen at construction among the class's own is the one exception. Hooks are looked at in the end.
    """
    if not isinstance(key, str) or (key.startswith("__") and key.endswith("__")):
        return False
    if key == "_compiled_call_impl":
        return value is None
    if key in ("_all_weights", "all_weights"):  # else RNNs count up to whatever the file says
        return isinstance(value, list) and all(isinstance(name, str) for names in value for name in names)
    if key.startswith("forward") and isinstance(value, _Made) and value.kind.path == "builtins.getattr":
        return True
    return not callable(getattr(kind, key, None))
