"""Losses that compare relations between the samples of a batch, so that widths need not agree: pkt, pkt_kl, sp, rkd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.losses.base import MainLoss, Outputs, require_pair, required


class PKTLoss(MainLoss):
    """Probabilistic knowledge transfer as InDistill uses it, on the penultimate vector; see `pkt_divergence`.

    Args:
        weight: of the divergence.
        weight_labels: of the cross-entropy; the authors use none.
    """

    needs: frozenset[str] = frozenset({"embedding"})
    unit: float = 1e-3

    def __init__(self, *, weight: float = 1.0, weight_labels: float = 0.0):
        super().__init__(weight=weight, weight_labels=weight_labels)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        return pkt_divergence(*_embeddings(student, teacher))


class PKTKLLoss(MainLoss):
    """Probabilistic knowledge transfer as RepDistiller and mdistiller use it: mean_ij P_t * log((P_t + e) / (P_s + e)).

    P: the cosine kernel (cos + 1) / 2 over the batch, each row normalised to sum 1; e = 1e-7, also added to the norms.

    Args:
        weight: of the divergence (large, because it is a mean over B^2 small entries).
        weight_labels: of the cross-entropy.

    Source:
        Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
        arXiv:1803.10837; weight 30000 by RepDistiller.
    """

    needs: frozenset[str] = frozenset({"embedding"})

    def __init__(self, *, weight: float = 30000.0, weight_labels: float = 1.0):
        super().__init__(weight=weight, weight_labels=weight_labels)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        p_s, p_t = (_as_distributions(_cosine_kernel(f, eps=1e-7)) for f in _embeddings(student, teacher))
        return (p_t * ((p_t + 1e-7).log() - (p_s + 1e-7).log())).mean()


class SPLoss(MainLoss):
    """Similarity preserving: |G_t - G_s|_F^2 / B^2, G = F F^T with L2-normalised rows, F the flattened feature.

    Args:
        hint: the pair compared; by default the deepest.
        weight: of the term.
        weight_labels: of the cross-entropy.

    Source:
        Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682; weight by RepDistiller.
    """

    needs: frozenset[str] = frozenset({"features"})

    def __init__(self, *, hint: str | None = None, weight: float = 3000.0, weight_labels: float = 1.0):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.hint = hint

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        f_s, f_t = (_chosen(values, self.hint).flatten(1) for values in (student, teacher))
        g_s, g_t = (F.normalize(f @ f.T, dim=1) for f in (f_s, f_t))
        return (g_t - g_s).square().mean()


class RKDLoss(MainLoss):
    """Relational KD: distance * D + angle * A, on the penultimate vector.

    D: smooth L1 between the matrices of pairwise Euclidean distances, each divided by the mean of its positive entries.
    A: smooth L1 between the cosines of the angle at i spanned by j and k, over all (i, j, k). Both are means over all
    entries.

    Args:
        distance: weight of D.
        angle: weight of A.
        weight: of the whole term.
        weight_labels: of the cross-entropy.

    Source:
        Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068; 25 and 50 by RepDistiller.
        Squared distances are kept above 1e-12, and those of a sample to itself are 0, as there. Deviation: vectors nearer to each
        other than 1e-6 span no angle and have no gradient in A, which for equal ones was 1e12 times as large as it should be.
    """

    needs: frozenset[str] = frozenset({"embedding"})

    def __init__(self, *, distance: float = 25.0, angle: float = 50.0, weight: float = 1.0, weight_labels: float = 1.0):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.distance, self.angle = distance, angle

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        f_s, f_t = _embeddings(student, teacher)
        apart = F.smooth_l1_loss(_relative_distances(f_s), _relative_distances(f_t))
        return self.distance * apart + self.angle * F.smooth_l1_loss(_angles(f_s), _angles(f_t))


def pkt_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Jeffreys divergence between two kernels of student and teacher over the batch; features are flattened per sample.

    Kernels: K1 = (cos(f_i, f_j) + 1) / 2 and K2 = 1 / (1 + d_ij), d_ij = sqrt(max(|f_i - f_j|^2, 0) + 1e-6). Each row
    is normalised to a distribution P. Loss: the mean over all entries of (P_t - P_s)(log P_t - log P_s), K1's plus
    K2's.

    Args:
        student: (batch, ...).
        teacher: (batch, ...); the width need not be the student's.

    Returns:
        A scalar.

    Source:
        The authors' code of Sarridis et al., "InDistill", arXiv:2205.10003, which follows Passalis, Tefas,
        arXiv:1803.10837 (norms get 1e-6 added). Deviations: K1 is kept above 1e-12, so that opposite vectors give a
        finite loss; distances are taken about the batch's mean with an exact 0 from a sample to itself, which is the
        same but for rounding.
    """
    student, teacher = student.flatten(1), teacher.flatten(1)
    return _jeffreys(_cosine_kernel(student), _cosine_kernel(teacher)) + _jeffreys(
        _student_t_kernel(student), _student_t_kernel(teacher)
    )


def _chosen(values: Outputs, hint: str | None) -> Tensor:
    names = list(values.features)
    if hint is not None or not names:
        require_pair(hint, names)
    return values.features[hint or names[-1]]


def _embeddings(student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
    return (
        required(student.embedding, "student embedding").flatten(1),
        required(teacher.embedding, "teacher embedding").flatten(1),
    )


def _cosine_kernel(f: Tensor, eps: float = 1e-6) -> Tensor:
    f = f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + eps)
    return ((f @ f.T + 1) / 2).clamp(min=1e-12)


def _student_t_kernel(f: Tensor) -> Tensor:
    return 1 / (1 + (_squared_distances(f) + 1e-6).sqrt())


def _squared_distances(f: Tensor) -> Tensor:
    f = f - f.mean(0)
    lengths = f.square().sum(1)
    squares = (lengths[:, None] + lengths - 2 * f @ f.T).clamp(min=0)
    return squares.masked_fill(_diagonal(squares), 0)


def _as_distributions(kernel: Tensor) -> Tensor:
    return kernel / kernel.sum(1, keepdim=True)


def _jeffreys(student: Tensor, teacher: Tensor) -> Tensor:
    p_s, p_t = _as_distributions(student), _as_distributions(teacher)
    return ((p_t - p_s) * (p_t.log() - p_s.log())).mean()


def _relative_distances(f: Tensor) -> Tensor:
    squares = _squared_distances(f).clamp(min=1e-12)
    distances = squares.sqrt().masked_fill(_diagonal(squares), 0)
    mean = distances.sum() / (distances > 0).sum().clamp(min=1)
    return distances / mean.clamp(min=1e-12)  # a batch of one has no distances


def _angles(f: Tensor) -> Tensor:
    differences = f[None] - f[:, None]
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    directions: Tensor = differences / lengths.masked_fill(lengths < 1e-6, torch.inf)
    return directions @ directions.mT


def _diagonal(square: Tensor) -> Tensor:
    return torch.eye(len(square), dtype=torch.bool, device=square.device)
