"""Sizes that know where they come from: they stand for the ints of `x.shape` while a module's code runs under the recorder.

Arithmetic gives new sizes, and one that reaches an operation becomes nodes of the graph, so that the graph works for other sizes
too. Where the code needs a plain int or bool (`if h == 64`, `range(h)`), the example's value decides, and the decision is recorded.
They derive from `torch.SymInt` because all of torch, and the code written for `torch.export`, accepts those where an int is due.
"""

from __future__ import annotations

import linecache
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from itertools import islice
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.edit import mark_place

_TORCH = Path(torch.__file__).parent
_BETWEEN = tuple(map(str, (  # where the paths of code begin that may run between the model's own code and this
    Path(__file__).parent, Path(__file__).parents[2] / "graph", Path(torch.__file__), _TORCH / "_", _TORCH / "fx",
    _TORCH / "nn" / "functional.py", _TORCH / "overrides.py")))  # fmt: skip


def current_place() -> tuple[str, str]:
    """`models.py:31` and the expression evaluated there, such as `h == 64`, of the innermost frame that is the model's own code."""
    frame = _model_frame()
    if frame is None:
        return "unknown place", ""
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}", _expression(frame)


def _model_frame() -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame


def note_place(node: fx.Node) -> fx.Node:
    """Let a node record where in the model's code it is made."""
    mark_place(node, ": ".join(filter(None, current_place())))
    return node


def _expression(frame: FrameType) -> str:
    position = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)
    first, last, start, stop = position
    if first != last or first != frame.f_lineno or start is None or stop is None:
        return line.strip()
    return line.encode()[start:stop].decode(errors="replace").strip() or line.strip()


class UnhashableSizeError(TypeError):
    """Code that keeps things by size (a cache, a dictionary) must not keep a stand-in: it would be found there after the trace."""


class Decision(NamedTuple):
    """What the example input decided: in which module, where in its code, which expression, and how."""

    module: str
    place: str
    expression: str
    value: Any
    reported: bool = True

    def __str__(self) -> str:
        return f"{self.place}: {self.expression}"


class Book:
    """Where sizes write: what makes nodes of the graph, the list of decisions, and the globals of code that calls `int`, `float` or `len`.

    Args:
        create: makes a node.
        refuse: gives the error for code that needs the plain value of a number that was taken out of a tensor.
    """

    def __init__(self, create: Callable[..., fx.Node], refuse: Callable[[], Exception]):
        self.create, self.refuse = create, refuse
        self.module = ""
        self.decisions: list[Decision] = []
        self.asking: dict[int, dict[str, Any]] = {}

    def note_asking(self) -> None:
        """Note the globals of the model's code that is running: `int`, `float` or `len` asks it for a number."""
        if (frame := _model_frame()) is not None:
            self.asking[id(frame.f_globals)] = frame.f_globals

    def decide(self, value: Any, *, reported: bool = True) -> None:
        """Record that the code at the current place depends on this exact value. The number of parts of a result is not reported."""
        place, expression = current_place()
        self.decisions.append(Decision(self.module, place, expression, value, reported))


def value_of(number: Any) -> Any:
    """The value of a size for the example; anything else as it is. Records no decision."""
    return number.value if isinstance(number, Size) else number


def new_size(trace_record: Book, value: int | float | bool, target: Any, args: tuple[Any, ...]) -> Size:
    """A size of the class that fits its value."""
    if isinstance(value, bool):
        return _Bool(trace_record, value, target, args)
    return (_Int if isinstance(value, int) else _Float)(trace_record, value, target, args)


def taken_number(trace_record: Book, value: int | float | bool, tensor: fx.Node) -> Size:
    """The only entry of a tensor as a number of Python's: as a size, but no example may decide it."""
    number = new_size(trace_record, value, "item", (tensor,))
    number.of_data = True
    number.emit()  # here, because the tensor may be written later
    return number


def _binary(operation: Callable[..., Any], *, swapped: bool = False) -> Callable[[Size, Any], Any]:
    def apply(self: Size, other: Any) -> Any:
        if not isinstance(other, (int, float, Size)):
            return NotImplemented
        args = (other, self) if swapped else (self, other)
        return new_size(self.book, operation(*map(value_of, args)), operation, args)

    return apply


def _both(operation: Callable[..., Any]) -> tuple[Callable[[Size, Any], Any], Callable[[Size, Any], Any]]:
    return _binary(operation), _binary(operation, swapped=True)


def _unary(operation: Callable[..., Any]) -> Callable[..., Any]:
    def apply(self: Size, *args: Any) -> Any:
        return new_size(self.book, operation(self.value, *args), operation, (self, *args))

    return apply


