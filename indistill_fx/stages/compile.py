"""From two traced models and a plan to the stages of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.curriculum import PAIRS, SEGMENTS, Budget, Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.graph.edit import depends_on_input, output_node
from indistill_fx.graph.module_state import device_of, real_dtype
from indistill_fx.losses.base import EMBEDDING, Criterion
from indistill_fx.losses.choose_task import task_of
from indistill_fx.losses.registry import main_loss, warmup_loss
from indistill_fx.losses.stage_losses import FeatureLoss, PairsLoss, keeping
from indistill_fx.losses.task import Task
from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.contract import PassRecord
from indistill_fx.passes.extract.feed import fed_name
from indistill_fx.passes.extract.view import view_between
from indistill_fx.passes.lowering.table import Lowerings, lowerings_for
from indistill_fx.passes.pipeline import (
    Half,
    HalfOptions,
    fed_student_half,
    narrowed_teacher,
    student_half,
    teacher_half,
)
from indistill_fx.passes.reuse import require_same_classifier
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.stages.checks import require_classes, require_frozen_end, require_one_output
from indistill_fx.stages.moving_teacher import Watch
from indistill_fx.stages.stage import Stage, StageReport
from indistill_fx.target import Target
from indistill_fx.traced import TracedModel

_FROZEN = "no parameter of the student up to there requires a gradient"


@dataclass(frozen=True, slots=True)
class _Given:
    """What all stages are made from; `slim` and `before` in the functions below: the teacher as narrowed for some, and how."""

    teacher: TracedModel
    student: TracedModel
    plan: AlignmentPlan
    curriculum: Curriculum
    lowerings: Lowerings
    watch: Watch


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=3)


def compile_stages(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    plan: AlignmentPlan | None = None,
    *,
    curriculum: Curriculum | None = None,
    main: str | Callable[..., Tensor] | None = "kd",
    main_options: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
    target: Target | None = None,
    lowerings: Lowerings | None = None,
    say: Callable[[str], None] = _warn,
    task: str | Task | None = None,
) -> list[Stage]:
    """Compile teacher and student into the stages of training: one per pair, shallow to deep, then the main stage.

    Each stage's graphs end at what its loss reads; nothing after it is computed or kept in memory. In the warm-up the teacher is narrowed
    to the student's widths (unless the loss works across widths). A pair up to which the student is frozen gets no stage, with a warning.

    If the teacher changes afterwards (a moving average of the student), the main stage follows it, as do warm-up stages of the teacher's
    widths; a stage for which the teacher was narrowed refuses its next step. What torch.compile has compiled does not notice.

    Args:
        teacher: traced, or a plain module with `example_inputs`.
        student: likewise. Its own layers and parameters are in the stages.
        plan: the pairs; None: made by `align`.
        curriculum: lengths and loss of the warm-up.
        main: the main loss: a name, `file.py:loss`, a function or module (student, teacher, labels) → scalar; None: warm-up only.
        main_options: keyword arguments of the main loss.
        example_inputs: for plain modules; the first dimension is the batch.
        target: what the stages are lowered for; None: eager, on the student's device.
        lowerings: which rewrites for speed run, instead of the target's own (`passes.lowering.table`); for measuring them.
        say: called with a line about every stage that is left out; by default a Python warning.
        task: what the labels mean: a name, `file.py:task` or a `Task`; None: classification. Labels that are not of the task are
            refused: on a CPU those of any batch, elsewhere those of the first; not under `torch.compile`, nor for losses of your own.

    Returns:
        The stages in the order of training. Each is a module: batch → loss, a scalar.

    Raises:
        ConfigError: the plan does not fit, the loss is unknown, or nothing in the student can be trained.
        MatchError: no `plan` is given, and no layers can be paired.
        FrontendError: a plain module cannot be traced.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> x, labels = torch.randn(4, 1, 8, 8), torch.tensor([3, 1, 4, 1])
        >>> student = DigitsStudent()
        >>> stages = ifx.compile_stages(DigitsTeacher(), student, example_inputs=x)
        >>> for stage in stages:
        ...     stage([x, labels]).backward()
        >>> [stage.name for stage in stages]
        ['blocks.0', 'blocks.1', 'blocks.2', 'main']
    """
    target = target or Target.of(student.module if isinstance(student, TracedModel) else student)
    lowerings = lowerings_for(target) if lowerings is None else replace(lowerings, dtype=target.dtype)
    teacher = as_traced(teacher, example_inputs, role="teacher")
    student = as_traced(student, example_inputs, role="student")
    curriculum = curriculum or Curriculum()
    plan = align(teacher, student, required=curriculum.wants_pairs) if plan is None else plan
    plan.check(teacher, student)
    teacher = seeing(teacher, student, plan)
    given = _Given(teacher, student, plan, curriculum, lowerings, Watch(teacher.module))
    warm = _warmup_stages(given)
    stages = [stage for stage in warm if _trains(stage)]
    if main is not None:
        options = {**(main_options or {}), "task": task_of(task) if task is not None else None}
        stages.append(_main_stage(given, main, options))
    for stage in stages or warm:
        _check_halves(stage)
        stage.criterion.to(device_of(student.graph_module))
    for stage in warm:
        if stage not in stages:
            say(f"{stage.name}: left out, {_FROZEN}")
    return stages


def _check_classes(student: TracedModel, criterion: Criterion, *, named: bool) -> None:
    """Without labels, which would be refused, an unnamed task compares classes in the second axis."""
    if not named and not criterion.weight_labels and criterion.reads and "logits" in criterion.needs:
        require_classes(student)


def _trains(stage: Stage) -> bool:
    return any(parameter.requires_grad for parameter in stage.student.parameters())


def seeing(teacher: TracedModel, student: TracedModel, plan: AlignmentPlan) -> TracedModel:
    """The teacher with its view of the student's batches: as the plan says, else as the inputs differ that the two were traced with."""
    view = view_between(teacher, student, plan.view)
    fixed = teacher.report.fixed
    if view is not None and view.size is not None:  # the view resizes images to this size
        fixed = {name: sizes for name, sizes in fixed.items() if len(sizes) != 4}
    if view is not None and view.channels is not None:
        fixed = {name: (sizes[0], None, *sizes[2:]) if len(sizes) == 4 else sizes for name, sizes in fixed.items()}
    return replace(teacher, view=view, report=replace(teacher.report, fixed=fixed))


