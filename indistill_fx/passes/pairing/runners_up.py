"""Why the pairs are as they are: the candidates that lost against each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from indistill_fx.passes.pairing.candidates import Candidates, make_pair
from indistill_fx.passes.pairing.score import Chosen, Evidence, Place, words
from indistill_fx.plan import Pair

_RUNNERS_UP = 3


class RunnerUp(NamedTuple):
    """A pair that was not chosen.

    Attributes:
        pair: as the plan would hold it.
        evidence: for it.
        why: it lost.
    """

    pair: Pair
    evidence: Evidence
    why: str


@dataclass(frozen=True, slots=True)
class Explained:
    """A pair, the evidence for it, and the candidates that lost against it, best first."""

    pair: Pair
    evidence: Evidence
    runners_up: tuple[RunnerUp, ...]


def explain(
    sides: tuple[Candidates, Candidates],
    chosen: Sequence[Chosen],
    pairs: Sequence[Pair],
    places: tuple[Sequence[Place], Sequence[Place]],
    table: Sequence[Sequence[Evidence | None]],
) -> tuple[Explained, ...]:
    """The runners-up of every pair: the candidates that share one of its layers.

    Args:
        sides: teacher and student.
        chosen: the pairs found.
        pairs: the same, as the plan holds them.
        places: the candidates of both sides.
        table: the evidence for each two of them.

    Returns:
        One entry per pair, in the same order.
    """
    taken = [
        {(match.teacher, match.student)[k].node: pair for match, pair in zip(chosen, pairs, strict=True)}
        for k in (0, 1)
    ]
    explained = []
    for match, pair in zip(chosen, pairs, strict=True):
        losers = []
        for i, teacher in enumerate(places[0]):
            for j, student in enumerate(places[1]):
                evidence = table[i][j]
                if evidence is not None and (teacher.node == match.teacher.node) != (
                    student.node == match.student.node
                ):
                    runner_up = (
                        taken[1].get(student.node) if teacher.node == match.teacher.node else taken[0].get(teacher.node)
                    )
                    losers.append((teacher, student, evidence, _why(evidence, match, runner_up)))
        losers.sort(key=lambda entry: -entry[2].score)
        runners = tuple(_runner_up(sides, *entry) for entry in losers[:_RUNNERS_UP])
        explained.append(Explained(pair, match.evidence, runners))
    return tuple(explained)


def _runner_up(
    sides: tuple[Candidates, Candidates], teacher: Place, student: Place, evidence: Evidence, why: str
) -> RunnerUp:
    names = sides[0].traced.tap_name(teacher.node), sides[1].traced.tap_name(student.node)
    reason = ", ".join(words(teacher, student, evidence))
    return RunnerUp(make_pair(sides, *names, (teacher.node, student.node), evidence.score, reason), evidence, why)


def _why(evidence: Evidence, winner: Chosen, runner_up: Pair | None) -> str:
    weaker = [
        criterion
        for criterion in ("resolution", "depth", "order", "similarity")
        if (getattr(evidence, criterion) or 0.0) < (getattr(winner.evidence, criterion) or 0.0) - 0.05
    ]
    explained = f"less alike in {', '.join(weaker)}" if weaker else "no more alike"
    return (
        explained
        if runner_up is None
        else f"{explained}; that layer goes with `{runner_up.teacher}` ↔ `{runner_up.student}`"
    )
