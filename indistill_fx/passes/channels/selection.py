"""What channel rules work with: a selection of channels at a node, and how it is obtained from selections further up the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

Index = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A selection on a node's tensor: the adjacent axes start..stop-1, seen as one flat axis, and the entries wanted of it, in order.

    Seeing several axes as one is what lets the views and transposes of a channel shuffle vanish into a permuted index.
    """

    node: fx.Node
    start: int
    stop: int
    index: Index

    @property
    def width(self) -> int:
        """How many axes the selection spans."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Part:
    """One selection that a step needs.

    Attributes:
        cut: the selection.
        links: which entries of the step's own index come from which entries of this selection's index; None: each from its like.
    """

    cut: Cut
    links: tuple[Index, Index] | None = None


@dataclass(frozen=True, slots=True)
class Filters:
    """Weights whose rows are channels.

    Attributes:
        node: the node that applies them.
        path: where its weights live, as people name the module.
        weight: (rows, inputs, *kernel); None where it is not visible.
        rows: which row makes each entry of the index.
    """

    node: fx.Node
    path: str
    weight: Tensor | None
    rows: Index


@dataclass(frozen=True, slots=True)
class Propagation:
    """How to have a selection: select these of the inputs and weights, then emit this.

    Attributes:
        parts: selections of the inputs.
        weights: selections of constants that the operation reads as graph nodes (functional and ATen forms).
        emit: makes the node whose value is the selection, from the nodes of `parts` and `weights`, in order.
        filters: set where the operation makes the channels, for ranking them.
        note: anything the report should say.
    """

    emit: Emit
    parts: tuple[Part, ...] = ()
    weights: tuple[Cut, ...] = ()
    filters: Filters | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Blocked:
    """The selection cannot be had from further up; why."""

    reason: str


class Emitter(Protocol):
    """Puts new nodes into the graph, after the node whose selection is being made."""

    def function(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function."""

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a tensor's method."""

    def module(self, wanted: str, module: nn.Module, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a new leaf module."""

    def item(self, node: fx.Node, key: int) -> fx.Node:
        """One result of a call that has several."""

    def tensor(self, wanted: str, tensor: Tensor) -> fx.Node:
        """A new parameter or buffer."""

    def size(self, node: fx.Node) -> fx.Node:
        """A computed size, read from selections that were made rather than from the whole tensors."""


Emit = Callable[[Emitter, Sequence[fx.Node]], fx.Node]


def sliced(tensor: Tensor, axis: int, index: Sequence[int] | NDArray[np.int64]) -> Tensor:
    """The entries along an axis as a tensor of its own, with the gradient flag of the original."""
    import torch

    place = torch.as_tensor(index, dtype=torch.long, device=tensor.device)
    return tensor.detach().index_select(axis, place).requires_grad_(tensor.requires_grad)


def spread(index: Sequence[int], *, size: int, before: int, after: int) -> Index:
    """The index of an axis of `size`, for the flat axis it becomes when `before` entries stand to its left and `after` to its right.

    >>> spread((1,), size=2, before=2, after=3)
    (3, 4, 5, 9, 10, 11)
    """
    return tuple((b * size + i) * after + a for b in range(before) for i in index for a in range(after))


def used_groups(index: Index, size: int) -> list[int] | None:
    """The groups of `size` that an index is made of, if it takes each of them whole and in order.

    >>> used_groups((2, 3, 0, 1), 2), used_groups((0, 2), 2)
    ([1, 0], None)
    """
    groups = list(dict.fromkeys(k // size for k in index))
    channels_of_groups = tuple(group * size + k for group in groups for k in range(size))
    return groups if channels_of_groups == index else None


def group_size(shape: Shape, start: int, stop: int) -> int:
    """Number of entries of the axes start..stop-1 seen as one."""
    return prod(shape[start:stop])


def coordinates(flat: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """The coordinate along each axis of an entry of the flat axis.

    >>> coordinates(5, (2, 3))
    (1, 2)
    """
    found: list[int] = []
    for n in reversed(sizes):
        flat, rest = divmod(flat, n)
        found.insert(0, rest)
    return tuple(found)


def flat_place(place: Sequence[int], sizes: Sequence[int]) -> int:
    """The entry of the flat axis at these coordinates."""
    flat = 0
    for k, n in zip(place, sizes, strict=True):
        flat = flat * n + k
    return flat


Slices = Mapping[str, tuple[int, Index]]
