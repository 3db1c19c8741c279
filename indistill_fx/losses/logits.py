"""Losses that compare logits (batch, classes, *positions): labels, kd, dkd, dist, mlkd, cwd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import MainLoss, Outputs, positive_temperature, required, unfit_shape
from indistill_fx.losses.positions import are_classes, as_rows, counted, mean_over, standardized


class LabelsLoss(MainLoss):
    """Cross-entropy with the labels alone; the teacher is not used.

    Args:
        weight_labels: of the cross-entropy.
    """

    needs_labels: bool = True

    def __init__(self, *, weight_labels: float = 1.0):
        super().__init__(weight=0.0, weight_labels=weight_labels)


class KDLoss(MainLoss):
    """Soft targets: T^2 * (1/N) * sum_i KL(softmax(z_t / T) || softmax(z_s / T)), for classes; else the task's own divergence.

    Symbols: z_s, z_t logits of student and teacher; N samples, or samples times positions (pixels, tokens); T temperature.
    Positions whose label is -100 do not count, as in the cross-entropy.

    Args:
        temperature: T.
        weight: of the soft targets.
        weight_labels: of the cross-entropy.
        standardize: bring the logits of every position to mean 0 and deviation 1 first (`positions.standardized`), where they are
            classes; its authors take T 2, weight 9, weight_labels 0.1.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531. T 4 and the weights
        0.9 / 0.1 are those of mdistiller and RepDistiller for CIFAR (ImageNet: T 1, 0.5 / 0.5).
    """

    needs: frozenset[str] = frozenset({"logits"})

    def __init__(
        self, *, temperature: float = 4.0, weight: float = 0.9, weight_labels: float = 0.1, standardize: bool = False
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature, self.standardize = positive_temperature(temperature), standardize

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher, standardize=self.standardize)
        return self.task.divergence(z_s, z_t, labels, self.temperature)


class DKDLoss(MainLoss):
    """Decoupled KD: T^2 * (alpha * TCKD + beta * NCKD).

    TCKD = (1/N) sum_i KL over the two outcomes (p, 1 - p), p = softmax(z / T) at the label;
    NCKD = (1/N) sum_i KL over the softmax of the other classes' z / T; N samples, or samples times positions, without those
    whose label is -100. With probabilities for labels (mixup, smoothing) both are expectations over the label.

    Args:
        alpha: weight of the target-class part.
        beta: weight of the non-target part; the authors choose 2 to 8 by pair of networks (ImageNet 0.5 to 2).
        temperature: T.
        weight: of the whole term.
        weight_labels: of the cross-entropy.
        ramp_steps: over so many training steps the term's weight grows linearly to `weight`; 0 is off.
        standardize: see `KDLoss`.

    Source:
        Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679; mdistiller's
        defaults.
        Deviations: the other classes are gathered instead of masked by -1000 (equal up to e^-1000), and 1 - p is
        taken by logsumexp, which stays finite where the authors' log(1 - p) does not; the authors' ramp of 20 epochs is
        in steps and off by default.
    """

    needs: frozenset[str] = frozenset({"logits"})
    needs_labels: bool = True
    by_class: bool = True
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
        standardize: bool = False,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature, self.standardize = positive_temperature(temperature), standardize
        self.alpha, self.beta, self.ramp_steps = alpha, beta, ramp_steps
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def at_step(self, step: int) -> None:
        """See `Criterion`."""
        super().at_step(step)
        self.step.fill_(step)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = (z / self.temperature for z in _paired_logits(student, teacher, standardize=self.standardize))
        labels = required(labels, "labels")
        if are_classes(labels, z_s):
            target, others = _decoupled_by_class(as_rows(z_s), as_rows(z_t), labels.flatten())
        else:
            target, others = _decoupled_by_probability(as_rows(z_s), as_rows(z_t), as_rows(labels))
        mask = counted(labels, z_s).flatten()
        terms = [mean_over(rows, mask) for rows in (target, others)]
        loss = (self.alpha * terms[0] + self.beta * terms[1]) * self.temperature**2
        if not self.ramp_steps:
            return loss
        if self.training:
            self.step += 1
        return loss * (self.step / self.ramp_steps).clamp(max=1.0)


class DISTLoss(MainLoss):
    """Correlations instead of probabilities: T^2 * (beta * inter + gamma * intra).

    With P = softmax(z / T), an (N, C) matrix, and r Pearson's correlation: inter = 1 - mean over rows of r(row of P_s, row of
    P_t); intra = 1 - mean over classes of r(column of P_s, column of P_t). r has 1e-8 in its denominator. N counts samples, or
    samples times positions, without those whose label is -100.

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

    needs: frozenset[str] = frozenset({"logits"})
    by_class: bool = True

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
        self.temperature = positive_temperature(temperature)
        self.beta, self.gamma = beta, gamma

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher)
        p_s, p_t = (as_rows(torch.softmax(z / self.temperature, 1)) for z in (z_s, z_t))
        rows = counted(labels, z_s).flatten().to(p_s.dtype)
        inter = 1 - (_pearson(p_s, p_t) * rows).sum() / rows.sum().clamp(min=1)
        intra = 1 - _pearson(p_s.T, p_t.T, rows).mean()
        return (self.beta * inter + self.gamma * intra) * self.temperature**2


