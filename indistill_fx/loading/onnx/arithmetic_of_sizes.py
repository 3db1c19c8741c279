"""Rules of operators on numbers of shapes, some of which follow from the input: numpy's, on arrays of numbers and `Size`s."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from onnx import TensorProto

from indistill_fx.loading.onnx.builder import Op
from indistill_fx.loading.onnx.values import Size, Sizes, Undecided, combined, numbers_of, sizes

_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Mod": operator.mod,
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "And": operator.and_,
    "Or": operator.or_,
}
_ROUNDINGS: dict[str, Callable[[Any], Any]] = {"Floor": math.floor, "Ceil": math.ceil}


def binary(op: Op) -> Sizes:
    """Arithmetic and comparisons; whole numbers are divided with the remainder left out."""
    a, b = _given(op)
    if op.kind == "Div":
        integral = all(
            isinstance(n, int) or (isinstance(n, Size) and isinstance(n.samples[0], int)) for n in (*a.flat, *b.flat)
        )
        return _each(_quotient if integral else operator.truediv, a, b)
    if op.kind in ("Min", "Max"):
        function = torch.sym_min if op.kind == "Min" else torch.sym_max
        return _each(partial(combined, function), a, b)
    return _each(_BINARY[op.kind], a, b)


def rounding(op: Op) -> Sizes:
    """Floor and Ceil."""
    function = _ROUNDINGS[op.kind]
    return _each(lambda n: n.apply(function) if isinstance(n, Size) else function(n), _given(op)[0])


def cast(op: Op) -> Sizes:
    """Cast between whole and real numbers, and to a decision."""
    wanted = int(op.get("to", 7))
    if wanted == TensorProto.BOOL:
        return _each(bool, _given(op)[0])
    kind: Callable[[Any], Any] = float if wanted in (1, 10, 11) else int
    return _each(lambda n: n.apply(kind) if isinstance(n, Size) else kind(n), _given(op)[0])


def identity(op: Op) -> Sizes:
    """The same numbers."""
    return _given(op)[0]


def negation(op: Op) -> Sizes:
    """Neg and Not."""
    function: Callable[[Any], Any] = operator.not_ if op.kind == "Not" else operator.neg
    return _each(function, _given(op)[0])


def where(op: Op) -> Sizes:
    """Where, its condition decided."""
    condition, a, b = _given(op)
    return _each(lambda c, x, y: x if c else y, condition, a, b)


def gather(op: Op) -> Sizes:
    """Gather."""
    numbers, index = _given(op)
    return sizes(np.take(numbers, index.astype(np.int64), axis=int(op.get("axis", 0))))


def cut(op: Op) -> Sizes:
    """Slice of one axis."""
    numbers = _given(op)[0]
    start, end = ((op.numbers(name, place) or [None])[0] for place, name in enumerate(("starts", "ends"), 1))
    step = (op.numbers("steps", 4) or [1])[0]
    if isinstance(start, Size) or isinstance(end, Size):
        raise Undecided("slices a shape by a size")
    return numbers[slice(start, end, step)]


def concat(op: Op) -> Sizes:
    """Concat."""
    return np.concatenate([np.atleast_1d(part) for part in _given(op)])


def reshape(op: Op) -> Sizes:
    """Reshape to constant lengths."""
    return _given(op)[0].reshape([int(n) for n in (op.numbers("shape", 1) or [])])


def squeeze(op: Op) -> Sizes:
    """Squeeze."""
    numbers = _given(op)[0]
    axes = op.numbers("axes", 1)
    return sizes(np.squeeze(numbers, tuple(map(int, axes)) if axes else None))


def unsqueeze(op: Op) -> Sizes:
    """Unsqueeze."""
    return sizes(np.expand_dims(_given(op)[0], tuple(map(int, op.numbers("axes", 1) or []))))


def product(op: Op) -> Sizes:
    """ReduceProd and ReduceSum of all numbers."""
    function = operator.mul if op.kind == "ReduceProd" else operator.add
    total = sizes(reduce(function, _given(op)[0].flat))
    return total if not op.get("keepdims", 1) else total.reshape(1)


def _quotient(a: Any, b: Any) -> Any:
    """A quotient of whole numbers towards zero."""
    signs = {n > 0 for number in (a, b) for n in (number.samples if isinstance(number, Size) else (number,)) if n != 0}
    if not isinstance(a, Size) and not isinstance(b, Size):
        return a // b if len(signs) < 2 else -(-a // b)
    if signs == {True}:
        return a // b
    raise Undecided("divides sizes with a sign")


def _given(op: Op) -> list[Sizes]:
    return [numbers_of(value) for value in op.inputs if value is not None]


def _each(function: Callable[..., Any], *arrays: Sizes) -> Sizes:
    made = np.frompyfunc(function, len(arrays), 1)(*arrays)
    return sizes(made)