class Size:
    """A number that follows from the shapes of the input: its value for the example, and the operation that computes it.

    Attributes:
        of_data: whether it follows from the input's data, by `item`, so that the example's value may decide nothing.
    """

    def __init__(self, book: Book, value: int | float | bool, target: Any, args: tuple[Any, ...]):
        self.book, self.value, self.target, self.args = book, value, target, args
        self.of_data: bool = any(isinstance(arg, Size) and arg.of_data for arg in args)
        self._made: fx.Node | None = None

    def emit(self) -> fx.Node:
        """The graph's node for the size, made at its first use, or again after a roll-back."""
        if self._made is None or self._made._erased:
            args = tuple(arg.emit() if isinstance(arg, Size) else arg for arg in self.args)
            op = "call_method" if isinstance(self.target, str) else "call_function"
            self._made = note_place(self.book.create(op, self.target, args, {}))
        return self._made

    def plain(self) -> Any:
        """The example's value, with the decision recorded."""
        if self.of_data:
            raise self.book.refuse()
        self.book.decide(self.value)
        return self.value

    def __bool__(self) -> bool:
        return bool(self.plain())

    def __int__(self) -> int:
        self.book.note_asking()
        return int(self.plain())

    def __index__(self) -> int:
        return int(self.plain())

    def __float__(self) -> float:
        self.book.note_asking()
        return float(self.plain())

    def __hash__(self) -> int:
        text = "unhashable type: a size of the input, while its shapes are recorded"
        raise self.book.refuse() if self.of_data else UnhashableSizeError(text)

    def __repr__(self) -> str:
        return repr(self.value)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    __add__, __radd__ = _both(operator.add)
    __sub__, __rsub__ = _both(operator.sub)
    __mul__, __rmul__ = _both(operator.mul)
    __truediv__, __rtruediv__ = _both(operator.truediv)
    __floordiv__, __rfloordiv__ = _both(operator.floordiv)
    __mod__, __rmod__ = _both(operator.mod)
    __pow__, __rpow__ = _both(operator.pow)
    __and__, __rand__ = _both(operator.and_)
    __or__, __ror__ = _both(operator.or_)
    __eq__ = _binary(operator.eq)
    __ne__ = _binary(operator.ne)
    __lt__, __le__ = _binary(operator.lt), _binary(operator.le)
    __gt__, __ge__ = _binary(operator.gt), _binary(operator.ge)
    __neg__, __abs__, __round__ = _unary(operator.neg), _unary(abs), _unary(round)
    __ceil__, __floor__, __trunc__ = _unary(math.ceil), _unary(math.floor), _unary(math.trunc)

    @property
    def node(self) -> Size:
        """Torch's C++ code asks a SymInt for its node, and the node for its number; here both are one."""
        return self

    def guard_int(self, *_: Any) -> Any:
        """Asked by C++ code that takes no symbols."""
        return self.plain()

    guard_float = guard_bool = guard_int


class _AsPythons(type):
    """Of a class that stands for the class of Python's that it derives from, while a model's code runs."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.__mro__[1])

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, cls.__mro__[1]) or kind is _SIZES.get(cls.__mro__[1])

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__mro__[1] or other is _SIZES.get(cls.__mro__[1], cls)

    __hash__ = type.__hash__


class _SizeOrInt(int, metaclass=_AsPythons):
    """Stands for `int` in code that calls it on sizes (`int(windows.shape[0] / n)`): the result is a size, too."""

    def __new__(cls, value: Any = 0, *base: Any) -> Any:
        value = _entry(value)
        return _whole(value) if isinstance(value, Size) else int(value, *base)


class _SizeOrFloat(float, metaclass=_AsPythons):
    """Stands for `float` likewise."""

    def __new__(cls, value: Any = 0.0) -> Any:
        value = _entry(value)
        return new_size(value.book, float(value.value), float, (value,)) if isinstance(value, Size) else float(value)


def _entry(value: Any) -> Any:
    """The number in a tensor of one entry, as its `item` gives it; anything else as it is."""
    with torch._C.DisableTorchFunction():  # asking how many it has is no decision of the model's code
        one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    return value.item() if one else value


def _whole(size: Size) -> Any:
    """`int` of a size; of a quotient, the floor division that it comes to: int(n / (h * w / 4)) is (n * 4) // (h * w).

    `torch.export` takes a number for `int`, but can follow a floor division.
    """
    if (factors := _factors(size)) is not None and all(factors):
        floor = reduce(operator.mul, factors[0]) // reduce(operator.mul, factors[1])
        if isinstance(floor, Size) and floor.value == int(size.value):
            return floor
    return new_size(size.book, int(size.value), int, (size,))


def _factors(number: Any) -> tuple[list[Any], list[Any]] | None:
    """What a number is a product of, and what that is divided by: positive whole numbers and sizes; None if it is anything else."""
    if isinstance(number, Size) and number.target in (operator.mul, operator.truediv):
        left, right = (_factors(side) for side in number.args)
        if left is None or right is None:
            return None
        over, under = right if number.target is operator.mul else (right[1], right[0])
        return left[0] + over, left[1] + under
    value = value_of(number)
    if isinstance(value, float) and value is number and 0 < value < 2**20 and (value * 1024).is_integer():
        numerator, denominator = value.as_integer_ratio()
        return [numerator], [denominator] if denominator > 1 else []
    return ([number], []) if isinstance(value, int) and value > 0 else None


def _size_or_len(value: Any) -> Any:
    return value.shape[0] if isinstance(value, Tensor) and value.dim() else len(value)


def _of_sizes(function: Callable[..., Any]) -> Callable[..., Any]:
    def apply(*args: Any) -> Any:
        size = next((arg for arg in args if isinstance(arg, Size)), None)
        return function(*args) if size is None else new_size(size.book, function(*map(value_of, args)), function, args)

    return apply


@contextmanager
def math_of_sizes() -> Iterator[None]:
    """Within the block functions of `math` that would ask a size for its value give a size."""
    functions = {name: getattr(math, name) for name in ("sqrt", "log", "log2", "log10", "exp", "pow")}
    for name, function in functions.items():
        setattr(math, name, _of_sizes(function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(math, name, function)


@contextmanager
def sizes_asked_for(namespaces: Iterable[dict[str, Any]]) -> Iterator[None]:
    """In these globals, `int` and `float` make sizes of sizes, and `len` of a tensor is one. Python's own must return numbers."""
    stand_ins = {"int": _SizeOrInt, "float": _SizeOrFloat, "len": _size_or_len}
    changed = [(names, name) for names in namespaces for name in stand_ins if name not in names]
    for names, name in changed:
        names[name] = stand_ins[name]
    try:
        yield
    finally:
        for names, name in changed:
            del names[name]


