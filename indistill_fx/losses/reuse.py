"""The loss of a student that reuses its teacher's classifier: simkd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from indistill_fx.losses.base import MainLoss, Outputs, same_shape
from indistill_fx.losses.features import pooled_to_smaller


class SimKDLoss(MainLoss):
    """mean((p - f_t)^2) at the last pair, p the projected feature of a student made by `reuse_classifier`.

    No labels are needed: what follows the feature is the teacher's own classifier. A teacher's map that is larger is
    average-pooled to the size of the student's.

    Args:
        weight: of the term.
        weight_labels: of the supervised loss, which is off.

    Raises:
        ConfigError: the widths of the last pair differ.

    Source:
        Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, arXiv:2203.14001,
        equation 3; the authors take weight 1 and no other loss.
    """

    needs: frozenset[str] = frozenset({"features"})
    ends_frozen: bool = True

    def __init__(self, *, weight: float = 1.0, weight_labels: float = 0.0):
        super().__init__(weight=weight, weight_labels=weight_labels)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        name = next(reversed(student.features))
        projected, target = student.features[name], teacher.features[name]
        if projected.ndim > 2:
            projected, target = pooled_to_smaller(projected, target)
        same_shape(projected, target, "simkd")
        return F.mse_loss(projected, target)