def _check_halves(stage: Stage) -> None:
    """Refuse a stage whose student half has nothing to train, or whose teacher half gives nothing to learn from."""
    if not _trains(stage):
        raise ConfigError(
            f"Stage `{stage.name}` has nothing to train: {_FROZEN}.",
            where=stage.name,
            hint="Choose a deeper layer for the pair, or unfreeze the student.",
        )
    for role, half in (("teacher", stage.teacher), ("student", stage.student)):
        features: Any = output_node(half.graph).args[0][0] if half is not None else {"": None}  # type: ignore[index]
        bare = [tap for tap, node in features.items() if node is not None and not depends_on_input(node)]
        if bare or not features:
            which = f"`{bare[0]}` is not computed from the input" if bare else "none of its tensors is compared"
            raise ConfigError(
                f"Stage `{stage.name}` has no tap in the {role}: {which}.",
                where=stage.name,
                hint="Name a layer for the pair; `indistill-fx inspect` lists them.",
            )


def warmup_plan(plan: AlignmentPlan, curriculum: Curriculum) -> tuple[AlignmentPlan, dict[str, Budget]]:
    """The plan with all pairs that the curriculum may warm up, and how long each of those it does, by the student's tap."""
    layers = [pair.student for pair in plan.pairs]
    extended = plan.with_penultimate() if curriculum.penultimate else plan
    last = extended.pairs[-1].student if extended is not plan else None
    return extended, curriculum.chosen(layers, last)


def _warmup_stages(given: _Given) -> list[Stage]:
    student, curriculum = given.student, given.curriculum
    plan, budgets = warmup_plan(given.plan, curriculum)
    if not budgets:
        return []
    narrowed = warmup_loss(curriculum.loss).needs_equal_widths
    slim, before = _slim(given.teacher, plan, narrowed=narrowed)
    pairs = {pair.student: pair for pair in plan.pairs}
    embedding = plan.pairs[-1].student if plan is not given.plan else None
    stages = []
    for layer, budget in budgets.items():
        chosen = set(curriculum.order(list(pairs)))
        together = [pair for tap, pair in pairs.items() if tap in chosen and tap != embedding]
        if layer == SEGMENTS:
            stages.append(_fed_stage(given, slim, together, budget, before))
            continue
        learned = together if layer == PAIRS else [pairs[layer]]
        pair_loss = warmup_loss(curriculum.loss)
        keys = [pair.student for pair in learned]
        both = HalfOptions(given.lowerings, narrowed)
        make = partial(teacher_half, slim, student, learned, [], both)
        other = student_half(student, slim, learned, [], both)
        criterion = PairsLoss(pair_loss, keys, relative=True) if layer == PAIRS else FeatureLoss(pair_loss, layer)
        about = {"criterion": criterion, "pairs": learned, "budget": budget}
        stages.append(_stage(given, layer, slim, (make, other), before=before, **about))
    return stages


