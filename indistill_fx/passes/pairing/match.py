"""Pair the layers of a teacher with those of a student. No name of a module or class has a part in it.

Rules, in order:
  1. The candidates are the exits of the stages of both (see `structure.stages`); each two of them have a score (see `score`).
  2. The pairs are the order-preserving alignment with the largest sum of scores above a floor, each weighed by how much of a stage the
     two are. Pairs asked for stay, and nothing crosses them.
  3. Where both models are a single stage, where every block or more pairs than stages are asked for, blocks are paired inside the
     paired stages, evenly spaced and ending with the last.
  4. Layers that were replaced to deliver what the next stage reads are paired where they deliver it (see `replaced_layers`).
  5. The penultimate vectors, for relational losses, are a pair of their own in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Any, cast

from indistill_fx.errors import ConfigError, MatchError
from indistill_fx.passes.contract import PassResult
from indistill_fx.passes.pairing.candidates import TENSORS, Candidates, Taps, look, make_pair
from indistill_fx.passes.pairing.replaced_layers import moved, stems
from indistill_fx.passes.pairing.runners_up import Explained, explain
from indistill_fx.passes.pairing.score import Chosen, Evidence, Place, comparable, weigh, words
from indistill_fx.passes.structure.stages import NetworkStage
from indistill_fx.plan import Pair
from indistill_fx.traced import TracedModel


def best_path(gain: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The strictly ascending (row, column) pairs with the largest sum of gains; only positive gains are taken.

    Ties go to the pairs nearest to the end. Time and memory are rows x columns.

    Source:
        Needleman, Wunsch, "A general method applicable to the search for similarities", 1970; here gaps cost nothing.

    >>> best_path([[0.9, 0.1], [0.8, 0.2], [0.0, 0.7]])
    [(0, 0), (2, 1)]
    """
    rows, columns = len(gain), len(gain[0]) if gain else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for i, row in enumerate(gain):
        for j, value in enumerate(row):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + value)
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


Similarity = Callable[[TracedModel, TracedModel, Sequence[str], Sequence[str]], Sequence[Sequence[float]]]
"""Similarity on data: (teacher, student, teacher taps, student taps) -> one row per teacher tap, values 0 to 1."""

_FLOOR = 0.3
"""A pair must score more than this to be better than none."""

_Sides = tuple[Candidates, Candidates]
_Places = tuple[list[Place], list[Place]]


@dataclass(frozen=True, slots=True)
class MatchReport:
    """How the pairs were found.

    Attributes:
        embedding: the penultimate vectors; None if one of the models has none.
        unmatched: stages without a partner, and why.
        explained: the pairs with their evidence and runners-up.
    """

    embedding: Pair | None
    unmatched: tuple[str, ...]
    explained: tuple[Explained, ...]


def match(
    teacher: TracedModel,
    student: TracedModel,
    *,
    pairs: int | None = None,
    every_block: bool = False,
    taps: Taps = "block",
    fixed: Sequence[tuple[str, str]] = (),
    similarity: Similarity | None = None,
    required: bool = True,
) -> PassResult[tuple[Pair, ...], MatchReport]:
    """Pair layers.

    Args:
        teacher: traced.
        student: traced.
        pairs: how many pairs; default: one per common stage, or one per block of the smaller model where both are a single stage.
        every_block: pair as many blocks as the paired stages have in common.
        taps: which tensor of a block: its output, what its last activation reads, or its last convolution.
        fixed: (teacher tap, student tap) pairs to keep.
        similarity: measured on data, see `Similarity` and `cka`.
        required: whether having no pairs is an error.

    Returns:
        The pairs, shallow to deep, without kept channels; and the report.

    Raises:
        MatchError: nothing can be paired, and pairs are required.
        ConfigError: an option is at fault, a fixed pair names no layer or cannot be compared, or two of them cross.
    """
    if taps not in TENSORS:
        raise ConfigError(
            f"There are no taps {taps!r}.", where="taps", got=taps, hint=f"Choose from: {', '.join(TENSORS)}."
        )
    if pairs is not None and pairs < 1:
        raise ConfigError(
            f"pairs is {pairs}, so there would be none.", where="pairs", got=pairs, hint="Ask for at least one."
        )
    sides = look(teacher, taps), look(student, taps)
    kept = _fixed(sides, fixed)
    blockwise = every_block or (sides[0].is_even and sides[1].is_even)
    if blockwise and similarity is not None:
        places = _all_blocks(sides[0]), _all_blocks(sides[1])
    else:
        places = sides[0].exits(), sides[1].exits()
    table = _weigh_all(sides, places, similarity)
    gains = [[_gain(table[i][j], t, s, kept, sides) for j, s in enumerate(places[1])] for i, t in enumerate(places[0])]
    cells = _best_cells(gains, places)
    if not cells and not kept:
        if required:
            raise _nothing_fits(sides, places, table)
        return PassResult((), MatchReport(_embedding(sides), _unmatched(sides, [], [], []), ()))
    free = [_choose(places[0][i], places[1][j], table[i][j]) for i, j in cells]
    if similarity is None or not blockwise:
        free = _spread(sides, cells, free, kept, wanted=pairs, blockwise=blockwise)
    chosen = sorted([*_thin(free, pairs, len(kept)), *kept], key=lambda match: sides[0].order[match.teacher.node])
    placed = [moved(sides, match) for match in chosen]
    if pairs is None and placed and (stem := stems(sides, chosen[0])) is not None:
        chosen, placed = [stem, *chosen], [stem, *placed]
    found = _pairs(sides, placed)
    report = MatchReport(
        embedding=_embedding(sides),
        unmatched=_unmatched(sides, chosen, free, kept),
        explained=explain(sides, chosen, found, places, table),
    )
    return PassResult(found, report)


