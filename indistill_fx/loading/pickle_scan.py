"""A pickle read as a description of what it would make; nothing is imported unasked, called, or made.

Every global becomes a `Named`, every storage a `Storage`, every object a `Made` that remembers how it would be made and
what would be done to it afterwards. Numbers, strings and containers are themselves. What is wanted of the description is
made later, by `pickle_make.py`; the rest, such as the arguments of a training script, stays what it is here: inert.

Rules for reading:
  1. Only the opcodes that `torch.save` writes at protocols 2 to 5.
  2. Keys are plain: Python's hash of a tuple in a tuple in a tuple … has no end but that of the stack.
"""

from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from indistill_fx.errors import ConfigError, nearest
from indistill_fx.loading.allow_list import STORAGES, Named, resolve

# Opcodes of protocol 2, torch.save's default, and what protocols 3 to 5 write for the same values.
_OPCODES = (
    *(pickle.APPEND, pickle.APPENDS, pickle.BINFLOAT, pickle.BINGET, pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.BINPERSID, pickle.BINPUT, pickle.BINUNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST, pickle.EMPTY_TUPLE),
    *(pickle.EMPTY_SET, pickle.GLOBAL, pickle.LONG1, pickle.LONG_BINGET, pickle.LONG_BINPUT, pickle.MARK),
    *(pickle.NEWFALSE, pickle.NEWTRUE, pickle.NONE, pickle.PROTO, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.SHORT_BINSTRING, pickle.STOP, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINBYTES, pickle.SHORT_BINBYTES, pickle.SHORT_BINUNICODE, pickle.MEMOIZE, pickle.FRAME),
    *(pickle.STACK_GLOBAL, pickle.ADDITEMS, pickle.FROZENSET, pickle.POP, pickle.POP_MARK),
)
_STANDARD: dict[int, Callable[[Any], None]] = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPCODES}
GRAPH_PARTS = ("_code", "code", "training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_TENSORS = ("torch._utils._rebuild_", "torch._tensor._rebuild_")


@dataclass(frozen=True, slots=True)
class Storage:
    """The memory of tensors, as the pickle declares it: `kind` is a key of `STORAGES`."""

    key: str
    kind: str
    elements: int

    @property
    def declared(self) -> int:
        """The size in bytes that the file declares."""
        return self.elements * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its elements; bytes for untyped storages."""
        return STORAGES[self.kind]


@dataclass(eq=False, slots=True)
class Made:
    """Stands for an object the pickle would make: by calling `kind` with the arguments, or else as an empty instance of it."""

    kind: Any
    arguments: Any
    called: bool
    states: list[Any] = field(default_factory=list)
    items: list[tuple[Any, Any]] = field(default_factory=list)
    appended: list[Any] = field(default_factory=list)

    @property
    def path(self) -> str:
        """Dotted path of the function or class that makes it; empty if that is not a global."""
        return self.kind.path if isinstance(self.kind, Named) else ""

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor, as far as is known without making it."""
        return self.called and self.path.startswith(_TENSORS)

    @property
    def is_module(self) -> bool:
        """Whether it is a module, as far as is known without making it."""
        return isinstance(self.kind, Named) and self.kind.use in ("module", "graph", "trusted")


Step = tuple[Literal["make", "state", "items", "append"], Made, Any]


@dataclass(slots=True)
class Scan:
    """What a pickle describes.

    Args:
        root: the object it ends in.
        steps: what would be done, in order.
        storages: all it declares, by key.
        problems: what no file of torch.save does, in words.
        is_legacy_module: a whole module in the format before 1.6, which carries its classes' source.
    """

    root: Any = None
    steps: list[Step] = field(default_factory=list)
    storages: dict[str, Storage] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    is_legacy_module: bool = False


def go_through(stream: Any, scan: Scan, *, trust: Sequence[str] = ()) -> Any:
    """Read one pickle, up to its end.

    Args:
        stream: where the pickle begins.
        scan: gets the steps, storages and problems found.
        trust: packages whose classes and functions it may name.

    Returns:
        What it ends in.

    Raises:
        Exception: of any kind, when the bytes are not a pickle of torch.save.
    """
    return _Reader(stream, trust, scan).load()


def walk(root: Any) -> Iterator[Any]:
    """Everything that a value from a pickle is made of, itself included, each once."""
    ahead, seen = [root], {id(root)}
    while ahead:
        value = ahead.pop()
        yield value
        for part in _parts(value):
            if id(part) not in seen:
                seen.add(id(part))
                ahead.append(part)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Made):
        return (value.kind, value.arguments, value.states, value.items, value.appended)
    if isinstance(value, Mapping):
        return (*value.keys(), *value.values())
    return value if isinstance(value, (tuple, list, set, frozenset)) else ()


def entries(value: Any) -> dict[Any, Any] | None:
    """The entries of a mapping, also of one whose class is not known here; None for anything else."""
    if isinstance(value, Made) and value.items:
        return dict(value.items)
    return dict(value) if isinstance(value, Mapping) else None


def find_entry(root: Any, entry: str, label: str) -> Any:
    """What a file holds under a key, or under several joined by `/`; all of it without one.

    Raises:
        ConfigError: there is no such key; says which there are.
    """
    held = root
    for part in entry.split("/") if entry else ():
        found = {str(key): value for key, value in (entries(held) or {}).items()}
        if part not in found:
            shown = ", ".join(repr(key[:60]) for key in [*found][:20])
            hint = nearest(part, found) or (
                f"It holds: {shown}." if shown else "It holds no entries: name the file alone."
            )
            raise ConfigError(f"`{label}` has no entry {entry!r}.", where=label, got=part, hint=hint)
        held = found[part]
    return held