class _TypeOfNumber(type, metaclass=_AsPythons):
    """Stands for `type` in the model's code: a size is of Python's own type (`type(h) is int`)."""

    def __new__(cls, value: Any, *definition: Any, **options: Any) -> Any:
        if definition:
            return type(value, *definition, **options)
        return value.__class__ if isinstance(value, Size) else type(value)


def _is_a_users(names: dict[str, Any]) -> bool:
    """Whether globals are those of a model's code, and have no `type` of their own."""
    package = str(names.get("__name__", "")).partition(".")[0]
    return "type" not in names and package not in {"torch", "indistill_fx", *sys.stdlib_module_names}


@contextmanager
def types_of_numbers(module: nn.Module) -> Iterator[None]:
    """Within the block the code of a module, and of functions that it calls by name, is told Python's types of sizes."""
    kinds = {kind for part in module.modules() for kind in type(part).__mro__}
    own = [vars(sys.modules[home]) for home in {kind.__module__ for kind in kinds} if home in sys.modules]
    places = (*own, *map(vars, kinds), *map(vars, module.modules()))
    called = [
        value.__globals__ for names in places for value in list(names.values()) if isinstance(value, FunctionType)
    ]
    changed = [names for names in {id(names): names for names in (*own, *called)}.values() if _is_a_users(names)]
    for names in changed:
        names["type"] = _TypeOfNumber
    try:
        yield
    finally:
        for names in changed:
            del names["type"]


class _LikePython(type):
    """Classes that pass for Python's own: `type(h) == int`; their `__class__` answers `isinstance(h, int)`."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__dict__.get("__class__")

    __hash__ = type.__hash__


class _Int(Size, torch.SymInt, metaclass=_LikePython):  # type: ignore[misc]  # torch types `node` as its own class
    __class__ = int  # type: ignore[assignment]  # as it stands for a number
    __index__ = Size.__index__
    __hash__ = Size.__hash__

    def maybe_as_int(self) -> int:
        """Asked by C++ code: the number, if it is a constant."""
        return int(self.plain())


class _Float(Size, torch.SymFloat, metaclass=_LikePython):  # type: ignore[misc]  # torch types `node` as its own class
    __class__ = float  # type: ignore[assignment]  # as it stands for a number
    __hash__ = Size.__hash__

    def is_integer(self) -> bool:
        """As `float.is_integer`."""
        return bool(float(self.plain()).is_integer())


class _Bool(Size, torch.SymBool, metaclass=_LikePython):  # type: ignore[misc]  # torch types `node` as its own class
    __class__ = bool  # type: ignore[assignment]  # as it stands for a number
    __hash__ = Size.__hash__

    def expect_true(self, *_: Any) -> bool:
        """Asked by `torch._check`, which asserts and decides nothing."""
        return bool(self.value)


_SIZES: dict[type, type] = {int: _Int, float: _Float}
