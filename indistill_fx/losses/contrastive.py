"""The contrastive loss: crd."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import EMBEDDING, MainLoss, Outputs, positive_temperature, required
from indistill_fx.losses.positions import as_classes


class CRDLoss(MainLoss):
    """Contrastive representation distillation with a memory bank, both anchor directions added.

    s, t: linear projections to `width` of the penultimate vectors, L2-normalised; m_s, m_t: their running means per
    sample of the training set (the bank). For anchor s: the positive is m_t of the same sample, the negatives m_t of K
    samples of other classes. P = exp(s . m / T) / Z, c = K / N, e = 1e-7:
    L = -(1/B) [sum log(P+ / (P+ + c + e)) + sum over negatives log(c / (P- + c + e))]. The same for anchor t over m_s.
    Z is fixed at the first training batch: N * the mean of that batch's exp(...). Only training steps update bank and
    Z.

    Args:
        student_shapes: its `EMBEDDING` entry is the shape of the student's penultimate vector.
        teacher_shapes: likewise.
        samples: N, the size of the training set; batches carry indices below it (`Outputs.indices` of the student).
        negatives: K drawn per step.
        width: of the projections.
        temperature: T.
        momentum: of the bank.
        weight: of the term.
        weight_labels: of the cross-entropy.

    Raises:
        ConfigError: a shape is absent.

    Source:
        Tian, Krishnan, Isola, "Contrastive Representation Distillation", arXiv:1910.10699; RepDistiller's numbers.
        Deviations: one set of K samples is drawn for the whole batch (a matrix product instead of B * K gathered vectors),
        with replacement; those of an anchor's own class are left out for that anchor, and its c counts the rest, so
        an anchor has about K * (1 - 1/classes) negatives; classes are known once a sample has been seen, before that
        only the sample itself is left out, as for samples labelled -100 and where labels are not one class a sample;
        probabilities count as their largest class. Under DDP each process keeps its own bank (`broadcast_buffers=False`).
    """

    needs: frozenset[str] = frozenset({"embedding"})
    needs_indices: bool = True
    needs_samples: bool = True
    needs_shapes: bool = True
    bank_student: Tensor
    bank_teacher: Tensor
    bank_labels: Tensor
    scales: Tensor

    def __init__(
        self,
        student_shapes: Mapping[str, tuple[int, ...]],
        teacher_shapes: Mapping[str, tuple[int, ...]],
        *,
        samples: int,
        negatives: int = 16384,
        width: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        weight: float = 0.8,
        weight_labels: float = 1.0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.samples, self.negatives = samples, negatives
        self.temperature, self.momentum = positive_temperature(temperature), momentum
        self.project_student = nn.Linear(_embedding_width(student_shapes, "student"), width)
        self.project_teacher = nn.Linear(_embedding_width(teacher_shapes, "teacher"), width)
        bound = 1 / math.sqrt(width / 3)
        self.register_buffer("bank_student", torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("bank_teacher", torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("bank_labels", torch.full((samples,), -1))
        self.register_buffer("scales", torch.full((2,), -1.0))

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        index = required(student.indices, "sample indices")
        classes = self._classes(labels, index)
        s = F.normalize(self.project_student(required(student.embedding, "student embedding").flatten(1)), dim=1)
        t = F.normalize(self.project_teacher(required(teacher.embedding, "teacher embedding").flatten(1)), dim=1)
        drawn = torch.randint(self.samples, (self.negatives,), device=index.device)
        alike = (self.bank_labels[drawn] == classes[:, None]) & (classes[:, None] >= 0)
        other = ~alike & (drawn != index[:, None])
        over_teacher = self._contrast(s, self.bank_teacher, index, drawn, other, 0)
        over_student = self._contrast(t, self.bank_student, index, drawn, other, 1)
        if self.training:
            self._remember(index, s, t, classes)
        return over_teacher + over_student

    def _classes(self, labels: Tensor | None, index: Tensor) -> Tensor:
        """The class of each sample, (batch,); -1: none."""
        if labels is not None and self.task.by_class and labels.ndim == 2 and labels.is_floating_point():
            labels = as_classes(labels)
        if labels is None or not self.task.by_class or labels.ndim != 1 or labels.is_floating_point():
            return torch.full_like(index, -1)
        return labels.clamp(min=-1)

    def _contrast(self, anchor: Tensor, bank: Tensor, index: Tensor, drawn: Tensor, other: Tensor, side: int) -> Tensor:
        positive = ((anchor * bank[index]).sum(1) / self.temperature).exp()
        negative = (anchor @ bank[drawn].T / self.temperature).exp()
        count = other.sum(1)
        mean = (positive.sum() + (negative * other).sum()) / (count + 1).sum()
        scale = torch.where(self.scales[side] < 0, mean.detach() * self.samples, self.scales[side])
        if self.training:
            with torch.no_grad():
                self.scales[side] = scale
        noise = (count / self.samples).to(positive)
        positive, negative, noise = positive / scale, negative / scale, noise[:, None]
        hit = (positive / (positive + noise[:, 0] + 1e-7)).log()
        miss = (noise / (negative + noise + 1e-7)).clamp(min=1e-30).log()
        return -(hit.sum() + (miss * other).sum()) / len(anchor)

    @torch.no_grad()
    def _remember(self, index: Tensor, s: Tensor, t: Tensor, classes: Tensor) -> None:
        for bank, new in ((self.bank_student, s), (self.bank_teacher, t)):
            bank[index] = F.normalize(self.momentum * bank[index] + (1 - self.momentum) * new, dim=1)
        self.bank_labels[index] = classes


def _embedding_width(shapes: Mapping[str, tuple[int, ...]], whose: str) -> int:
    if EMBEDDING not in shapes:
        raise ConfigError(
            f"crd projects the {whose}'s penultimate vector, but its shape was not given.",
            where="crd",
            expected=f"{whose}_shapes[{EMBEDDING!r}]",
        )
    return math.prod(shapes[EMBEDDING][1:])
