"""Bring the two features of a pair to one shape, by nodes of the graph.

Rules, in order, on each side as far as it needs them:
  0. The batch comes first.
  1. Channels-last maps and token sequences are laid out channels first where the other side is not laid out the same way.
  2. Tokens against a map: leading extra tokens (class, distillation) are dropped and the rest laid out as the map they came from.
  3. The larger of two maps (or sequences) is average-pooled to the size of the smaller, per axis.
  4. A student wider than the teacher is compared on its first channels, as many as the teacher has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from indistill_fx.errors import MatchError
from indistill_fx.graph.edit import copy_graph, output_node
from indistill_fx.passes.contract import PassResult, Rewrite
from indistill_fx.traced import NodeFacts


@dataclass(frozen=True, slots=True)
class Layout:
    """A feature's form: whether channels come first, its sizes in space, and how many leading tokens to drop."""

    channels: int
    channels_first: bool
    space: tuple[int, ...]
    kind: str
    batch_axis: int = 0

    @property
    def form(self) -> tuple[str, bool, int]:
        """The form, apart from sizes, that two features must share to be compared elementwise."""
        return self.kind, self.channels_first, self.batch_axis


def layout_of(facts: NodeFacts) -> Layout:
    """The layout of a tensor."""
    batch = facts.batch_axis or 0
    first = facts.channel_axis is not None and facts.channel_axis + (facts.channel_axis < batch) == 1
    return Layout(facts.channels, first, facts.space, facts.kind, batch)


def adapt(
    graph_module: fx.GraphModule, tap: str, own: Layout, other: Layout, *, may_slice: bool = False
) -> PassResult[fx.GraphModule, Rewrite]:
    """Insert what brings the feature `tap` to the common shape of the two.

    Args:
        graph_module: from `instrument` or `cut`.
        tap: which of its features.
        own: layout of that feature.
        other: layout of the partner's feature.
        may_slice: whether this side's surplus channels are dropped (the student's).

    Raises:
        MatchError: the two cannot be brought to one shape.
    """
    new, _ = copy_graph(graph_module)
    output = output_node(new.graph)
    outputs: Any = output.args[0]
    features, result = outputs
    value: fx.Node = features[tap]
    steps: list[str] = []

    def call(function: Callable[..., Tensor], *args: Any, say: str) -> None:
        nonlocal value
        with new.graph.inserting_before(output):
            value = new.graph.call_function(function, (value, *args))
        steps.append(say)

    space = own.space
    if own.batch_axis:
        call(torch.movedim, own.batch_axis, 0, say="batch first")
    if (own.kind, own.channels_first) != (other.kind, other.channels_first) or space != other.space:
        if not own.channels_first and own.kind in ("map", "tokens"):
            rank = len(space) + 2
            call(_permute, (0, rank - 1, *range(1, rank - 1)), say="channels first")
        if own.kind == "tokens" and other.kind == "map":
            side = isqrt(space[0])
            call(_tokens_to_map, space[0] - side * side, side, say=f"tokens to a {side}x{side} map")
            space = (side, side)
        partner = _as_map(other.space, own.kind, other.kind)
        if len(space) != len(partner):
            raise MatchError(
                f"`{tap}`: a {own.kind} of size {space} and a {other.kind} of size {other.space} have no common form.",
                where=tap,
                hint="Pair it with another layer, or leave the pair out.",
            )
        target = tuple(map(min, space, partner))
        if space != target:
            call(_POOL[len(target)], target, say=f"pooled {'x'.join(map(str, space))} to {'x'.join(map(str, target))}")
    if may_slice and own.channels > other.channels:
        first = "channels first" in steps or own.channels_first or own.kind == "vector"
        call(
            _first_channels,
            other.channels,
            1 if first else -1,
            say=f"first {other.channels} of {own.channels} channels",
        )
    if not steps:
        return PassResult(graph_module, Rewrite(skipped=(f"{tap}: has the common shape already",)))
    output.args = (({**features, tap: value}, result),)
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(f"{tap}: {step}" for step in steps)))


def _as_map(space: tuple[int, ...], own_kind: str, other_kind: str) -> tuple[int, ...]:
    if other_kind == "tokens" and own_kind == "map":
        return (isqrt(space[0]), isqrt(space[0]))
    return space


def _permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    return x.permute(order)


def _tokens_to_map(x: Tensor, extra: int, side: int) -> Tensor:
    kept: Tensor = x[:, :, extra:]
    return kept.reshape(*kept.shape[:2], side, side)


def _first_channels(x: Tensor, count: int, axis: int) -> Tensor:
    return x.narrow(axis, 0, count)


_POOL: dict[int, Callable[..., Tensor]] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
