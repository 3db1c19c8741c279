"""Losses on features in the form of a main loss: a warm-up stage's, and what of the warm-up is kept in the main stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import Criterion, Outputs, required
from indistill_fx.losses.registry import warmup_loss
from indistill_fx.losses.task import Task
from indistill_fx.losses.warmup import WarmupLoss
from indistill_fx.plan import AlignmentPlan, Pair


class FeatureLoss(Criterion):
    """A loss on one pair of features, in the form of a main loss."""

    def __init__(self, loss: WarmupLoss, key: str):
        super().__init__()
        self.loss, self.key = loss, key
        self.needs, self.weight_labels = frozenset({"features"}), 0.0

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The loss of the pair's two features."""
        value: Tensor = self.loss(student.features[self.key], teacher.features[self.key])
        return value


class PairsLoss(Criterion):
    """The sum of a loss over several pairs, in the form of a main loss.

    Args:
        loss: of one pair.
        keys: of the pairs.
        relative: divide each pair's loss by what a student would have that always gives the teacher's mean feature, and take the mean
            over the pairs. Where pairs share weights, the one with the largest numbers would decide otherwise.

    Attributes:
        recent: each pair's loss, a moving mean over about fifty steps.
    """

    recent: Tensor

    def __init__(self, loss: WarmupLoss, keys: Sequence[str], *, relative: bool = False):
        super().__init__()
        self.loss, self.keys, self.relative = loss, tuple(keys), relative
        self.needs, self.weight_labels = frozenset({"features"}), 0.0
        self.register_buffer("recent", torch.full((len(self.keys),), torch.nan), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The sum, or the relative mean, over the pairs."""
        values = torch.stack([self._of_pair(student.features[key], teacher.features[key]) for key in self.keys])
        now = values.detach().to(self.recent.dtype)
        self.recent.copy_(torch.where(self.recent.isnan(), now, torch.lerp(self.recent, now, 0.02)))
        return values.mean() if self.relative else values.sum()

    def _of_pair(self, student: Tensor, teacher: Tensor) -> Tensor:
        value: Tensor = self.loss(student, teacher)
        if not self.relative:
            return value
        with torch.no_grad():
            constant: Tensor = self.loss(teacher.mean(0, keepdim=True).expand_as(teacher), teacher)
        # a batch of one has a constant of 0
        return value / torch.where(constant > 0, constant, torch.ones_like(constant))

    @property
    def summary(self) -> str:
        """The recent loss of every pair."""
        each = ", ".join(f"{key} {value:.3g}" for key, value in zip(self.keys, self.recent.tolist(), strict=True))
        return f"loss by pair: {each}" if self.relative else f"loss by segment: {each}"


class Kept(Criterion):
    """A main loss plus what is kept of the warm-up's, weighted.

    Args:
        main: the main loss.
        weight: of the loss that is kept.
        subject: what this loss compares, in words.
        needs: which outputs it reads.
    """

    def __init__(self, main: Criterion, weight: float, subject: str, needs: str):
        super().__init__()
        self.main, self.weight = main, weight
        self.needs, self.needs_indices = main.needs | {needs}, main.needs_indices
        self.weight_labels, self.unit = main.weight_labels, main.unit
        self.described = f"{weight:.3g} times the loss of {subject}"
        if isinstance(main, Kept):
            self.described = f"{main.described} and {self.described}"

    def at_step(self, step: int) -> None:
        """See `Criterion`."""
        self.main.at_step(step)

    @property
    def reads(self) -> Task | None:
        """See `Criterion`."""
        return self.main.reads

    def kept_loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The kept loss, unweighted."""
        raise NotImplementedError

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The weighted sum."""
        value: Tensor = self.main(student, teacher, labels) + self.weight * self.kept_loss(student, teacher)
        return value


class KeptFeatures(Kept):
    """A main loss plus the relative loss of the pairs' features, a mean over them.

    Args:
        main: the main loss; it must not read features itself.
        loss: of one pair.
        weight: of the mean.
        keys: of the pairs.
    """

    def __init__(self, main: Criterion, loss: WarmupLoss, weight: float, keys: Sequence[str]):
        super().__init__(main, weight, "the pairs' features", "features")
        self.pairs = PairsLoss(loss, keys, relative=True)

    def kept_loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """See the class."""
        value: Tensor = self.pairs(student, teacher, None)
        return value


class KeptVector(Kept):
    """A main loss plus the penultimate vectors' warm-up loss.

    Args:
        main: the main loss.
        loss: (student's vector, teacher's vector) → scalar.
        weight: of it.
        pair: the penultimate vectors; if `loss` wants equal widths, the teacher's kept channels are compared, and of a
            student that is wider than the teacher its first ones.
    """

    kept: Tensor | None

    def __init__(self, main: Criterion, loss: WarmupLoss, weight: float, pair: Pair):
        super().__init__(main, weight, "the penultimate vectors", "embedding")
        self.loss = loss
        kept = pair.kept if loss.needs_equal_widths else None
        self.register_buffer("kept", torch.tensor(kept) if kept is not None else None, persistent=False)
        self.equal = kept is None and loss.needs_equal_widths

    def kept_loss(self, student: Outputs, teacher: Outputs) -> Tensor:
        """See the class."""
        student_vector, teacher_vector = (
            required(side.embedding, "penultimate vector").flatten(1) for side in (student, teacher)
        )
        if self.kept is not None:
            teacher_vector = teacher_vector.index_select(1, self.kept)
        elif self.equal:
            student_vector = student_vector[:, : teacher_vector.shape[1]]
        value: Tensor = self.loss(student_vector, teacher_vector)
        return value


def keeping(criterion: Criterion, curriculum: Curriculum, plan: AlignmentPlan) -> Criterion:
    """The main loss with what the curriculum keeps in it.

    Raises:
        ConfigError: what is to be kept is not in the plan, or the main loss reads features itself.
    """
    unit = criterion.unit
    if curriculum.keep:
        criterion = _keeping_vectors(criterion, curriculum, plan)
    if not curriculum.keep_features:
        return criterion
    if "features" in criterion.needs or not plan.pairs:
        why = "the main loss compares features itself" if plan.pairs else "the plan has no pairs"
        raise ConfigError(
            f"The loss of the pairs' features cannot be kept in the main stage, because {why}.",
            where="keep_features",
            got=curriculum.keep_features,
            expected=0,
            hint="Leave keep_features (--keep-features) at 0.",
        )
    keys = curriculum.order([pair.student for pair in plan.pairs])
    return KeptFeatures(criterion, warmup_loss(curriculum.loss), curriculum.keep_features * unit, keys)


def _keeping_vectors(criterion: Criterion, curriculum: Curriculum, plan: AlignmentPlan) -> Kept:
    pair, loss = plan.embedding, warmup_loss(curriculum.loss)
    if pair is None:
        raise ConfigError(
            "The loss of the penultimate vectors cannot be kept in the main stage, because the plan has no such vectors.",
            where="keep",
            got=curriculum.keep,
            expected=0,
        )
    widths = [math.prod(shape[1:]) for shape in (pair.teacher_shape, pair.student_shape)]
    if loss.needs_equal_widths and pair.kept is None and widths[0] > widths[1]:
        raise ConfigError(
            f"The plan does not say which channels of the teacher's penultimate vector `{pair.teacher}` are kept.",
            where=pair.teacher,
            hint="An earlier version made this plan: make it again with `align`, or leave keep at 0.",
        )
    return KeptVector(criterion, loss, curriculum.keep * criterion.unit, pair)
