"""Knowledge review: every layer of the student learns from the teacher's layers up to its own depth: reviewkd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.losses.base import Outputs, same_shape
from indistill_fx.losses.features import MapLoss, Shapes, map_names

_LEVELS = (4, 2, 1)
"""Side lengths to which `context_loss` pools maps, after comparing them whole."""


class ReviewKDLoss(MapLoss):
    """Sum over pairs of `context_loss(r_i, f_t_i)`, with r_i the student's features from layer i on, fused from deep to shallow.

    From the deepest layer up: x = norm(conv1x1(f_s)); where something deeper has been fused, y = that, resized to x, and x = a_x x +
    a_y y with (a_x, a_y) = sigmoid(conv1x1([x, y])) per position; r = norm(conv3x3(x)) in the teacher's width. x is passed to the next
    shallower layer. All convolutions train with the student.

    Args:
        student_shapes: pair name -> shape (batch, channels, height, width), shallow to deep.
        teacher_shapes: the same names.
        width: channels of the fused features; by default the deepest student layer's, at most 512.
        weight: of the sum.
        weight_labels: of the cross-entropy.

    Raises:
        ConfigError: there are no pairs, or they are not maps.

    Source:
        Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044; weight 5 by the authors' CIFAR
        runs. Deviations: the pairs of the plan only, without the pooled penultimate vector as a further layer; the student's map is
        resized to the teacher's size where they differ.
    """

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        width: int | None = None,
        weight: float = 5.0,
        weight_labels: float = 1.0,
    ):
        super().__init__(weight=weight, weight_labels=weight_labels)
        self.names = map_names(student_shapes, teacher_shapes, "reviewkd")
        width = width or min(512, student_shapes[self.names[-1]][1])
        widths = [(student_shapes[name][1], teacher_shapes[name][1]) for name in self.names]
        self.entries = nn.ModuleList(_convolution(s, width, 1) for s, _ in widths)
        self.exits = nn.ModuleList(_convolution(width, t, 3) for _, t in widths)
        self.shares = nn.ModuleList(nn.Conv2d(2 * width, 2, 1) for _ in widths[:-1])

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """See the class."""
        losses: list[Tensor] = []
        deeper: Tensor | None = None
        for place in reversed(range(len(self.names))):
            target = teacher.features[self.names[place]]
            fused: Tensor = self.entries[place](student.features[self.names[place]])
            if deeper is not None:
                deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
                shares = torch.sigmoid(self.shares[place](torch.cat((fused, deeper), 1)))
                fused = fused * shares[:, :1] + deeper * shares[:, 1:]
            if fused.shape[2:] != target.shape[2:]:
                fused = F.interpolate(fused, target.shape[2:], mode="nearest")
            losses.append(context_loss(self.exits[place](fused), target))
            deeper = fused
        return torch.stack(losses).sum()


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss: the weighted mean of the squared errors of the maps whole and pooled to 4x4, 2x2 and 1x1.

    A size that is not below the map's own height is left out. Of the sizes that are used, each weighs half of the one before, beginning
    with 1 for the whole maps; the weights are divided by their sum.

    Args:
        student: (batch, channels, height, width).
        teacher: the same shape.

    Returns:
        A scalar.

    Raises:
        ConfigError: the shapes differ.

    Source:
        Chen et al., arXiv:2104.09044, section 3.4; weights by the authors' code.
    """
    same_shape(student, teacher, "reviewkd")
    terms, weights = [F.mse_loss(student, teacher)], [1.0]
    for side in _LEVELS:
        if side < student.shape[2]:
            student_pooled, teacher_pooled = (F.adaptive_avg_pool2d(f, side) for f in (student, teacher))
            terms.append(F.mse_loss(student_pooled, teacher_pooled))
            weights.append(weights[-1] / 2)
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum() / sum(weights)


def _convolution(width: int, target: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, target, size, padding=size // 2, bias=False), nn.BatchNorm2d(target))
