"""Metrics that torchmetrics does not have in the form we need. Apart from the tasks, so that these need not wait for torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from indistill_fx.losses.positions import IGNORED


class Accuracy(Metric):
    """Share of right class numbers among those that count, exact: torchmetrics' own divides in float32."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    right: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("right", "counted"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count.

        Args:
            logits: (batch, classes, *positions).
            labels: (batch, *positions).
        """
        mask = labels != IGNORED
        self.right += ((logits.argmax(1) == labels) & mask).sum()
        self.counted += mask.sum()

    def compute(self) -> Tensor:
        """The share; 0 where nothing counts."""
        return self.right.cpu().double() / self.counted.cpu().clamp(min=1)