def _slim(teacher: TracedModel, plan: AlignmentPlan, *, narrowed: bool) -> tuple[TracedModel, tuple[PassRecord, ...]]:
    """The teacher, with the student's widths if `narrowed`, and what was done for that."""
    if not narrowed:
        return teacher, ()
    result = narrowed_teacher(teacher, plan)
    return result.value, (result.report,)


def _stage(
    given: _Given,
    name: str,
    slim: TracedModel,
    halves: tuple[Callable[[], Half] | None, Half],
    *,
    before: Sequence[PassRecord] = (),
    **more: Any,
) -> Stage:
    """A stage from what makes its teacher's half of `slim`, if it has one, and the student's half; `more` are arguments of `Stage`."""
    (make, student_side), student = halves, given.student
    half = make() if make is not None else None
    graph, report = (half.value, half.report) if half is not None else (None, ())
    if make is not None and graph is not None:
        graph.register_forward_pre_hook(given.watch.hook(slim, make))
    return Stage(
        name=name,
        student=student_side.value,
        teacher=graph,
        dtypes=_dtypes(student),
        fixed=(student.report.fixed, slim.report.fixed),
        macs=(_macs(slim, graph), _macs(student, student_side.value)),
        report=StageReport((*before, *report), student_side.report),
        **more,
    )


def _fed_stage(
    given: _Given, slim: TracedModel, pairs: Sequence[Pair], budget: Budget, before: Sequence[PassRecord]
) -> Stage:
    """All segments in one stage: each gets one narrowed feature of the teacher as input and the next one as target."""
    student, loss = given.student, warmup_loss(given.curriculum.loss)
    if not loss.needs_equal_widths:
        raise ConfigError(
            f"The loss `{given.curriculum.loss}` keeps all of the teacher's channels, so its features cannot feed the student.",
            where="feed",
            hint="Take mse or cosine, or feed='student'.",
        )
    make = partial(teacher_half, slim, student, pairs, [], HalfOptions(given.lowerings, narrowed=True))
    other = fed_student_half(student, slim, pairs, lowerings=given.lowerings)
    return _stage(
        given,
        SEGMENTS,
        slim,
        (make, other),
        before=before,
        criterion=PairsLoss(loss, [pair.student for pair in pairs]),
        pairs=pairs,
        budget=budget,
        fed={fed_name(number): pair.teacher for number, pair in enumerate(pairs[:-1])},
    )


def joint_teachers(
    teacher: TracedModel, student: TracedModel, plan: AlignmentPlan, stages: Sequence[Stage], target: Target
) -> list[tuple[list[Stage], fx.GraphModule]]:
    """Graphs of the teacher that compute the features of several stages in one forward pass.

    Args:
        teacher: the one that the stages were compiled from.
        student: likewise.
        plan: likewise, with the pairs of the warm-up (see `warmup_plan`).
        stages: some of `compile_stages`, each with a teacher.
        target: likewise.

    Returns:
        (stages, graph) for each graph; its features are named as in the stages. All warm-up stages share one, and so does a main
        stage that reads none of their taps but logits and the penultimate vector.
    """
    teacher = seeing(teacher, student, plan)
    warm = [stage for stage in stages if stage.budget is not None]
    pairs = [pair for stage in warm for pair in stage.pairs]
    narrow = {teacher.node(pair.teacher) for pair in pairs}
    alone = [
        s for s in stages if s.budget is None and (s.pairs or not narrow.isdisjoint(map(teacher.node, s.teacher_taps)))
    ]
    shared = [stage for stage in stages if stage not in alone]
    bare = [tap for stage in shared if stage.budget is None for tap in stage.teacher_taps]
    if len(shared) < 2:
        return [([stage], stage.teacher) for stage in stages if stage.teacher is not None]
    losses = [stage.criterion.loss for stage in warm if isinstance(stage.criterion, FeatureLoss | PairsLoss)]
    narrowed = any(loss.needs_equal_widths for loss in losses)  # the teacher is narrowed for all losses or for none
    slim = narrowed_teacher(teacher, plan).value if narrowed else teacher
    graph = teacher_half(slim, student, pairs, bare, HalfOptions(lowerings_for(target), narrowed)).value
    return [(shared, graph), *(([stage], stage.teacher) for stage in alone if stage.teacher is not None)]


