"""Pair the layers of a teacher with those of a student.

Rules, in order:
  1. The candidates are the exits of the stages on both spines (see `spine`); each pair of them has a score (see `score`).
  2. The pairs are the order-preserving alignment of the two lists that has the largest sum of scores, each above a floor and weighed
     by how much of a stage both are. Pairs that the user fixed stay, and nothing crosses them.
  3. Where both models are one stage, where every block is asked for, or more pairs than stages, blocks are paired inside the paired
     stages, evenly spaced and ending with the last.
  4. The penultimate vectors, for relational losses, are a pair of their own in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from indistill_fx.errors import ConfigError, MatchError
from indistill_fx.passes.blocks import Block, find_blocks
from indistill_fx.passes.flow import Flow, information_flow
from indistill_fx.passes.score import Evidence, Place, weigh
from indistill_fx.passes.spine import Stage, find_stages
from indistill_fx.plan import Adapter, Pair
from indistill_fx.result import PassResult
from indistill_fx.traced import TracedModel

Taps = Literal["block", "pre-activation", "last-conv"]
Similarity = Callable[[TracedModel, TracedModel, Sequence[str], Sequence[str]], Sequence[Sequence[float]]]
"""Similarity on data: (teacher, student, teacher taps, student taps) -> one row per teacher tap, values 0 to 1."""

_TENSOR: dict[str, str] = {"block": "output", "pre-activation": "pre_activation", "last-conv": "last_conv"}
_FLOOR = 0.3
"""A pair must score more than this to be better than none."""


@dataclass(frozen=True, slots=True)
class Explained:
    """A pair, the evidence for it, and the candidates that lost.

    Attributes:
        pair: the pair.
        evidence: what speaks for it; None if it was fixed by the user.
        runners_up: (pair, evidence, why it lost), best first.
    """

    pair: Pair
    evidence: Evidence | None
    runners_up: tuple[tuple[Pair, Evidence, str], ...]


@dataclass(frozen=True, slots=True)
class MatchReport:
    """How the pairs were found.

    Attributes:
        embedding: the penultimate vectors; None if one of the models has none.
        unmatched: stages without a partner, and why.
        explained: per pair the evidence and the runners-up.
    """

    embedding: Pair | None
    unmatched: tuple[str, ...]
    explained: tuple[Explained, ...]


@dataclass(frozen=True, slots=True)
class _Side:
    """One model with everything that was found in it."""

    traced: TracedModel
    flow: Flow
    stages: tuple[Stage, ...]

    def places(self, taps: Taps) -> list[Place]:
        """The stage exits as candidates."""
        last = self.stages[-1].exit.octaves if self.stages else 0.0
        mean = 1 / max(1, len(self.stages))
        return [
            Place(
                node=_tensor(stage.exit, taps),
                facts=self.traced.facts[_tensor(stage.exit, taps)],
                octaves=stage.exit.octaves,
                from_last=last - stage.exit.octaves,
                depth=stage.exit.depth,
                order=(stage.index + 1) * mean,
                weight=min(1.0, 0.1 + 2 * stage.cost / mean),
                spatial=len(self.traced.facts[self.flow.trunk[0]].space),
            )
            for stage in self.stages
        ]


def match(
    teacher: TracedModel,
    student: TracedModel,
    *,
    pairs: int | None = None,
    every_block: bool = False,
    taps: Taps = "block",
    fixed: Sequence[tuple[str, str]] = (),
    similarity: Similarity | None = None,
) -> PassResult[tuple[Pair, ...], MatchReport]:
    """Pair layers.

    Args:
        teacher: traced.
        student: traced.
        pairs: how many pairs at the most; default: one per common stage.
        every_block: pair every block of the model that has fewer.
        taps: which tensor of a block: its output, what its last activation reads, or its last convolution.
        fixed: (teacher tap, student tap) pairs to keep.
        similarity: measured on data, see `Similarity`.

    Returns:
        The pairs, shallow to deep, and the report.

    Raises:
        MatchError: nothing can be paired.
        ConfigError: a fixed pair names no layer, or two of them cross.
    """
    if taps not in _TENSOR:
        raise ConfigError(f"There are no taps of the kind {taps!r}.", where="taps", got=taps, expected=list(_TENSOR), hint=f"Legal: {', '.join(_TENSOR)}.")
    sides = _look(teacher), _look(student)
    places = sides[0].places(taps), sides[1].places(taps)
    measured = _measure(similarity, sides, places)
    table = [[weigh(t, s, similarity=measured and measured[i][j]) for j, s in enumerate(places[1])] for i, t in enumerate(places[0])]
    chosen = _best_path(table, places)
    if not chosen and not fixed:
        raise MatchError(
            f"The teacher {_listed(sides[0], places[0])} and the student {_listed(sides[1], places[1])} have no kind of layer in common.",
            hint='Distil the logits alone: main="kd" without a warm-up (`indistill-fx distill … --no-warmup`).',
        )
    found = [_pair(sides, places[0][i].node, places[1][j].node, table[i][j], _reason(places[0][i], places[1][j])) for i, j in chosen]
    explained = tuple(Explained(pair, table[i][j], ()) for pair, (i, j) in zip(found, chosen, strict=True))
    report = MatchReport(embedding=_embedding(sides), unmatched=_unmatched(sides, places, chosen), explained=explained)
    return PassResult(tuple(found), report)


def _look(traced: TracedModel) -> _Side:
    flow = information_flow(traced)
    return _Side(traced, flow, find_stages(traced, flow, find_blocks(traced, flow)))


def _tensor(block: Block, taps: Taps) -> str:
    return str(getattr(block, _TENSOR[taps]))


def _measure(similarity: Similarity | None, sides: tuple[_Side, _Side], places: tuple[list[Place], list[Place]]) -> Sequence[Sequence[float]] | None:
    if similarity is None or not all(places):
        return None
    names = [[side.traced.tap_name(place.node) for place in own] for side, own in zip(sides, places, strict=True)]
    return similarity(sides[0].traced, sides[1].traced, names[0], names[1])


def _best_path(table: list[list[Evidence | None]], places: tuple[list[Place], list[Place]]) -> list[tuple[int, int]]:
    """The order-preserving alignment with the largest weighed sum of scores above the floor.

    Source: Needleman, Wunsch, "A general method applicable to the search for similarities", 1970; gaps are free here.
    """
    rows, columns = len(places[0]), len(places[1])
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    gain = [[_gain(table[i][j], t, s) for j, s in enumerate(places[1])] for i, t in enumerate(places[0])]
    for i in range(rows):
        for j in range(columns):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + gain[i][j])
    path, i, j = [], rows, columns
    while i and j:
        if gain[i - 1][j - 1] > 0 and best[i][j] == best[i - 1][j - 1] + gain[i - 1][j - 1]:
            i, j = i - 1, j - 1
            path.append((i, j))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return path[::-1]


def _gain(evidence: Evidence | None, teacher: Place, student: Place) -> float:
    return -1.0 if evidence is None else (evidence.score - _FLOOR) * teacher.weight * student.weight


def _pair(sides: tuple[_Side, _Side], teacher: str, student: str, evidence: Evidence | None, reason: str) -> Pair:
    facts = sides[0].traced.facts[teacher], sides[1].traced.facts[student]
    adapter: Adapter = "none"
    if facts[0].kind != facts[1].kind:
        adapter = "tokens_to_map"
    elif facts[0].space != facts[1].space:
        adapter = "pool"
    return Pair(
        teacher=sides[0].traced.tap_name(teacher),
        student=sides[1].traced.tap_name(student),
        teacher_shape=facts[0].shape,
        student_shape=facts[1].shape,
        adapter=adapter,
        score=round(evidence.score, 4) if evidence else 1.0,
        reason=reason,
    )


def _reason(teacher: Place, student: Place) -> str:
    told = {
        "resolution": abs(teacher.octaves - student.octaves) < 0.5,
        "pyramid": abs(teacher.from_last - student.from_last) < 0.5 <= abs(teacher.octaves - student.octaves),
        "depth": abs(teacher.depth - student.depth) <= 0.1,
        "last": teacher.order == student.order == 1,
    }
    return ", ".join(word for word, holds in told.items() if holds)


def _embedding(sides: tuple[_Side, _Side]) -> Pair | None:
    nodes = [_penultimate(side) for side in sides]
    if nodes[0] is None or nodes[1] is None:
        return None
    return _pair(sides, nodes[0], nodes[1], None, "penultimate vectors")


def _penultimate(side: _Side) -> str | None:
    """The vector that the last layer with weights reads."""
    from indistill_fx.ops import op_name
    from indistill_fx.passes.blocks import _NOTHING

    nodes = {node.name: node for node in side.traced.graph_module.graph.nodes}
    facts, trunk = side.traced.facts, side.flow.trunk
    last = next((k for k in reversed(range(1, len(trunk))) if trunk[k] in facts and facts[trunk[k]].macs), None)
    while last is not None and last > 1 and op_name(nodes[trunk[last - 1]]) in _NOTHING:
        last -= 1
    if last is None or trunk[last - 1] not in facts or facts[trunk[last - 1]].kind != "vector" or last == 1:
        return None
    return trunk[last - 1]


def _unmatched(sides: tuple[_Side, _Side], places: tuple[list[Place], list[Place]], chosen: list[tuple[int, int]]) -> tuple[str, ...]:
    told = []
    for k, (side, own) in enumerate(zip(sides, places, strict=True)):
        taken = {pair[k] for pair in chosen}
        for n, place in enumerate(own):
            if n not in taken:
                told.append(f"{side.traced.role} `{side.traced.tap_name(place.node)}` {_size(place)}: no stage of the other model is left at its place")
    return tuple(told)


def _listed(side: _Side, places: list[Place]) -> str:
    return f"({', '.join(f'`{side.traced.tap_name(place.node)}` {_size(place)}' for place in places) or 'no stages'})"


def _size(place: Place) -> str:
    return "x".join(str(n) for axis, n in enumerate(place.facts.shape) if axis != place.facts.batch_axis)