def requested_pairs(fixed: Any) -> list[tuple[str, str]]:
    """The pairs of names that the user requests.

    Raises:
        ConfigError: they are in another form.
    """
    is_list = isinstance(fixed, Iterable) and not isinstance(fixed, str | Mapping)
    entries = [*fixed] if is_list else []
    pairs = [tuple(entry) for entry in entries if isinstance(entry, list | tuple)]
    other = fixed is not None and not is_list
    if other or len(pairs) < len(entries) or any(tuple(map(type, pair)) != (str, str) for pair in pairs):
        raise ConfigError(
            f"`fixed` is not a list of pairs of layers: {fixed!s:.120}.",
            where="fixed",
            got=type(fixed).__name__,
            hint='Write fixed=[("layer1", "blocks.0"), …]: in every pair first the teacher\'s layer, then the student\'s.',
        )
    return cast("list[tuple[str, str]]", pairs)


def _best_cells(gains: Sequence[Sequence[float]], places: _Places) -> list[tuple[int, int]]:
    """Rule 2: stages in the order of the graph, outputs of pyramids in the order of their strides, whichever was computed first."""
    found: list[tuple[int, int]] = []
    for is_output in (False, True):
        rows, columns = (
            sorted(
                (k for k, place in enumerate(side) if place.is_output == is_output),
                key=lambda k, side=side: side[k].level if is_output else k,  # type: ignore[misc]
            )
            for side in places
        )
        path = best_path([[gains[i][j] for j in columns] for i in rows])
        found += [(rows[i], columns[j]) for i, j in path]
    return sorted(found)


def _nothing_fits(sides: _Sides, places: _Places, table: Sequence[Sequence[Evidence | None]]) -> MatchError:
    hint = (
        "Name a pair with fixed= (--pair TEACHER_LAYER=STUDENT_LAYER), or distil the logits alone: "
        'main="kd" without a warm-up (--no-warmup).'
    )
    listed = f"The stages of the teacher ({_listed(sides[0])}) and of the student ({_listed(sides[1])})"
    without = [side.traced.role for side, side_places in zip(sides, places, strict=True) if not side_places]
    scored = [(table[i][j], t, s) for i, t in enumerate(places[0]) for j, s in enumerate(places[1])]
    best = max(((e.score, t, s) for e, t, s in scored if e is not None), key=lambda entry: entry[0], default=None)
    if without:
        return MatchError(
            f"No stages were found in the {' and in the '.join(without)}, so nothing can be paired.",
            hint=hint,
            where="plan",
        )
    if best is None:
        return MatchError(f"{listed} have no layers of the same kind.", hint=hint, where="plan")
    names = [side.traced.tap_name(place.node) for side, place in zip(sides, best[1:], strict=True)]
    return MatchError(
        f"{listed} do not fit: the best two, `{names[0]}` and `{names[1]}`, score {best[0]:.2f}, and a pair needs more than {_FLOOR}.",
        hint=hint,
        where="plan",
    )


