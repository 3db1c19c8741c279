"""`align`: match the layers of two traced models, and choose the teacher's channels for each pair."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.contract import PassResult, unchanged
from indistill_fx.passes.ensemble import align_members, is_ensemble, traced_members
from indistill_fx.passes.extract.view import view_between
from indistill_fx.passes.pairing.match import MatchReport, match, requested_pairs
from indistill_fx.passes.pruning.narrow import choose_channels
from indistill_fx.plan import AlignmentPlan, Layers, ModelStamp, Pair
from indistill_fx.system.arguments import require_options
from indistill_fx.traced import TracedModel


@dataclass(frozen=True, slots=True)
class ReusedAfter:
    """What a student of `reuse_classifier` says of itself: its `projector` makes the teacher's feature at this layer.

    Args:
        tap: of the teacher.
        shape: of a sample there.
    """

    tap: str
    shape: tuple[int, ...]


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
        example_inputs: a tensor, a tuple, or tensors by name; the first dimension is the batch.
        criterion: how channels are ranked: `l1`, `l2`, `geometric_median`, `bn_scale`, `random`, or by data `activation`, `taylor`.
        loader: batches, for criteria that need data.
        matching: options of the matching: `pairs` (how many), `every_block`, `taps`, `fixed` (pairs to keep: `[("layer1", "blocks.0"), …]`,
            the teacher's layer first), `similarity`, `required`.

    Returns:
        The plan; its pairs run from shallow to deep.

    Raises:
        ConfigError: an option is at fault, or `example_inputs` is missing.
        FrontendError: a model cannot be traced.
        MatchError: the models have no layers that can be paired.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> plan = ifx.align(DigitsTeacher(), DigitsStudent(), example_inputs=torch.randn(2, 1, 8, 8))
        >>> for pair in plan.pairs:
        ...     print(pair.teacher, pair.student, len(pair.kept), pair.reason)
        layer1 blocks.0 6 resolution
        layer2 blocks.1 12 resolution, depth
        layer3 blocks.2 24 resolution, depth, last
    """
    matching["fixed"] = requested_pairs(matching.get("fixed"))
    require_options(matching, match, of="align")
    teacher = replace(as_traced(teacher, example_inputs, role="teacher"), role="teacher")
    student = replace(as_traced(student, example_inputs, role="student"), role="student")  # as which errors name it
    if is_ensemble(teacher.module):
        chosen = [
            align_traced(member, student, criterion=criterion, loader=loader, **matching).value
            for member in traced_members(teacher)
        ]
        return align_members(teacher, student, chosen, required=matching.get("required", True))
    return align_traced(teacher, student, criterion=criterion, loader=loader, **matching).value


def align_traced(
    teacher: TracedModel, student: TracedModel, *, criterion: str = "l1", loader: Any = None, **matching: Any
) -> PassResult[AlignmentPlan, MatchReport]:
    """`align` for traced models, with the matcher's report: evidence and runners-up of every pair."""
    view, projected = view_between(teacher, student), _projected(teacher, student)
    if projected:
        matching["fixed"] = [*projected, *(matching.get("fixed") or ())]
    with unchanged(teacher, by="match"), unchanged(student, by="match"):
        found = match(teacher, student, **matching)
    chosen, last = found.value, found.report.embedding
    if projected:  # layers inside the projector cannot be paired
        named = {student.node(tap) for _, tap in matching["fixed"]}
        chosen = tuple(pair for pair in chosen if student.node(pair.student) in named)
    pairs = (*chosen, last) if last is not None else chosen
    widths = {pair.teacher: width for pair in pairs if (width := _narrower(pair, teacher, student)) is not None}
    with unchanged(teacher, by="choose_channels"):
        kept = choose_channels(teacher, widths, criterion=criterion, loader=loader)
    pairs = tuple(pair.model_copy(update={"kept": kept.get(pair.teacher)}) for pair in pairs)
    plan = AlignmentPlan(
        teacher=ModelStamp.of(teacher),
        student=ModelStamp.of(student),
        pairs=pairs[: len(chosen)],
        embedding=pairs[-1] if last is not None else None,
        unmatched=found.report.unmatched,
        layers=Layers(teacher=teacher.layers, student=student.layers),
        view=view,
    )
    return PassResult(plan, found.report)


def _projected(teacher: TracedModel, student: TracedModel) -> list[tuple[str, str]]:
    """The pair that is built into a student that reuses this teacher's classifier."""
    reused = getattr(student.module, "meta", {}).get("reuses")
    if not isinstance(reused, ReusedAfter) or reused.tap not in teacher.taps:
        return []
    return [(reused.tap, "projector")] if teacher.facts_of(reused.tap).shape[1:] == reused.shape else []


def _narrower(pair: Pair, teacher: TracedModel, student: TracedModel) -> int | None:
    """The student's width if it is below the teacher's; otherwise None, also for a penultimate vector without a channel axis."""
    facts = teacher.facts_of(pair.teacher), student.facts_of(pair.student)
    if any(layer_facts.channel_axis is None for layer_facts in facts):
        return None
    return facts[1].channels if facts[1].channels < facts[0].channels else None
