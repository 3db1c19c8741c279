"""The warm-up's losses: one student feature against one teacher feature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.losses.base import same_shape, widened
from indistill_fx.losses.features import attention_loss
from indistill_fx.losses.relations import pkt_divergence


class WarmupLoss(nn.Module):
    """A distance between a student's and a teacher's feature, in full precision even under autocast.

    Attributes:
        needs_equal_widths: whether the teacher must be narrowed to the student's width first.
    """

    needs_equal_widths: bool

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The scalar, of full-precision tensors."""
        raise NotImplementedError

    def forward(self, student_feature: Tensor, teacher_feature: Tensor) -> Tensor:
        """The scalar to minimise; no gradient reaches the teacher."""
        with torch.autocast(student_feature.device.type, enabled=False):
            return self.distance(widened(student_feature), widened(teacher_feature.detach()))


class MSEWarmup(WarmupLoss):
    """Mean squared error over all entries.

    Source:
        The warm-up of Sarridis et al., "InDistill", arXiv:2205.10003.
    """

    needs_equal_widths: bool = True

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        same_shape(student, teacher, "mse")
        return F.mse_loss(student, teacher)


class CosineWarmup(WarmupLoss):
    """1 - the mean over the batch of cos(f_s, f_t), each feature flattened to one vector per sample.

    Blind to each sample's scale, which a following batch norm restores only on average. A vector of zeros has cosine 0.
    """

    needs_equal_widths: bool = True

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        same_shape(student, teacher, "cosine")
        return 1 - F.cosine_similarity(student.flatten(1), teacher.flatten(1), dim=1).mean()


class ATWarmup(WarmupLoss):
    """Distance between attention maps; see `attention_loss`.

    Args:
        power: p.
    """

    needs_equal_widths: bool = False

    def __init__(self, *, power: float = 2.0):
        super().__init__()
        self.power = power

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        return attention_loss(student, teacher, power=self.power)


class PKTWarmup(WarmupLoss):
    """Probabilistic knowledge transfer on the flattened features; see `pkt_divergence`."""

    needs_equal_widths: bool = False

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See the class."""
        return pkt_divergence(student, teacher)
