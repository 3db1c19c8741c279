"""The pipeline on one page: how the passes are put together, in the order of the lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from indistill_fx.errors import ConfigError
from indistill_fx.passes.adapt import adapt, layout_of
from indistill_fx.passes.dedupe import dedupe
from indistill_fx.passes.fold import fold
from indistill_fx.passes.fuse import fuse
from indistill_fx.passes.instrument import cut
from indistill_fx.passes.layout import lay_out
from indistill_fx.passes.lower import lower
from indistill_fx.passes.match import MatchReport, match
from indistill_fx.passes.narrow import choose_channels, narrow
from indistill_fx.passes.overwrite import overwrite
from indistill_fx.passes.sink import sink
from indistill_fx.passes.trace import trace
from indistill_fx.passes.verify import signature_of, untouched, verify
from indistill_fx.plan import AlignmentPlan, Layers, ModelStamp, Pair
from indistill_fx.result import PassResult
from indistill_fx.traced import Role, TracedModel


def as_traced(model: nn.Module | TracedModel, example_inputs: Any, *, role: Role) -> TracedModel:
    """The traced model; a plain module is traced with `example_inputs`.

    Raises:
        ConfigError: a plain module without example inputs.
    """
    if isinstance(model, TracedModel):
        return model
    if example_inputs is None:
        raise ConfigError(
            f"The {role} is a plain module, and there is no example input to trace it with.",
            where="example_inputs",
            hint=f"Give example_inputs=…, or {role}=ifx.trace({role}, example_inputs, role={role!r}).",
        )
    return trace(model, example_inputs, role=role)


def align(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    *,
    example_inputs: Any = None,
    criterion: str = "l1",
    loader: Any = None,
    **matching: Any,
) -> AlignmentPlan:
    """Pair the layers of teacher and student, and choose the teacher's channels for each pair.

    Args:
        teacher: traced, or a plain module (then `example_inputs` is needed).
        student: likewise.
        example_inputs: a tensor or tuple, batch first.
        criterion: how channels are ranked (see `passes.criteria`).
        loader: batches, for criteria that look at data.
        matching: options of `match`: pairs, every_block, taps, fixed, similarity.

    Returns:
        The plan, shallow to deep.

    Raises:
        MatchError: the models have nothing in common that could be paired.
    """
    teacher = as_traced(teacher, example_inputs, role="teacher")
    student = as_traced(student, example_inputs, role="student")
    return align_traced(teacher, student, criterion=criterion, loader=loader, **matching).value


def align_traced(
    teacher: TracedModel, student: TracedModel, *, criterion: str = "l1", loader: Any = None, **matching: Any
) -> PassResult[AlignmentPlan, MatchReport]:
    """`align` for traced models, with the matcher's report: evidence and runners-up of every pair."""
    with untouched(teacher, by="match"), untouched(student, by="match"):
        found = match(teacher, student, **matching)
    last = found.report.embedding
    pairs = (*found.value, last) if last is not None else found.value
    widths = {pair.teacher: width for pair in pairs if (width := _narrower(pair, teacher, student)) is not None}
    with untouched(teacher, by="choose_channels"):
        kept = choose_channels(teacher, widths, criterion=criterion, loader=loader)
    pairs = tuple(pair.model_copy(update={"kept": kept.get(pair.teacher)}) for pair in pairs)
    plan = AlignmentPlan(
        teacher=ModelStamp.of(teacher),
        student=ModelStamp.of(student),
        pairs=pairs[: len(found.value)],
        embedding=pairs[-1] if last is not None else None,
        unmatched=found.report.unmatched,
        layers=Layers(teacher=teacher.layers, student=student.layers),
    )
    return PassResult(plan, found.report)


def _narrower(pair: Pair, teacher: TracedModel, student: TracedModel) -> int | None:
    """The student's width where it is below the teacher's; None too where a penultimate vector has no channel axis."""
    facts = teacher.facts_of(pair.teacher), student.facts_of(pair.student)
    if any(one.channel_axis is None for one in facts):
        return None
    return facts[1].channels if facts[1].channels < facts[0].channels else None


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
    with untouched(teacher, by="cut"):
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
    with untouched(student, by="cut"):
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
    with untouched(teacher, by="narrow"):
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
