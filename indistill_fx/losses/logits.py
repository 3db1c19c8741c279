"""Losses that compare logits: labels, kd, dkd, dist."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import MainLoss, Outputs, required


class LabelsLoss(MainLoss):
    """Cross-entropy with the labels alone; the teacher is not asked.

    Args:
        weight_labels: of the cross-entropy.
    """

    def __init__(self, *, weight_labels: float = 1.0):
        super().__init__(weight=0.0, weight_labels=weight_labels)


class KDLoss(MainLoss):
    """Soft targets: T^2 * (1/B) * sum_i KL(softmax(z_t / T) || softmax(z_s / T)).

    Symbols: z_s, z_t logits of student and teacher; B batch size; T temperature.

    Args:
        temperature: T.
        weight: of the soft targets.
        weight_labels: of the cross-entropy.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. T 4 and the weights
        0.9 / 0.1 are those of mdistiller and RepDistiller for CIFAR (ImageNet: T 1, 0.5 / 0.5).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(self, *, temperature: float = 4.0, weight: float = 0.9, weight_labels: float = 0.1):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature = _positive_temperature(temperature)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher)
        return _softened_kl(z_s / self.temperature, z_t / self.temperature) * self.temperature**2


class DKDLoss(MainLoss):
    """Decoupled KD: T^2 * (alpha * TCKD + beta * NCKD).

    TCKD = (1/B) sum_i KL over the two outcomes (p, 1 - p), p = softmax(z / T) at the label;
    NCKD = (1/B) sum_i KL over the softmax of the other classes' z / T.

    Args:
        alpha: weight of the target-class part.
        beta: weight of the non-target part; the authors choose 2 to 8 by pair of networks (ImageNet 0.5 to 2).
        temperature: T.
        weight: of the whole term.
        weight_labels: of the cross-entropy.
        ramp_steps: over so many training steps the term's weight grows linearly to `weight`; 0 is off.

    Source:
        Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679; mdistiller's
        defaults.
        Deviations: the other classes are gathered instead of masked by -1000 (equal up to e^-1000), and 1 - p is
        taken by logsumexp, which stays finite where the authors' log(1 - p) does not; the authors' ramp of 20 epochs is
        in steps and off by default.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})
    step: Tensor

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        weight: float = 1.0,
        weight_labels: float = 1.0,
        ramp_steps: int = 0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature = _positive_temperature(temperature)
        self.alpha, self.beta, self.ramp_steps = alpha, beta, ramp_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher)
        labels = required(labels, "labels")
        (binary_s, others_s), (binary_t, others_t) = (_decoupled(z / self.temperature, labels) for z in (z_s, z_t))
        tckd = F.kl_div(binary_s, binary_t, reduction="batchmean", log_target=True)
        loss = (self.alpha * tckd + self.beta * _softened_kl(others_s, others_t)) * self.temperature**2
        if not self.ramp_steps:
            return loss
        if self.training:
            self.step += 1
        return loss * (self.step / self.ramp_steps).clamp(max=1.0)


class DISTLoss(MainLoss):
    """Correlations instead of probabilities: T^2 * (beta * inter + gamma * intra).

    With P = softmax(z / T), a (B, C) matrix, and r Pearson's correlation: inter = 1 - mean over samples of r(row of
    P_s, row of P_t); intra = 1 - mean over classes of r(column of P_s, column of P_t). r has 1e-8 in its denominator.

    Args:
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class.
        temperature: T (the authors' tau).
        weight: of the whole term.
        weight_labels: of the cross-entropy.

    Source:
        Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", arXiv:2205.10536. Weights:
        torchdistill's official ImageNet recipe (cross-entropy 1, term 2, beta = gamma = 1, tau = 1).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"logits"})

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: float = 2.0,
        weight_labels: float = 1.0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature = _positive_temperature(temperature)
        self.beta, self.gamma = beta, gamma

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        p_s, p_t = (torch.softmax(z / self.temperature, 1) for z in _paired_logits(student, teacher))
        inter, intra = 1 - _pearson(p_s, p_t).mean(), 1 - _pearson(p_s.T, p_t.T).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature**2


def _positive_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ConfigError(
            f"temperature is {temperature}; it divides the logits.",
            where="temperature",
            got=temperature,
            expected="> 0",
        )
    return temperature


def _paired_logits(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    z_s, z_t = required(student.logits, "student logits"), required(teacher.logits, "teacher logits")
    if z_s.shape != z_t.shape:
        raise ConfigError(
            f"The student gives logits of shape {tuple(z_s.shape)}, the teacher {tuple(z_t.shape)}.",
            where="logits",
            got=tuple(z_s.shape),
            expected=tuple(z_t.shape),
            hint="Both must have the same classes; losses on features or embeddings (pkt, at, rkd) do not need that.",
        )
    return z_s, z_t


def _softened_kl(z_s: Tensor, z_t: Tensor) -> Tensor:
    return F.kl_div(z_s.log_softmax(1), z_t.log_softmax(1), reduction="batchmean", log_target=True)


def _decoupled(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (label, not the label), and the logits of all other classes."""
    places = torch.arange(z.shape[1] - 1, device=z.device).expand(z.shape[0], -1)
    others = z.gather(1, places + (places >= labels[:, None]))
    parts = torch.stack((z.gather(1, labels[:, None])[:, 0], others.logsumexp(1)), 1)
    return parts - z.logsumexp(1, keepdim=True), others


def _pearson(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    lengths: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (lengths + eps)