def _all_blocks(side: Candidates) -> list[Place]:
    return [place for stage in side.stages for place in side.blocks(stage)]


def _weigh_all(sides: _Sides, places: _Places, similarity: Similarity | None) -> list[list[Evidence | None]]:
    """The evidence for every combination of a teacher's and a student's place."""
    measured: Sequence[Sequence[float]] | None = None
    if similarity is not None and all(places):
        names = [
            [side.traced.tap_name(place.node) for place in side_places]
            for side, side_places in zip(sides, places, strict=True)
        ]
        measured = similarity(sides[0].traced, sides[1].traced, names[0], names[1])
    return [
        [weigh(t, s, similarity=None if measured is None else measured[i][j]) for j, s in enumerate(places[1])]
        for i, t in enumerate(places[0])
    ]


def _gain(evidence: Evidence | None, teacher: Place, student: Place, kept: Sequence[Chosen], sides: _Sides) -> float:
    if evidence is None or any(_cross(sides, (teacher, student), (match.teacher, match.student)) for match in kept):
        return -1.0
    return (evidence.score - _FLOOR) * teacher.weight * student.weight


def _cross(sides: _Sides, one: tuple[Place, Place], other: tuple[Place, Place]) -> bool:
    """Whether two pairs cross, or share a layer."""
    if all(place.is_output for place in (*one, *other)):
        return one[0].node == other[0].node or one[1].node == other[1].node
    ahead = [side.order[a.node] - side.order[b.node] for side, a, b in zip(sides, one, other, strict=True)]
    return ahead[0] * ahead[1] <= 0


def _choose(teacher: Place, student: Place, evidence: Evidence | None, *further: str) -> Chosen:
    evidence = evidence or Evidence(0.0, 0.0, 0.0)
    return Chosen(teacher, student, evidence, (*words(teacher, student, evidence), *further))


def _spread(
    sides: _Sides,
    cells: Sequence[tuple[int, int]],
    exits: list[Chosen],
    kept: Sequence[Chosen],
    *,
    wanted: int | None,
    blockwise: bool,
) -> list[Chosen]:
    """Pair blocks inside the paired stages, evenly spaced and ending with the last; the layers after the last merge with one another."""
    stages = [(sides[0].stages[i], sides[1].stages[j]) for i, j in cells]
    limits = [min(len(t.blocks), len(s.blocks)) for t, s in stages]
    counts = limits if blockwise and wanted is None else [1] * len(cells)
    missing = 0 if wanted is None else wanted - len(kept) - len(cells)
    if missing > sum(limits) - len(cells):
        raise ConfigError(
            f"{wanted} pairs are more than the {sum(limits) + len(kept)} blocks that the two models have in common.",
            where="pairs",
            got=wanted,
            hint=f"Ask for {sum(limits) + len(kept)} at most.",
        )
    for _ in range(missing):
        open_stages = [k for k, (count, limit) in enumerate(zip(counts, limits, strict=True)) if count < limit]
        k = max(open_stages, key=lambda k: (stages[k][0].cost + stages[k][1].cost) / counts[k])
        counts[k] += 1
    found: list[Chosen] = []
    for (teacher, student), count, last in zip(stages, counts, exits, strict=True):
        places = sides[0].blocks(teacher), sides[1].blocks(student)
        tail = min(count - 1, _tail(teacher), _tail(student))
        steps = [
            _evenly(len(side_places) - tail, count - tail) + list(range(len(side_places) - tail, len(side_places)))
            for side_places in places
        ]
        inner = [(places[0][i], places[1][j]) for i, j in list(zip(*steps, strict=True))[:-1]]
        found += [_choose(t, s, weigh(t, s), "block") for t, s in inner if _gain(weigh(t, s), t, s, kept, sides) > -1]
        found.append(last)
    return found


def _thin(free: list[Chosen], wanted: int | None, kept: int) -> list[Chosen]:
    """At most the requested number of pairs, evenly spaced and ending with the last."""
    count = len(free) if wanted is None else max(0, min(len(free), wanted - kept))
    return [free[k] for k in _evenly(len(free), count)]