class MLKDLoss(MainLoss):
    """Logits compared at three levels, each the mean over several temperatures.

    With P = softmax(z / T), an (N, C) matrix: instance = T^2 * (1/N) sum_i KL(row of P_t || row of P_s); batch = |P_s P_s^T -
    P_t P_t^T|_F^2 / N; class = |P_s^T P_s - P_t^T P_t|_F^2 / C. N counts samples without those whose label is -100.

    Args:
        temperatures: T.
        weight: of the sum of the three.
        weight_labels: of the cross-entropy.
        standardize: see `KDLoss`.

    Raises:
        ConfigError: the logits have positions; the batch level would relate every pair of them.

    Source:
        Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023; temperatures by the authors' code. Deviation: one view
        of every sample instead of a weak and a strong one, and no selection of samples by the teacher's confidence.
    """

    needs: frozenset[str] = frozenset({"logits"})
    by_class: bool = True

    def __init__(
        self,
        *,
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        weight: float = 1.0,
        weight_labels: float = 1.0,
        standardize: bool = False,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperatures, self.standardize = [positive_temperature(T) for T in temperatures], standardize

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher, standardize=self.standardize)
        if z_s.ndim != 2:
            raise unfit_shape(
                "mlkd",
                "relates the samples of a batch, but the logits have positions",
                z_s,
                "(batch, classes)",
                "Take kd or cwd for dense outputs.",
            )
        rows = counted(labels, z_s)[:, None].to(z_s.dtype)
        levels = []
        for temperature in self.temperatures:
            p_s, p_t = (torch.softmax(z / temperature, 1) * rows for z in (z_s, z_t))
            samples = (p_s @ p_s.T - p_t @ p_t.T).square().sum() / rows.sum().clamp(min=1)
            classes = (p_s.T @ p_s - p_t.T @ p_t).square().sum() / z_s.shape[1]
            levels.append(self.task.divergence(z_s, z_t, labels, temperature) + samples + classes)
        return torch.stack(levels).mean()


class CWDLoss(MainLoss):
    """Channel-wise distillation of dense logits: T^2 * (1/(B C)) * sum_bc KL(softmax(z_t / T) || softmax(z_s / T)).

    The softmax runs over the positions of one class's map, so the loss says where a class is, not how likely it is. Positions
    whose label is -100 are left out of it.

    Args:
        temperature: T.
        weight: of the term.
        weight_labels: of the cross-entropy.

    Raises:
        ConfigError: the logits have no positions.

    Source:
        Shu, Liu, Gao, Yan, Shen, "Channel-Wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256,
        equation 5; T 4 and weight 3 as the authors take for logits.
    """

    needs: frozenset[str] = frozenset({"logits"})
    by_class: bool = True

    def __init__(self, *, temperature: float = 4.0, weight: float = 3.0, weight_labels: float = 1.0):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.temperature = positive_temperature(temperature)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        z_s, z_t = _paired_logits(student, teacher)
        if z_s.ndim < 3:
            raise unfit_shape(
                "cwd",
                "compares maps, but the logits have no positions",
                z_s,
                "(batch, classes, *positions)",
                "Take kd for a classifier of whole images.",
            )
        mask = counted(labels, z_s)
        maps = [(z / self.temperature).flatten(2) for z in (z_s, z_t)]
        maps = [z.masked_fill(~mask.flatten(1).unsqueeze(1), torch.finfo(z.dtype).min) for z in maps]
        log_s, log_t = (z.log_softmax(2) for z in maps)
        divergence = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return divergence * self.temperature**2 / (z_s.shape[0] * z_s.shape[1])


