"""The pipeline on one page: how a stage's two halves are made, in the order of the lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from indistill_fx.errors import MatchError
from indistill_fx.passes.contract import (
    Pass,
    PassRecord,
    PassResult,
    graph_text,
    run_passes,
    signature_of,
    unchanged,
    verify,
)
from indistill_fx.passes.extract.adapt import adapt, layout_of
from indistill_fx.passes.extract.dedupe import dedupe
from indistill_fx.passes.extract.feed import fed_name, feed
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.extract.view import deliver, see
from indistill_fx.passes.lowering.table import Lowerings, lowering_passes
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.traced import Role, TracedModel

Half = PassResult[fx.GraphModule, tuple[PassRecord, ...]]
"""One side of a stage: its graph, and what each pass did to it."""


@dataclass(frozen=True, slots=True)
class HalfOptions:
    """What both halves of a stage have in common.

    Attributes:
        lowerings: of the target.
        narrowed: whether the widths of the pairs have been made equal.
        one_size: whether the two features of a pair are to have one size though their widths differ.
    """

    lowerings: Lowerings
    narrowed: bool
    one_size: bool = False


def teacher_half(
    teacher: TracedModel, student: TracedModel, pairs: Sequence[Pair], taps: Sequence[str], options: HalfOptions
) -> Half:
    """The teacher's part of a stage: cut at its taps, folded, frozen.

    Args:
        teacher: traced; already narrowed if `options.narrowed`.
        student: traced, for the shapes on the other side.
        pairs: the pairs whose features are compared.
        taps: further taps (logits, penultimate vector), delivered as they are.
        options: those of both halves.
    """
    outputs = [*dict.fromkeys((*(pair.teacher for pair in pairs), *taps))]
    return run_passes(
        teacher,
        [
            ("cut", partial(cut, taps=outputs)),
            *_seeing(teacher),
            ("dedupe", dedupe),
            *_adapters(pairs, teacher, student, side="teacher", narrowed=options.narrowed, one_size=options.one_size),
            *_delivering(teacher, student),
            ("fold", fold),
            *lowering_passes(options.lowerings, "teacher", teacher.facts),
        ],
    )


def student_half(
    student: TracedModel, teacher: TracedModel, pairs: Sequence[Pair], taps: Sequence[str], options: HalfOptions
) -> Half:
    """The student's part of a stage: cut at its taps; it calls the user's own layers. Arguments as in `teacher_half`."""
    outputs = [*dict.fromkeys((*(pair.student for pair in pairs), *taps))]
    return run_passes(
        student,
        [
            ("cut", partial(cut, taps=outputs)),
            *_adapters(pairs, student, teacher, side="student", narrowed=options.narrowed, one_size=options.one_size),
            *lowering_passes(options.lowerings, "student", student.facts),
        ],
    )


def fed_student_half(
    student: TracedModel, teacher: TracedModel, pairs: Sequence[Pair], *, lowerings: Lowerings
) -> Half:
    """The student as segments, each of which begins at an input of its own (see `feed`).

    Args:
        student: traced.
        teacher: traced and narrowed.
        pairs: shallow to deep.
        lowerings: of the target.

    Raises:
        MatchError: the teacher's feature of a pair cannot replace the student's.
    """
    taps = [pair.student for pair in pairs]
    from_start = run_passes(student, [("cut", partial(cut, taps=taps))])
    with unchanged(from_start.value, by="feed"):
        result = feed(from_start.value, taps)
    signature = (*signature_of(from_start.value), *(fed_name(number) for number in range(len(taps) - 1)))
    verify(result.value, after="feed", signature=signature)
    text = from_start.report[-1].after, graph_text(result.value)
    record = PassRecord("feed", result.report.done, result.report.skipped, *text)
    adapters = _adapters(pairs, student, teacher, side="student", narrowed=True)
    half = run_passes(result.value, [*adapters, *lowering_passes(lowerings, "student", student.facts)])
    for pair, made in zip(pairs[:-1], half.report, strict=False):
        if made.done:
            raise MatchError(
                f"The teacher's `{pair.teacher}` cannot replace the student's `{pair.student}`: {made.done[0]}.",
                where=pair.student,
                hint="Leave the pair out (layers=[…]), or warm up one by one (feed='student').",
            )
    return PassResult(half.value, (*from_start.report, record, *half.report))


def whole_teacher(model: TracedModel, *, lowerings: Lowerings) -> Half:
    """A model as the teacher's half of a stage that reads nothing but its logits."""
    return teacher_half(model, model, [], [model.tap_name(model.logits)], HalfOptions(lowerings, narrowed=False))


def narrowed_teacher(teacher: TracedModel, plan: AlignmentPlan) -> PassResult[TracedModel, PassRecord]:
    """The teacher with student-wide taps, as the plan says."""
    with unchanged(teacher, by="narrow"):
        result = narrow(teacher, plan)
    verify(result.value.graph_module, after="narrow", signature=signature_of(teacher.graph_module))
    done = [f"{tap.tap}: {len(tap.kept)} of {tap.of} channels" for tap in result.report.taps]
    done += [f"{layer.module}: {layer.kept} of {layer.of} rows" for tap in result.report.taps for layer in tap.absorbed]
    skipped = [f"{end.node}: {end.reason}" for tap in result.report.taps for end in tap.stopped]
    text = graph_text(teacher.graph_module), graph_text(result.value.graph_module)
    return PassResult(result.value, PassRecord("narrow", tuple(done), tuple(skipped), *text))


def _seeing(teacher: TracedModel) -> list[Pass]:
    """The passes that convert a batch for the teacher, if its view differs from the student's."""
    view = teacher.view
    return [("see", partial(see, view=view, facts=teacher.facts))] if view is not None else []


def _delivering(teacher: TracedModel, student: TracedModel) -> list[Pass]:
    """The passes that convert the teacher's values to the student's dtype, and its logits to the student's classes."""
    view = teacher.view
    if view is None or (view.dtype is None and view.classes is None):
        return []
    weight = next((p for p in student.module.parameters() if p.is_floating_point()), None)
    dtype = weight.dtype if weight is not None else torch.float32
    axis = teacher.facts[teacher.logits].channel_axis
    classes = {teacher.tap_name(teacher.logits): (1 if axis is None else axis, view.classes)} if view.classes else {}
    return [("deliver", partial(deliver, dtype=dtype, classes=classes))]


def _adapters(
    pairs: Sequence[Pair], model: TracedModel, other: TracedModel, *, side: Role, narrowed: bool, one_size: bool = False
) -> list[Pass]:
    """One pass for each pair whose features must be converted to a common shape."""
    passes: list[Pass] = []
    for pair in pairs:
        tap, partner = (pair.teacher, pair.student) if side == "teacher" else (pair.student, pair.teacher)
        layouts = layout_of(model.facts_of(tap)), layout_of(other.facts_of(partner))
        alike = layouts[0].form == layouts[1].form and not layouts[0].batch_axis
        if narrowed or not alike or (one_size and layouts[0].space != layouts[1].space):
            apply = partial(adapt, tap=tap, own=layouts[0], other=layouts[1], may_slice=narrowed and side == "student")
            passes.append((f"adapt {tap}", apply))
    return passes
