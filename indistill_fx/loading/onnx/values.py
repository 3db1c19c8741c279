"""What a name of an ONNX file stands for while it is converted.

A constant is a tensor. What follows from the input is a node of the graph, run beside on the meta device with two sizes of the
input, so that its shape is known without any rule for shapes: an axis of the same length both times does not depend on the input's
free axes. Lengths that do are numbers in the graph (`Size`), and arithmetic on shapes is numpy's on arrays of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor that follows from the input.

    Args:
        node: in the graph.
        samples: on the meta device, one for each size of the input.
    """

    node: fx.Node
    samples: tuple[Tensor, ...]

    @property
    def dim(self) -> int:
        """The number of axes."""
        return self.samples[0].dim()

    @property
    def dtype(self) -> torch.dtype:
        """Torch's type of its entries."""
        return self.samples[0].dtype

    def fixed(self, axis: int) -> int | None:
        """The length of an axis; None if it depends on the input."""
        lengths = {sample.shape[axis] for sample in self.samples}
        return lengths.pop() if len(lengths) == 1 else None


Operation: TypeAlias = Callable[["Size", Any], Any]


def _arithmetic(function: Callable[[Any, Any], Any]) -> tuple[Operation, Operation]:
    """An operator's two methods, with the size on the left and on the right."""
    return lambda self, other: self._with(function, self, other), lambda self, other: self._with(function, other, self)


def _comparison(function: Callable[[Any, Any], Any]) -> Operation:
    return lambda self, other: self._same(function, other)


@dataclass(frozen=True, eq=False)
class Size:
    """A number in the graph that follows from the input: from its sizes; or the device that it is on.

    Args:
        node: in the graph.
        samples: its value for each size of the input.
    """

    node: fx.Node
    samples: tuple[Any, ...]

    def _with(self, function: Callable[..., Any], *operands: Any) -> Size:
        nodes = tuple(operand.node if isinstance(operand, Size) else operand for operand in operands)
        values = zip(
            *(operand.samples if isinstance(operand, Size) else (operand,) * len(self.samples) for operand in operands),
            strict=True,
        )
        return Size(self.node.graph.call_function(function, nodes), tuple(function(*each) for each in values))

    def _same(self, function: Callable[..., Any], other: Any) -> Any:
        """A comparison that holds for any length: with numbers below all that the size can be."""
        if other is None:
            return False
        if not isinstance(other, Size) and (
            (other < 0 and _is_above(self.node, -1)) or (other == 0 and _is_above(self.node, 0))
        ):
            return bool(function(self.samples[0], other))
        raise Undecided("compares a size of the input with a number")

    def __bool__(self) -> bool:
        return bool(self._same(operator.ne, 0))

    __add__, __radd__ = _arithmetic(operator.add)
    __sub__, __rsub__ = _arithmetic(operator.sub)
    __mul__, __rmul__ = _arithmetic(operator.mul)
    __floordiv__, __rfloordiv__ = _arithmetic(operator.floordiv)
    __truediv__, __rtruediv__ = _arithmetic(operator.truediv)
    __mod__, __rmod__ = _arithmetic(operator.mod)

    def __neg__(self) -> Size:
        return self._with(operator.neg, self)

    def apply(self, function: Callable[[Any], Any]) -> Size:
        """Apply a function of one number, such as math.floor."""
        return self._with(function, self)

    __lt__, __le__, __gt__, __ge__ = map(_comparison, (operator.lt, operator.le, operator.gt, operator.ge))

    def __eq__(self, other: object) -> Any:
        return self._same(operator.eq, other)

    __hash__ = object.__hash__


def combined(function: Callable[..., Any], *numbers: Any) -> Any:
    """A function of numbers; a `Size` if one of them is one."""
    first = next((number for number in numbers if isinstance(number, Size)), None)
    return function(*numbers) if first is None else first._with(function, *numbers)


def _is_above(value: Any, bound: int) -> bool:
    """Whether a number in the graph is above -1, or above 0, for any input."""
    if not isinstance(value, fx.Node):
        return bool(value > bound)
    sums = (operator.add, operator.mul) if bound == 0 else (operator.add, operator.mul, operator.floordiv, operator.mod)
    return value.target == "size" or (value.target in sums and all(_is_above(part, bound) for part in value.args))


Sizes: TypeAlias = npt.NDArray[np.object_]
"""Numbers of shapes: an array of int, float, bool and `Size`."""
Value: TypeAlias = Tensor | Traced | Sizes


class Undecided(Exception):  # noqa: N818  it is caught where the operator is known, and reported as a ConfigError
    """What an operator does depends on what cannot be known while converting."""


def sizes(numbers: Any) -> Sizes:
    """An array of numbers and `Size`s."""
    if isinstance(numbers, np.ndarray):
        return numbers
    single = not isinstance(numbers, (list, tuple))
    found: Sizes = np.empty(1 if single else len(numbers), dtype=object)
    found[:] = [numbers] if single else numbers
    return found.reshape(()) if single else found


def numbers_of(value: Value) -> Sizes:
    """A constant, or numbers of shapes, as an array of numbers.

    Raises:
        Undecided: it is computed from data.
    """
    if isinstance(value, Traced):
        raise Undecided("has a shape or an index that is computed from the data")
    if isinstance(value, Tensor):
        return np.array(value.tolist(), dtype=object)
    return value


def list_of(value: Value) -> list[Any]:
    """As `numbers_of`, of one axis, as a list."""
    return list(numbers_of(value).reshape(-1))