def _evenly(length: int, count: int) -> list[int]:
    """`count` indices of a list, evenly spaced and ending with the last."""
    return [floor((k + 1) * length / count + 0.5) - 1 for k in range(count)]


def _tail(stage: NetworkStage) -> int:
    """How many layers follow the stage's last merge: in restoration networks, the end of the body, and the upsampling."""
    merges = [k for k, block in enumerate(stage.blocks) if block.form == "merge"]
    return len(stage.blocks) - 1 - merges[-1] if merges else 0


def _fixed(sides: _Sides, fixed: Sequence[tuple[str, str]]) -> list[Chosen]:
    """The pairs that the user requests."""
    kept: list[Chosen] = []
    for teacher, student in fixed:
        places = [
            side.anywhere(side.traced.node(tap).name) for side, tap in zip(sides, (teacher, student), strict=True)
        ]
        evidence = weigh(places[0], places[1])
        if evidence is None:
            forms = [f"{place.facts.kind} {place.size}" for place in places]
            raise ConfigError(
                f"`{teacher}` ({forms[0]}) and `{student}` ({forms[1]}) cannot be compared.",
                where=teacher,
                hint="Pair layers of one kind: maps and tokens of images, tokens of texts, or vectors.",
            )
        for other in kept:
            if _cross(sides, (places[0], places[1]), (other.teacher, other.student)):
                names = [
                    side.traced.tap_name(place.node)
                    for side, place in zip(sides, (other.teacher, other.student), strict=True)
                ]
                raise ConfigError(
                    f"The pairs `{names[0]}` ↔ `{names[1]}` and `{teacher}` ↔ `{student}` cross or share a layer.",
                    where=teacher,
                    hint="Order the pairs from the input to the output on both sides.",
                )
        kept.append(Chosen(places[0], places[1], evidence, ("fixed", *words(places[0], places[1], evidence))))
    return kept


def _pairs(sides: _Sides, chosen: Sequence[Chosen]) -> tuple[Pair, ...]:
    names = (
        sides[0].names([match.teacher.node for match in chosen]),
        sides[1].names([match.student.node for match in chosen]),
    )
    return tuple(
        make_pair(
            sides,
            teacher,
            student,
            (match.teacher.node, match.student.node),
            match.evidence.score,
            ", ".join(match.words),
        )
        for teacher, student, match in zip(*names, chosen, strict=True)
    )


def _embedding(sides: _Sides) -> Pair | None:
    teacher, student = (side.penultimate() for side in sides)
    if teacher is None or student is None:
        return None
    names = sides[0].traced.tap_name(teacher), sides[1].traced.tap_name(student)
    return make_pair(sides, *names, (teacher, student), 1.0, "penultimate")


def _unmatched(
    sides: _Sides, chosen: Sequence[Chosen], possible: Sequence[Chosen], kept: Sequence[Chosen]
) -> tuple[str, ...]:
    """The stages without a partner, and why; `possible` had one before pairs were left out, and `kept` were requested."""
    lines = []
    for k, side in enumerate(sides):
        paired, left_out = (
            {(match.teacher, match.student)[k].node for match in matches} for matches in (chosen, possible)
        )
        for stage in side.stages:
            if paired.isdisjoint(map(side.tensor, stage.blocks)):
                place = side.place(stage, len(stage.blocks) - 1)
                why = "fewer pairs were asked for" if place.node in left_out else _why_alone(place, sides[1 - k])
                why = "the pairs asked for stand in its way" if kept and "fits another" in why else why
                lines.append(f"{side.traced.role} `{side.traced.tap_name(place.node)}` ({place.size}): {why}")
    return tuple(lines)


def _why_alone(place: Place, other: Candidates) -> str:
    exits = [candidate for candidate in other.exits() if comparable(place, candidate)]
    if not exits:
        return f"the {other.traced.role} has no layer of that kind"
    near = min(exits, key=lambda candidate: abs(candidate.level - place.level))
    name = other.traced.tap_name(near.node)
    if abs(near.level - place.level) < 0.5:
        return f"`{name}` of the {other.traced.role} fits another stage better"
    return f"the {other.traced.role} has no stage at that resolution; the nearest is `{name}` ({near.size})"


def _listed(side: Candidates) -> str:
    return (
        ", ".join(f"`{side.traced.tap_name(place.node)}` {place.facts.kind} {place.size}" for place in side.exits())
        or "no stages"
    )
