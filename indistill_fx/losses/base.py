"""What every distillation loss is made of: the values it reads, and the frame that adds the supervised loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.losses.task import Classification, Task
from indistill_fx.system.arguments import require

EMBEDDING = "<embedding>"
"""Key of the penultimate vector's shape in `student_shapes` and `teacher_shapes`; no tap can have this name."""


class Outputs(NamedTuple):
    """What one network delivers for one batch; the main losses compare two of these.

    Attributes:
        logits: what the model gives, (batch, classes) for a classifier; None if not requested.
        embedding: the penultimate vector (batch, ...); None if not requested.
        features: pair name -> feature, shallow to deep; the same keys for teacher and student.
        indices: (batch,) each sample's place in the training set, for losses with `needs_indices`.
    """

    logits: Tensor | None
    embedding: Tensor | None
    features: dict[str, Tensor]
    indices: Tensor | None = None


class Criterion(nn.Module):
    """What a stage minimises: (student `Outputs`, teacher `Outputs`, labels) → scalar. It says what it reads.

    Attributes:
        needs: which of the teacher's `logits`, `embedding`, `features` are read.
        needs_indices: whether batches must carry sample indices.
        needs_samples: whether its constructor takes `samples`, the size of the training set.
        weight_labels: of the supervised loss; 0: neither the labels nor, for their sake, the student's logits are read.
        one_size: whether it is given the features of a pair in one size, the larger map or sequence average-pooled; else as they are.
        ends_frozen: whether it is for students that end in frozen layers, which it does not train.
        unit: how large the loss typically is, in which the weight of what a `Curriculum` adds to it counts.
    """

    needs: frozenset[str] = frozenset()
    needs_indices: bool = False
    needs_samples: bool = False
    weight_labels: float = 1.0
    one_size: bool = False
    ends_frozen: bool = False
    unit: float = 1.0

    def at_step(self, step: int) -> None:
        """Take note that the next batch belongs to optimiser step number `step` (from 0) of the stage, for losses that change over time.

        The trainer says so before every batch. In a loop of your own that does not, each batch in train mode counts as a step.
        """

    @property
    def reads(self) -> Task | None:
        """The task whose labels it is given; None: labels may be anything."""
        return None

    @property
    def summary(self) -> str:
        """A text for the report at the end of the stage."""
        return ""


class MainLoss(Criterion):
    """`weight_labels` * the task's supervised loss + `weight` * the method's own term, in full precision even under autocast.

    A method gives `term` and says in class attributes what it reads, so that only those taps are compiled in. The
    student must deliver what `needs` names, and its logits wherever `weight_labels` is not 0. Gradients never reach the
    teacher.

    Attributes:
        needs_shapes: whether the constructor takes `student_shapes` and `teacher_shapes` (there are weights to train).
        needs_labels: whether it is nothing without labels, even where `weight_labels` is 0.
        by_class: whether the term takes a softmax over the outputs, so that the task's must be classes.
        task: what the labels mean; set by `main_loss`.
        over_time: (training step, factor of `weight`) in ascending order, and between them linearly; set by `vary`.
        seen: training steps so far, where the weight varies; see `Criterion.at_step`.

    Args:
        weight: of the method's term.
        weight_labels: of the supervised loss (cross-entropy, for classes).

    Raises:
        ConfigError: a weight is negative, or both are 0.
    """

    needs_shapes: bool = False
    needs_labels: bool = False
    by_class: bool = False
    task: Task = Classification()
    over_time: tuple[tuple[int, float], ...] = ()
    seen: Tensor

    def __init__(self, *, weight: float, weight_labels: float):
        super().__init__()
        for name, value in (("weight", weight), ("weight_labels", weight_labels)):
            require(value, float, name, of=type(self).__name__, hint="Give a number, 0 or more.")
        if not (0 <= weight < math.inf and 0 <= weight_labels < math.inf) or weight == weight_labels == 0:
            raise ConfigError(
                f"{type(self).__name__}: weight {weight} and weight_labels {weight_labels} leave nothing to minimise.",
                where="weight",
                got=(weight, weight_labels),
                expected="two finite numbers >= 0, not both 0",
            )
        self.weight, self.weight_labels = weight, weight_labels

    @property
    def reads(self) -> Task | None:
        """See `Criterion`."""
        return self.task

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The term of the method, unweighted; logits and labels are as the task prepares them."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None = None) -> Tensor:
        """The scalar to minimise."""
        anchor = next(
            value for value in (student.logits, student.embedding, *student.features.values()) if value is not None
        )
        with torch.autocast(anchor.device.type, enabled=False):
            student, teacher = _widened(student), _detached(_widened(teacher))
            teacher, _ = self._prepared(teacher, None)
            student, labels = self._prepared(student, labels)
            parts = []
            if self.weight:
                parts.append(self._weight_now() * self.term(student, teacher, labels))
            if self.weight_labels:
                loss = self.task.loss(required(student.logits, "student logits"), required(labels, "labels"))
                parts.append(self.weight_labels * loss)
            return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def vary(self, points: Sequence[tuple[int, float]]) -> None:
        """Let the term's weight change over the training steps, by factors of `weight`.

        Raises:
            ConfigError: no points, steps that do not rise from 0 or more, or a negative factor.
        """
        steps = [step for step, _ in points]
        fine = bool(points) and steps[0] >= 0 and all(a < b for a, b in pairwise(steps))
        if not fine or not self.weight or any(factor < 0 for _, factor in points):
            raise ConfigError(
                f"{type(self).__name__}: {list(points)} is not a schedule of weights.",
                where="main_weights",
                got=list(points),
                expected="steps in ascending order, each with a factor of 0 or more, for a loss that has a weight",
                hint="Write --main-weights 0:0,500:1 (from nothing to the whole weight over 500 steps).",
            )
        self.over_time = tuple((int(step), float(factor)) for step, factor in points)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def at_step(self, step: int) -> None:
        """See `Criterion`."""
        if self.over_time:
            self.seen.fill_(step)

    def _weight_now(self) -> float | Tensor:
        """The term's weight in this step; counts the step in train mode."""
        if not self.over_time:
            return self.weight
        step = self.seen.double()
        (before, factor), *rest = self.over_time
        now = torch.full_like(step, factor)
        for at, next_factor in rest:
            share = ((step - before) / (at - before)).clamp(0, 1)
            now = torch.where(step >= before, factor + (next_factor - factor) * share, now)
            before, factor = at, next_factor
        if self.training:
            self.seen += 1
        return self.weight * now.float()

    def _prepared(self, values: Outputs, labels: Tensor | None) -> tuple[Outputs, Tensor | None]:
        if values.logits is None:
            return values, labels if labels is None else self.task.read(labels)
        logits, labels = self.task.prepare(values.logits, labels)
        return values._replace(logits=logits), labels


