"""The plan between a teacher and a student made from it: the kept channels are those that `shrink` kept; nothing ranks them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from indistill_fx.errors import MatchError
from indistill_fx.passes.pairing.match import match
from indistill_fx.plan import MADE, AlignmentPlan, Layers, ModelStamp, Pair
from indistill_fx.traced import TracedModel

Axes = Mapping[tuple[str, int | str], Sequence[int]]


def plan_of(teacher: TracedModel, student: TracedModel, axes: Axes, *, every_block: bool = True) -> AlignmentPlan:
    """Pair every block's exit (or every stage's) with the one of the same name.

    Args:
        teacher: as it was given to `shrink`.
        student: traced from its source code, or from its graph.
        axes: the entries that stayed (`ShrinkReport.axes`).
        every_block: a pair for every block, else one a stage.

    Raises:
        MatchError: the two have no layer of one name.
    """
    found = match(teacher, teacher, every_block=every_block)
    pairs = [made for pair in found.value if (made := _pair(pair, teacher, student, axes)) is not None]
    if not pairs:
        raise MatchError(
            "The student has no layer of the same name as in the teacher.",
            where="plan",
            hint="Pair the two by `indistill-fx align` and give the plan.",
        )
    last = found.report.embedding
    return AlignmentPlan(
        teacher=ModelStamp.of(teacher),
        student=ModelStamp.of(student),
        pairs=tuple(pairs),
        embedding=_pair(last, teacher, student, axes) if last is not None else None,
        layers=Layers(teacher=teacher.layers, student=student.layers),
    )


def plan_if_any(
    teacher: TracedModel, student: TracedModel, axes: Axes, *, every_block: bool = True
) -> AlignmentPlan | None:
    """The same; None where no layer can be paired, so that nothing can be warmed up."""
    try:
        return plan_of(teacher, student, axes, every_block=every_block)
    except MatchError:
        return None


def _pair(pair: Pair, teacher: TracedModel, student: TracedModel, axes: Axes) -> Pair | None:
    """The pair of the teacher's and the student's layer of this name; None if the student has no such layer."""
    tap = pair.teacher
    own = tap.partition("[")[
        0
    ]  # a block of student.py returns what others read: one tensor alone, or several in another order
    if own not in student.taps:
        return None
    facts = teacher.facts_of(tap), student.facts_of(own)
    axis = facts[0].channel_axis
    kept = axes.get((teacher.node(tap).name, axis)) if axis is not None else None
    if axis is None or facts[1].channel_axis != axis or facts[1].channels != len(kept or range(facts[0].channels)):
        return None
    return pair.model_copy(
        update={
            "student": own,
            "student_shape": facts[1].shape,
            "kept": tuple(kept) if kept is not None else None,
            "reason": MADE,
            "score": 1.0,
        }
    )