def _macs(traced: TracedModel, half: fx.GraphModule | None) -> int:
    """Multiply-accumulates of one sample in a half: of those layers of the traced model that are left in it."""
    nodes = half.graph.nodes if half is not None else ()
    return sum(traced.facts[node.name].macs for node in nodes if node.name in traced.facts)


def _dtypes(student: TracedModel) -> dict[str, torch.dtype]:
    """The inputs' dtypes, except for inputs that the student converts itself."""
    student_dtype = real_dtype(student.module)
    inputs = student.graph_module.graph.find_nodes(op="placeholder")
    found = {str(n.target): student.facts[n.name].dtype for n in inputs if n.name in student.facts}
    return {name: dtype for name, dtype in found.items() if not dtype.is_floating_point or dtype == student_dtype}


def _main_stage(given: _Given, main: str | Callable[..., Tensor], options: Mapping[str, Any]) -> Stage:
    teacher, student, plan, curriculum = given.teacher, given.student, given.plan, given.curriculum
    shapes = [{pair.student: getattr(pair, f"{role}_shape") for pair in plan.pairs} for role in ("student", "teacher")]
    if plan.embedding is not None:
        for role, known in zip(("student", "teacher"), shapes, strict=True):
            known[EMBEDDING] = getattr(plan.embedding, f"{role}_shape")
    criterion = main_loss(main, student_shapes=shapes[0], teacher_shapes=shapes[1], **options)
    _check_classes(student, criterion, named=options["task"] is not None)
    if "embedding" in criterion.needs and plan.embedding is None:
        raise ConfigError(
            "The main loss compares penultimate vectors, but the plan has none.",
            where="embedding",
            hint="Take `kd`, which reads logits only.",
        )
    if "features" in criterion.needs and not plan.pairs:
        raise ConfigError(
            "The main loss compares the features of pairs, but no layers of the two models can be paired.",
            where="main",
            hint="Name a pair (--pair TEACHER_LAYER=STUDENT_LAYER), or take `kd`, which reads logits only.",
        )
    one_size, ends_frozen = criterion.one_size, criterion.ends_frozen and not criterion.weight_labels
    criterion = keeping(criterion, curriculum, plan)
    narrowed = bool(curriculum.keep_features) and warmup_loss(curriculum.loss).needs_equal_widths
    slim, before = _slim(teacher, plan, narrowed=narrowed)
    needs = criterion.needs
    pairs = plan.pairs if "features" in needs else ()
    embedding = plan.embedding if "embedding" in needs else None
    teacher_logits = _logits(teacher, read="logits" in needs)
    student_logits = _logits(student, read="logits" in needs or bool(criterion.weight_labels))
    teacher_taps = [tap for tap in (embedding and embedding.teacher, teacher_logits) if tap]
    student_taps = [tap for tap in (embedding and embedding.student, student_logits) if tap]
    if narrowed:
        unequal = [p for p in pairs if slim.facts_of(p.teacher).shape[1:] != student.facts_of(p.student).shape[1:]]
        _require_apart(teacher, [pair.teacher for pair in pairs], teacher_taps)
        _require_apart(student, [pair.student for pair in unequal], student_taps)
    both = HalfOptions(given.lowerings, narrowed, one_size)
    make = partial(teacher_half, slim, student, pairs, teacher_taps, both) if needs else None
    other = student_half(student, slim, pairs, student_taps, both)
    if ends_frozen:
        require_frozen_end(student.module, other.value, pairs[-1].student)
        require_same_classifier(teacher, student)
    return _stage(
        given,
        "main",
        slim,
        (make, other),
        before=before,
        criterion=criterion,
        pairs=pairs,
        embedding=embedding,
        logits=(teacher_logits, student_logits),
    )


def _logits(model: TracedModel, *, read: bool) -> str | None:
    """The tap of the logits, if the loss reads them."""
    if not read:
        return None
    require_one_output(model)
    return model.tap_name(model.logits)


def _require_apart(model: TracedModel, cut: Sequence[str], taps: Sequence[str]) -> None:
    """Refuse a main loss that reads a pair's tensor: it needs the whole tensor, but only the compared channels are kept."""
    tapped = {model.node(tap) for tap in taps}
    if shared := [tap for tap in cut if model.node(tap) in tapped]:
        raise ConfigError(
            f"The main loss reads all channels of the {model.role}'s `{min(shared)}`, of which the pair that is kept compares only some.",
            where="keep_features",
            hint="Leave keep_features at 0, or leave that pair out of the plan.",
        )