def required(value: Tensor | None, name: str) -> Tensor:
    """The tensor itself; raises a ConfigError that names it if it is None."""
    if value is None:
        raise ConfigError(f"This loss reads the {name}, but got none.", where=name, expected="a tensor")
    return value


def require_pair(hint: str | None, names: Sequence[str]) -> None:
    """Refuse a `hint` that names none of the plan's pairs."""
    if hint not in names:
        raise ConfigError(f"hint {hint!r} is not a pair of the plan.", where="hint", hint=f"Pairs: {', '.join(names)}.")


def same_shape(student: Tensor, teacher: Tensor, name: str) -> None:
    """Refuse to compare tensors that differ in shape (broadcasting would do it silently)."""
    if student.shape != teacher.shape:
        raise ConfigError(
            f"{name} cannot compare the student's {tuple(student.shape)} with the teacher's {tuple(teacher.shape)}.",
            where=name,
            got=tuple(student.shape),
            expected=tuple(teacher.shape),
            hint="Narrow the teacher to the student's width, or take a loss that works across widths (at, pkt).",
        )


def widened(value: Tensor) -> Tensor:
    """The tensor in float32 at least."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _widened(values: Outputs) -> Outputs:
    return Outputs(
        None if values.logits is None else widened(values.logits),
        None if values.embedding is None else widened(values.embedding),
        {name: widened(value) for name, value in values.features.items()},
        values.indices,
    )


def _detached(values: Outputs) -> Outputs:
    return Outputs(
        None if values.logits is None else values.logits.detach(),
        None if values.embedding is None else values.embedding.detach(),
        {name: value.detach() for name, value in values.features.items()},
        values.indices,
    )


def unfit_shape(loss: str, verb: str, tensor: Tensor, expected: str, hint: str) -> ConfigError:
    """The error for a tensor with other axes than a loss compares: what the loss does and what it was given."""
    shape = tuple(tensor.shape)
    return ConfigError(f"{loss} {verb} {shape}.", where=loss, got=shape, expected=expected, hint=hint)


def positive_temperature(temperature: float) -> float:
    """The temperature; refused where it cannot divide logits."""
    if not temperature > 0:
        raise ConfigError(
            f"temperature is {temperature}; it divides the logits.",
            where="temperature",
            got=temperature,
            expected="> 0",
        )
    return temperature
