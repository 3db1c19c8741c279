"""Why the pairs are as they are: the candidates that lost against each, and rows of a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from indistill_fx.passes.pairing.candidates import Candidates, make_pair
from indistill_fx.passes.pairing.score import LEGEND, Chosen, Evidence, Place, words
from indistill_fx.plan import Pair, Shape

CODES: dict[str, str] = {
    "resolution": "R",
    "pyramid": "P",
    "depth": "D",
    "last": "L",
    "block": "B",
    "output": "O",
    "drop-in": "I",
    "fixed": "F",
    "data": "C",
    "penultimate": "V",
}
"""Word of a reason -> its letter in the table."""

_RUNNERS_UP = 3


class RunnerUp(NamedTuple):
    """A pair that was not chosen.

    Attributes:
        pair: as it would stand in the plan.
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


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table of pairs, as text.

    Attributes:
        teacher: tap name.
        student: tap name.
        shapes: of one sample, teacher → student.
        kept: how many of the teacher's channels are compared.
        score: two digits.
        reasons: letters, see `legend`.
    """

    teacher: str
    student: str
    shapes: str
    kept: str
    score: str
    reasons: str


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
        pairs: the same, as they stand in the plan.
        places: the candidates of both sides.
        table: the evidence for each two of them.

    Returns:
        One entry per pair, in the same order.
    """
    taken = [
        {(one.teacher, one.student)[k].node: pair for one, pair in zip(chosen, pairs, strict=True)} for k in (0, 1)
    ]
    told = []
    for one, pair in zip(chosen, pairs, strict=True):
        lost = []
        for i, teacher in enumerate(places[0]):
            for j, student in enumerate(places[1]):
                evidence = table[i][j]
                if evidence is not None and (teacher.node == one.teacher.node) != (student.node == one.student.node):
                    rival = (
                        taken[1].get(student.node) if teacher.node == one.teacher.node else taken[0].get(teacher.node)
                    )
                    lost.append((teacher, student, evidence, _why(evidence, one, rival)))
        lost.sort(key=lambda entry: -entry[2].score)
        runners = tuple(_runner_up(sides, *entry) for entry in lost[:_RUNNERS_UP])
        told.append(Explained(pair, one.evidence, runners))
    return tuple(told)


def _runner_up(
    sides: tuple[Candidates, Candidates], teacher: Place, student: Place, evidence: Evidence, why: str
) -> RunnerUp:
    names = sides[0].traced.tap_name(teacher.node), sides[1].traced.tap_name(student.node)
    reason = ", ".join(words(teacher, student, evidence))
    return RunnerUp(make_pair(sides, *names, (teacher.node, student.node), evidence.score, reason), evidence, why)


def _why(evidence: Evidence, winner: Chosen, rival: Pair | None) -> str:
    weaker = [
        word
        for word in ("resolution", "depth", "order", "similarity")
        if (getattr(evidence, word) or 0.0) < (getattr(winner.evidence, word) or 0.0) - 0.05
    ]
    told = f"less alike in {', '.join(weaker)}" if weaker else "no more alike"
    return told if rival is None else f"{told}; that layer goes with `{rival.teacher}` ↔ `{rival.student}`"


def rows(pairs: Iterable[Pair]) -> tuple[Row, ...]:
    """The pairs as lines of a table.

    Args:
        pairs: of a plan.

    Returns:
        One row per pair.
    """
    return tuple(
        Row(
            teacher=pair.teacher,
            student=pair.student,
            shapes=f"{_size(pair.teacher_shape)} → {_size(pair.student_shape)}",
            kept="all" if pair.kept is None else str(len(pair.kept)),
            score=f"{pair.score:.2f}",
            reasons=" ".join(CODES[word] for word in _words(pair)),
        )
        for pair in pairs
    )


def legend(pairs: Iterable[Pair]) -> tuple[str, ...]:
    """What the letters in the rows of these pairs say, one line per letter.

    Args:
        pairs: of a plan.

    Returns:
        The lines.
    """
    used = {word for pair in pairs for word in _words(pair)}
    return tuple(f"{CODES[word]}  {word}: {text}" for word, text in LEGEND.items() if word in used)


def _words(pair: Pair) -> list[str]:
    return [word for word in pair.reason.split(", ") if word in CODES]


def _size(shape: Shape) -> str:
    return "x".join(map(str, shape[1:]))
