"""Logits at many positions: pixels, tokens. Which positions count, and means over those alone.

Logits are (batch, classes, *positions); labels are class numbers (batch, *positions), or probabilities of the logits' own shape.
A classifier of whole images has one position. Labels of `IGNORED`, and probabilities that are all 0, are left out of every mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError

IGNORED = -100
"""The label of a position that does not count, as in `torch.nn.functional.cross_entropy`."""


def are_classes(labels: Tensor, logits: Tensor) -> bool:
    """Whether the labels are class numbers; else they are probabilities.

    Raises:
        ConfigError: they fit neither form.
    """
    if not labels.is_floating_point() and logits.ndim > 1 and labels.shape == logits.shape[:1] + logits.shape[2:]:
        return True
    if labels.is_floating_point() and labels.shape == logits.shape:
        return False
    raise other_size(labels, logits) or ConfigError(
        f"Labels of shape {tuple(labels.shape)} ({str(labels.dtype).removeprefix('torch.')}) do not fit logits of shape "
        f"{tuple(logits.shape)}.",
        where="labels",
        got=tuple(labels.shape),
        expected="class numbers (batch, *positions), or probabilities (batch, classes, *positions)",
        hint="Give class numbers (batch, *positions) or probabilities (batch, classes, *positions), or name another task: task=… (--task).",
    )


def as_classes(labels: Tensor) -> Tensor:
    """Class numbers as they are; of probabilities the likeliest class, and `IGNORED` where all are 0."""
    if not labels.is_floating_point():
        return labels
    return labels.argmax(1).masked_fill(labels.sum(1) == 0, IGNORED)


def other_size(labels: Tensor, logits: Tensor) -> ConfigError | None:
    """The error for labels that differ from outputs (batch, classes, height, width, …) in size alone; None if they do not."""
    expected = logits.shape if labels.is_floating_point() else logits.shape[:1] + logits.shape[2:]
    places = logits.ndim - 2
    if places < 2 or labels.shape == expected or labels.shape[:-places] != expected[:-places]:
        return None
    got, wanted = ("x".join(map(str, shape[-places:])) for shape in (labels.shape, logits.shape))
    return ConfigError(
        f"The labels are {got} in size, but the model's outputs are {wanted}.",
        where="labels",
        got=got,
        expected=wanted,
        hint=f"Let the model's forward bring its outputs to the labels' size (torch.nn.functional.interpolate(outputs, size=…)), or let "
        f"the loader give labels of {wanted}.",
    )


def counted(labels: Tensor | None, logits: Tensor) -> Tensor:
    """Which positions count: (batch, *positions), True where there is a label, as said above; all if there are no `labels`."""
    if labels is None:
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    return labels != IGNORED if are_classes(labels, logits) else labels.sum(1) != 0


def without_padding(mask: Tensor) -> Tensor:
    """Labels that say nothing but which positions count, by a padding mask (batch, *positions).

    Padding is where the mask is 0. A mask that is added to the scores of attention (floats, none above 0) is below 0 at padding.
    """
    padding = mask == 0
    if mask.is_floating_point():
        padding = torch.where((mask > 0).any(), padding, mask < 0)
    return torch.zeros_like(mask, dtype=torch.int64).masked_fill(padding, IGNORED)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over positions of values that are summed over everything else.

    Args:
        values: (batch, anything, *positions).
        mask: (batch, *positions), as `counted` gives it.

    Returns:
        A scalar; 0 if no position counts.
    """
    return (values * mask.unsqueeze(1)).sum() / mask.sum().clamp(min=1)


def as_rows(values: Tensor) -> Tensor:
    """(batch, classes, *positions) as (batch x positions, classes)."""
    return values if values.ndim == 2 else values.movedim(1, -1).flatten(0, -2)


def standardized(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes of every position; 1e-7 is added to the latter.

    So the gradients of a position grow as its logits draw together, up to 1e7 times where they are all equal.

    Source:
        Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01424, equation 8.
    """
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + torch.std(logits, dim=1, keepdim=True))
