"""The pipeline on one page: how a stage's two halves are made, in the order of the lines."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from indistill_fx.passes.contract import signature_of, unchanged, verify
from indistill_fx.passes.extract.adapt import adapt, layout_of
from indistill_fx.passes.extract.dedupe import dedupe
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.channels_last import lay_out
from indistill_fx.passes.lowering.fused_conv import fuse
from indistill_fx.passes.lowering.inplace_relu import overwrite
from indistill_fx.passes.lowering.max_pool import lower, sink
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.traced import Role, TracedModel


def teacher_half(
    teacher: TracedModel, student: TracedModel, pairs: Sequence[Pair], taps: Sequence[str], *, narrowed: bool
) -> fx.GraphModule:
    """The teacher's part of a stage: cut at its taps, folded, frozen.

    Args:
        teacher: traced; narrowed already if `narrowed`.
        student: traced, for the shapes on the other side.
        pairs: the pairs whose features are compared.
        taps: further taps (logits, penultimate vector), delivered as they are.
        narrowed: whether the widths of the pairs have been made equal.
    """
    signature = signature_of(teacher.graph_module)
    with unchanged(teacher, by="cut"):
        graph = cut(teacher, [*dict.fromkeys((*(pair.teacher for pair in pairs), *taps))])
        verify(graph, after="cut", signature=signature)
        graph = dedupe(graph)
        verify(graph, after="dedupe", signature=signature)
        for pair in pairs:
            _adapt(graph, pair, teacher, student, side="teacher", narrowed=narrowed)
            verify(graph, after="adapt", signature=signature)
        graph = fold(graph).value
        verify(graph, after="fold", signature=signature)
        lower(graph)
        verify(graph, after="lower", signature=signature)
        fuse(graph, teacher.facts)
        verify(graph, after="fuse", signature=signature)
    return graph


def student_half(
    student: TracedModel, teacher: TracedModel, pairs: Sequence[Pair], taps: Sequence[str], *, narrowed: bool
) -> fx.GraphModule:
    """The student's part of a stage: cut at its taps; it calls the user's own layers."""
    signature = signature_of(student.graph_module)
    with unchanged(student, by="cut"):
        graph = cut(student, [*dict.fromkeys((*(pair.student for pair in pairs), *taps))])
        verify(graph, after="cut", signature=signature)
        for pair in pairs:
            _adapt(graph, pair, student, teacher, side="student", narrowed=narrowed)
            verify(graph, after="adapt", signature=signature)
        sink(graph)
        verify(graph, after="sink", signature=signature)
        lower(graph)
        verify(graph, after="lower", signature=signature)
        lay_out(graph)
        verify(graph, after="lay_out", signature=signature)
        overwrite(graph)
        verify(graph, after="overwrite", signature=signature)
    return graph


def narrowed_teacher(teacher: TracedModel, plan: AlignmentPlan) -> TracedModel:
    """The teacher with student-wide taps, as the plan says."""
    with unchanged(teacher, by="narrow"):
        slim = narrow(teacher, plan).value
    verify(slim.graph_module, after="narrow", signature=signature_of(teacher.graph_module))
    return slim


def _adapt(
    graph: fx.GraphModule, pair: Pair, own: TracedModel, other: TracedModel, *, side: Role, narrowed: bool
) -> None:
    tap, partner = (pair.teacher, pair.student) if side == "teacher" else (pair.student, pair.teacher)
    layouts = layout_of(own.facts_of(tap)), layout_of(other.facts_of(partner))
    alike = (layouts[0].kind, layouts[0].channels_first) == (layouts[1].kind, layouts[1].channels_first)
    if narrowed or not alike:
        adapt(graph, tap, *layouts, may_slice=narrowed and side == "student")
