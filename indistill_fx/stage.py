"""A stage of training as one module: a batch in, a scalar loss out.

Any loop can train it, and DDP, FSDP and torch.compile take it as they take any module. Its student half calls the user's own layers,
so that training the stage trains the user's student; its teacher half is frozen and runs without autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.curriculum import Budget, Curriculum
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.losses import EMBEDDING, Outputs, main_loss, warmup_loss
from indistill_fx.passes.pipeline import align, as_traced, narrowed_teacher, student_half, teacher_half
from indistill_fx.passes.verify import signature_of
from indistill_fx.plan import AlignmentPlan, Pair
from indistill_fx.traced import TracedModel


class FeatureLoss(nn.Module):
    """A loss on one pair of features, in the form of a main loss."""

    def __init__(self, loss: nn.Module, key: str):
        super().__init__()
        self.loss, self.key = loss, key

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The loss of the pair's two features."""
        value: Tensor = self.loss(student.features[self.key], teacher.features[self.key])
        return value


class Stage(nn.Module):
    """One stage: teacher graph, student graph, loss.

    Args:
        name: `layer1` (the student's tap) or `main`.
        student: graph from the inputs to (features by tap name, None).
        teacher: the same for the teacher, frozen; None where the loss asks nothing of it.
        criterion: (student Outputs, teacher Outputs, labels) → scalar.
        pairs: the pairs whose features are compared; in `Outputs` they are keyed by the student's tap name.
        embedding: the pair of penultimate vectors, if the loss reads it.
        logits: the pair of main outputs, if the loss reads them: (teacher's tap or None, student's tap or None).
        budget: how long the curriculum trains it; None for the main stage.
    """

    def __init__(
        self,
        *,
        name: str,
        student: fx.GraphModule,
        teacher: fx.GraphModule | None,
        criterion: nn.Module,
        pairs: Sequence[Pair] = (),
        embedding: Pair | None = None,
        logits: tuple[str | None, str | None] = (None, None),
        budget: Budget | None = None,
    ):
        super().__init__()
        self.name, self.pairs, self.embedding, self.logits, self.budget = name, tuple(pairs), embedding, logits, budget
        self.student, self.teacher, self.criterion = student, teacher, criterion
        self._inputs = signature_of(student)

    def train(self, mode: bool = True) -> Stage:
        """Set the mode of the student's half and of the loss; the teacher stays in eval mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(False)
        return self

    def forward(self, batch: Any) -> Tensor:
        """The stage's loss.

        Args:
            batch: a tensor of inputs; a tuple or list of the model's inputs in order, then the labels, then the sample indices (the
                last two where the loss needs them); or a dict of inputs by name, with `labels` and `indices`.

        Returns:
            A scalar.

        Raises:
            TrainError: the batch is none of these.
            ConfigError: the labels or indices that the loss needs are missing.
        """
        inputs, labels, indices = self._split(batch)
        teacher = Outputs(None, None, {}, indices)
        if self.teacher is not None:
            with torch.no_grad():
                features, _ = self.teacher(*inputs)
            teacher = self._outputs(features, 0, indices)
        features, _ = self.student(*inputs)
        loss: Tensor = self.criterion(self._outputs(features, 1, indices), teacher, labels)
        return loss

    def _outputs(self, features: dict[str, Tensor], side: int, indices: Tensor | None) -> Outputs:
        logits, embedding = self.logits[side], self.embedding
        return Outputs(
            features[logits] if logits is not None else None,
            features[(embedding.teacher, embedding.student)[side]] if embedding is not None else None,
            {pair.student: features[(pair.teacher, pair.student)[side]] for pair in self.pairs},
            indices,
        )

    def _split(self, batch: Any) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
        count = len(self._inputs)
        if isinstance(batch, Tensor) and count == 1:
            return (batch,), None, None
        if isinstance(batch, Mapping) and all(name in batch for name in self._inputs):
            return tuple(batch[name] for name in self._inputs), batch.get("labels"), batch.get("indices")
        if (
            isinstance(batch, (tuple, list))
            and len(batch) >= count
            and all(isinstance(entry, Tensor) for entry in batch)
        ):
            rest = (*batch[count:], None, None)
            return tuple(batch[:count]), rest[0], rest[1]
        raise TrainError(
            f"Stage `{self.name}` got a batch it cannot read: {_describe(batch)}.",
            where=self.name,
            got=type(batch).__name__,
            expected=f"inputs {', '.join(self._inputs)}, then labels",
            hint=f"Let the loader yield a tuple of tensors ({', '.join(self._inputs)}, labels) or a dict with these names.",
        )


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(type(entry).__name__ for entry in batch)}"
    return f"a {type(batch).__name__}"


def compile_stages(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    plan: AlignmentPlan | None = None,
    *,
    curriculum: Curriculum | None = None,
    main: str | Callable[..., Tensor] | None = "kd",
    main_options: Mapping[str, Any] | None = None,
    example_inputs: Any = None,
) -> list[Stage]:
    """Compile teacher and student into the stages of training: one per pair, shallow to deep, then the main stage.

    Every stage's graphs end at what its loss reads; nothing behind is computed or held. In the warm-up the teacher is narrowed to the
    student's widths (unless the loss works across widths).

    Args:
        teacher: traced, or a plain module with `example_inputs`.
        student: likewise. Its own layers and parameters are in the stages.
        plan: the pairs; made by `align` if None.
        curriculum: lengths and loss of the warm-up.
        main: the main loss: a name, `file.py:loss`, a function or module (student, teacher, labels) → scalar; None: warm-up only.
        main_options: keyword arguments of the main loss.
        example_inputs: for plain modules.

    Raises:
        ConfigError: the plan does not fit, an unknown loss, or a stage without trainable parameters.
    """
    teacher = as_traced(teacher, example_inputs, role="teacher")
    student = as_traced(student, example_inputs, role="student")
    plan = align(teacher, student) if plan is None else plan
    plan.check(teacher, student)
    curriculum = curriculum or Curriculum()
    stages = _warmup_stages(teacher, student, plan, curriculum)
    if main is not None:
        stages.append(_main_stage(teacher, student, plan, main, main_options or {}))
    for stage in stages:
        if not any(parameter.requires_grad for parameter in stage.student.parameters()):
            raise ConfigError(
                f"Stage `{stage.name}` has nothing to train: no parameter of the student up to there requires a gradient.",
                where=stage.name,
                hint="Choose a deeper layer for the pair, or unfreeze the student.",
            )
    return stages


def _warmup_stages(
    teacher: TracedModel, student: TracedModel, plan: AlignmentPlan, curriculum: Curriculum
) -> list[Stage]:
    budgets = curriculum.chosen([pair.student for pair in plan.pairs])
    if not budgets:
        return []
    loss = warmup_loss(curriculum.loss)
    narrowed = bool(getattr(loss, "needs_equal_widths", True))
    slim = narrowed_teacher(teacher, plan) if narrowed else teacher
    pairs = {pair.student: pair for pair in plan.pairs}
    return [
        Stage(
            name=layer,
            student=student_half(student, slim, [pairs[layer]], [], narrowed=narrowed),
            teacher=teacher_half(slim, student, [pairs[layer]], [], narrowed=narrowed),
            criterion=FeatureLoss(warmup_loss(curriculum.loss), layer),
            pairs=[pairs[layer]],
            budget=budget,
        )
        for layer, budget in budgets.items()
    ]


def _main_stage(
    teacher: TracedModel,
    student: TracedModel,
    plan: AlignmentPlan,
    main: str | Callable[..., Tensor],
    options: Mapping[str, Any],
) -> Stage:
    shapes = [{pair.student: getattr(pair, f"{role}_shape") for pair in plan.pairs} for role in ("student", "teacher")]
    if plan.embedding is not None:
        for role, known in zip(("student", "teacher"), shapes, strict=True):
            known[EMBEDDING] = getattr(plan.embedding, f"{role}_shape")
    criterion = main_loss(main, student_shapes=shapes[0], teacher_shapes=shapes[1], **options)
    needs: frozenset[str] = criterion.needs  # type: ignore[assignment]
    if "embedding" in needs and plan.embedding is None:
        raise ConfigError(
            "The main loss compares penultimate vectors, and the plan has none.",
            where="embedding",
            hint="Take `kd`, which reads logits only.",
        )
    pairs = plan.pairs if "features" in needs else ()
    embedding = plan.embedding if "embedding" in needs else None
    teacher_logits = teacher.tap_name(teacher.logits) if "logits" in needs else None
    wants_labels = getattr(criterion, "weight_labels", 1)
    student_logits = student.tap_name(student.logits) if "logits" in needs or wants_labels else None
    teacher_taps = [tap for tap in (embedding and embedding.teacher, teacher_logits) if tap]
    student_taps = [tap for tap in (embedding and embedding.student, student_logits) if tap]
    return Stage(
        name="main",
        student=student_half(student, teacher, pairs, student_taps, narrowed=False),
        teacher=teacher_half(teacher, student, pairs, teacher_taps, narrowed=False) if needs else None,
        criterion=criterion,
        pairs=pairs,
        embedding=embedding,
        logits=(teacher_logits, student_logits),
    )
