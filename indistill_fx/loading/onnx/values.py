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
        """How many axes it has."""
        return self.samples[0].dim()

    def fixed(self, axis: int) -> int | None:
        """The length of an axis, None where it follows from the input's."""
        lengths = {sample.shape[axis] for sample in self.samples}
        return lengths.pop() if len(lengths) == 1 else None


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
        nodes = tuple(one.node if isinstance(one, Size) else one for one in operands)
        values = zip(
            *(one.samples if isinstance(one, Size) else (one,) * len(self.samples) for one in operands), strict=True
        )
        return Size(self.node.graph.call_function(function, nodes), tuple(function(*each) for each in values))

    def _same(self, function: Callable[..., Any], other: Any) -> Any:
        others = other.samples if isinstance(other, Size) else (other,) * len(self.samples)
        answers = {bool(function(a, b)) for a, b in zip(self.samples, others, strict=True)}
        if len(answers) > 1:
            raise Undecided("compares a size of the input with a number")
        return answers.pop()

    def __add__(self, other: Any) -> Size:
        return self._with(operator.add, self, other)

    def __radd__(self, other: Any) -> Size:
        return self._with(operator.add, other, self)

    def __sub__(self, other: Any) -> Size:
        return self._with(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Size:
        return self._with(operator.sub, other, self)

    def __mul__(self, other: Any) -> Size:
        return self._with(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Size:
        return self._with(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Size:
        return self._with(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Size:
        return self._with(operator.floordiv, other, self)

    def __truediv__(self, other: Any) -> Size:
        return self._with(operator.truediv, self, other)

    def __rtruediv__(self, other: Any) -> Size:
        return self._with(operator.truediv, other, self)

    def __mod__(self, other: Any) -> Size:
        return self._with(operator.mod, self, other)

    def __neg__(self) -> Size:
        return self._with(operator.neg, self)

    def apply(self, function: Callable[[Any], Any]) -> Size:
        """A function of one number, such as math.floor."""
        return self._with(function, self)

    def __eq__(self, other: object) -> Any:
        return self._same(operator.eq, other)

    def __lt__(self, other: Any) -> Any:
        return self._same(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._same(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._same(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._same(operator.ge, other)

    __hash__ = object.__hash__


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