class _Reader(pickle._Unpickler):
    """An unpickler that makes and calls nothing: it works on descriptions, and records the requested steps."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**_STANDARD}
    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, trust: Sequence[str], scan: Scan):
        super().__init__(file, encoding="utf-8")
        self.trust, self.scan = trust, scan
        self.named: dict[tuple[str, str], Named] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.named:
            self.named[module, name] = resolve(module, name, self.trust)
        return self.named[module, name]

    def persistent_load(self, pid: Any) -> Named | Storage:
        match pid:
            case ("storage", Named(use="storage") as kind, str(key), str(), int(elements), *view) if (
                elements >= 0 and not any(view)
            ):
                storage = Storage(key, str(kind.value), elements)
                if self.scan.storages.setdefault(key, storage).declared != storage.declared:
                    self.scan.problems.append(f"declares storage {key!r} with two sizes")
                return storage
            case ("module", Named() as kind, *_):
                self.scan.is_legacy_module = True
                return kind
        self.scan.problems.append("has a storage of an unknown kind")
        return Storage("", "UntypedStorage", 0)

    def _make(self, kind: Any, arguments: Any, *, called: bool) -> Any:
        if called and isinstance(kind, Named) and isinstance(arguments, tuple):
            plain = _rebuild_plain(kind.path, arguments)
            if plain is not None:
                return plain
            if kind.use == "graph":
                arguments = _needed_of_graph(arguments)
        made = Made(kind, arguments, called)
        self.scan.steps.append(("make", made, None))
        return made

    def _change(self, kind: Literal["items", "append"], target: Any, payload: list[Any]) -> bool:
        """Record a change of an object; plain containers are changed directly."""
        if not isinstance(target, Made):
            return False
        (target.items if kind == "items" else target.appended).extend(payload)
        self.scan.steps.append((kind, target, payload))
        return True

    def _load_proto(self) -> None:
        if (protocol := self.read(1)[0]) not in (2, 3, 4, 5):
            raise ValueError(f"pickle protocol {protocol} instead of 2, which torch.save writes")

    def _load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], arguments, called=True)

    def _load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self._make(self.stack[-1], arguments, called=False)

    def _load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Made):
            target.states.append(state)
            self.scan.steps.append(("state", target, state))
        elif not (isinstance(target, OrderedDict) and isinstance(state, dict) and state.keys() <= {"_metadata"}):
            self.scan.problems.append("sets a state on a container that could change what its code does")

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(self.stack[-1], [(key, value)])

    def _load_setitems(self) -> None:
        flat = self.pop_mark()
        self._set(self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True)))

    def _set(self, target: Any, pairs: list[tuple[Any, Any]]) -> None:
        _require_plain(key for key, _ in pairs)
        if not self._change("items", target, pairs):
            for key, value in pairs:
                target[key] = value

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._extend(self.stack[-1], [value])

    def _load_appends(self) -> None:
        values = self.pop_mark()
        self._extend(self.stack[-1], values)

    def _extend(self, target: Any, values: list[Any]) -> None:
        if not self._change("append", target, values):
            target.extend(values)

    def _load_additems(self) -> None:
        values = self.pop_mark()
        _require_plain(values)
        self.stack[-1].update(values)

    def _load_frozenset(self) -> None:
        values = self.pop_mark()
        _require_plain(values)
        self.append(frozenset(values))

    dispatch |= {
        pickle.PROTO[0]: _load_proto,
        pickle.REDUCE[0]: _load_reduce,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.BUILD[0]: _load_build,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.APPEND[0]: _load_append,
        pickle.APPENDS[0]: _load_appends,
        pickle.ADDITEMS[0]: _load_additems,
        pickle.FROZENSET[0]: _load_frozenset,
    }


def _needed_of_graph(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The needed entries of a graph module: its source, parts and training flag, without torch's other data, such as the nodes."""
    match arguments:
        case (dict(body), str(imports)):
            return {name: body[name] for name in GRAPH_PARTS if name in body}, imports
    return arguments


def _require_plain(keys: Iterable[Any]) -> None:
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if any(isinstance(part, (tuple, frozenset)) for part in parts):
            raise ValueError("a key is nested")


def _rebuild_plain(path: str, arguments: tuple[Any, ...]) -> Any:
    """The result of a call that makes only a container or a number; None for all other calls."""
    match path, arguments:
        case "collections.OrderedDict", ():
            return OrderedDict()
        case "collections.OrderedDict", (list(pairs),):
            _require_plain(pair[0] for pair in pairs)
            return OrderedDict(pairs)
        case "collections.Counter", (dict(counts),):
            return Counter(counts)
        case "builtins.set", (list(items),):
            _require_plain(items)
            return set(items)
        case "builtins.frozenset", (list(items),):
            _require_plain(items)
            return frozenset(items)
        case "builtins.complex", (float() as real, float() as imaginary):
            return complex(real, imaginary)
        case "torch.Size", ((list() | tuple()) as sizes,) if all(type(size) is int for size in sizes):
            return torch.Size(sizes)
        case "_codecs.encode", (str(text), "latin1"):
            return text.encode("latin1")
    return None