def _paired_logits(student: Outputs, teacher: Outputs, *, standardize: bool = False) -> tuple[Tensor, Tensor]:
    z_s, z_t = required(student.logits, "student logits"), required(teacher.logits, "teacher logits")
    if z_s.shape != z_t.shape:
        raise _differing(tuple(z_s.shape), tuple(z_t.shape))
    return (standardized(z_s), standardized(z_t)) if standardize else (z_s, z_t)


def _differing(student: tuple[int, ...], teacher: tuple[int, ...]) -> ConfigError:
    """The error for logits that cannot be compared: what differs, and what to do."""
    if len(student) != len(teacher):
        problem = "they are of different forms, which this loss cannot compare"
        hint = (
            "A model that returns another form in train mode than in eval mode, as YOLO does, needs a forward that returns one form in "
            "both. Or take a loss that reads layers alone, all pairs of them: at or reviewkd (--main at)."
        )
    elif student[1] != teacher[1]:
        problem = f"the student has {student[1]} classes and the teacher {teacher[1]}"
        hint = "Both must have the same classes; losses on features or embeddings (pkt, at, rkd) do not need that."
    else:
        problem = "they have the same classes, but at other positions"
        hint = "Let one of them resize its logits in its forward (F.interpolate), or take a loss on features (at, reviewkd)."
    return ConfigError(
        f"The student gives logits of shape {student}, the teacher {teacher}: {problem}.",
        where="logits",
        got=student,
        expected=teacher,
        hint=hint,
    )


def _decoupled_by_class(z_s: Tensor, z_t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summands of TCKD (N, 2) and NCKD (N, C - 1), of rows of logits and one class number a row."""
    labels = labels.clamp(min=0)  # ignored rows have a label that is no class
    (binary_s, others_s), (binary_t, others_t) = (_decoupled(z, labels) for z in (z_s, z_t))
    pairs = ((binary_s, binary_t), (others_s.log_softmax(1), others_t.log_softmax(1)))
    target, others = (F.kl_div(s, t, reduction="none", log_target=True) for s, t in pairs)
    return target, others


def _decoupled_by_probability(z_s: Tensor, z_t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, (N, C) each, as an expectation over labels that are a distribution over classes.

    For class c the others' KL is (K - k_c) / (1 - q_c) - log(1 - q_c) + log(1 - p_c), with k_c the summand of class c in K, the
    whole KL of q from p. For the teacher's likeliest class, where 1 - q_c may be next to nothing, it is taken of the others' logits.
    """
    z_p, z_q = z_s.double(), z_t.double()
    log_p, log_q, rest_p, rest_q = z_p.log_softmax(1), z_q.log_softmax(1), _log_rest(z_p), _log_rest(z_q)
    summand = log_q.exp() * (log_q - log_p)
    target = summand + rest_q.exp() * (rest_q - rest_p)
    likeliest = z_q.argmax(1, keepdim=True)
    rest = rest_q.exp().scatter(1, likeliest, 1.0)
    others = (summand.sum(1, keepdim=True) - summand) / rest - rest_q + rest_p
    _, of_likeliest = _decoupled_by_class(z_p, z_q, likeliest[:, 0])
    others = others.scatter(1, likeliest, of_likeliest.sum(1, keepdim=True))
    return (labels * target).to(z_s.dtype), (labels * others).to(z_s.dtype)


def _log_rest(z: Tensor) -> Tensor:
    """log(1 - p) of every class, p = softmax(z); exact also for the likeliest one, whose p may round to 1."""
    likeliest = z.argmax(1, keepdim=True)
    others = z.scatter(1, likeliest, -torch.inf)
    rest = torch.log1p(-(others - z.logsumexp(1, keepdim=True)).exp())
    return rest.scatter(1, likeliest, others.logsumexp(1, keepdim=True) - z.logsumexp(1, keepdim=True))


def _decoupled(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of (label, not the label), and the logits of all other classes."""
    places = torch.arange(z.shape[1] - 1, device=z.device).expand(z.shape[0], -1)
    others = z.gather(1, places + (places >= labels[:, None]))
    parts = torch.stack((z.gather(1, labels[:, None])[:, 0], others.logsumexp(1)), 1)
    return parts - z.logsumexp(1, keepdim=True), others


def _pearson(a: Tensor, b: Tensor, weights: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of each row of `a` with that of `b`; entries count by `weights`, 0 or 1, if given."""
    if weights is None:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    else:
        a, b = ((x - (x * weights).sum(1, keepdim=True) / weights.sum().clamp(min=1)) * weights for x in (a, b))
    lengths: Tensor = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return (a * b).sum(1) / (lengths + eps)
