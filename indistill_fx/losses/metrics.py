"""Metrics that torchmetrics does not have in the form we need. Apart from the tasks, so that these need not wait for torchmetrics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from indistill_fx.losses.positions import IGNORED, as_rows


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


class Perplexity(Metric):
    """exp of the mean cross-entropy of the tokens that count. torchmetrics' own is infinite where one probability rounds to 0."""

    higher_is_better = False
    total: Tensor
    counted: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("counted", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add up.

        Args:
            logits: (batch, vocabulary, length).
            labels: (batch, length).
        """
        self.total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        self.counted += (labels != IGNORED).sum()

    def compute(self) -> Tensor:
        """The perplexity; 1 where nothing counts."""
        return (self.total.cpu().double() / self.counted.cpu().clamp(min=1)).exp()


class MeanAveragePrecision(Metric):
    """Average precision, the mean over the labels that occur. torchmetrics' own counts the others as 0."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("scores", "labels"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Keep.

        Args:
            scores: (batch, labels, *positions), 0 to 1.
            labels: of the same shape, 0 or 1.
        """
        self.scores.append(as_rows(scores))
        self.labels.append(as_rows(labels))

    def compute(self) -> Tensor:
        """The mean; 0 where no label occurs."""
        columns = zip(dim_zero_cat(self.scores).T, dim_zero_cat(self.labels).T, strict=True)
        found = [binary_average_precision(scores, labels) for scores, labels in columns if bool(labels.any())]
        return torch.stack(found).mean() if found else torch.zeros(())


class MeanF1(Metric):
    """F1 at 1/2, the mean over the labels that occur or are given. torchmetrics' own counts the others as 0."""

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    right: Tensor
    both: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        for name in ("right", "both"):
            self.add_state(name, torch.zeros(labels, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Count.

        Args:
            scores: (batch, labels, *positions), 0 to 1.
            labels: of the same shape, 0 or 1.
        """
        given, true = as_rows(scores) > 0.5, as_rows(labels) == 1
        self.right += (given & true).sum(0)
        self.both += given.sum(0) + true.sum(0)

    def compute(self) -> Tensor:
        """The mean; 0 where no label occurs or is given."""
        there = self.both > 0
        found = 2 * self.right[there].cpu().double() / self.both[there].cpu()
        return found.mean() if len(found) else torch.zeros(())
