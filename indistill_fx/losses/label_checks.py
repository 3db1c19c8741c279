"""Checks of labels against a model's outputs that several tasks share. Each raises a ConfigError."""

from __future__ import annotations

from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.losses.positions import IGNORED


def require_positions(task: str, logits: Tensor, expected: str) -> None:
    """Refuse outputs without positions."""
    if logits.ndim < 3:
        raise ConfigError(
            f"{task} reads outputs {expected}, but the model gives {tuple(logits.shape)}.",
            where="task",
            got=tuple(logits.shape),
            expected=expected,
            hint="For one class per sample use --task classification.",
        )


def require_probabilities(labels: Tensor) -> None:
    """Refuse labels (batch, classes, *positions) that are no distributions over the classes; where all are 0, nothing counts."""
    sums = labels.sum(1)
    wrong = ~((sums - 1).abs() <= 1e-2) & (labels != 0).any(1) | (labels < 0).any(1)
    if bool(wrong.any()):
        raise ConfigError(
            "Labels with a number for every class must be probabilities, but those of some sample do not sum to 1.",
            where="labels",
            got=sums[wrong][0].item(),
            expected="class numbers, or probabilities that sum to 1",
            hint="For several labels per sample use --task multilabel, for measured values --task regression.",
        )


def require_binary(labels: Tensor) -> None:
    """Refuse labels that are neither 0 nor 1, where those seen before were."""
    others = labels[(labels != 0) & (labels != 1)]
    if len(others):
        raise ConfigError(
            f"The labels seen first were all 0 or 1, so they were taken for multilabel, but here is {others[0]:g}.",
            where="labels",
            got=float(others[0]),
            expected="0 or 1 for each label",
            hint="Name the task: --task regression for measured values, --task multilabel for probabilities, --task classification for "
            "class numbers.",
        )


def require_shape(task: str, logits: Tensor, labels: Tensor) -> None:
    """Refuse labels of another shape than the outputs."""
    expected, got = tuple(logits.shape), tuple(labels.shape)
    if got != expected:
        raise ConfigError(
            f"{task} reads labels of the outputs' shape {expected}, but these have {got}.",
            where="labels",
            got=got,
            expected=expected,
            hint="Let the loader give one value for each output, or name another task (--task).",
        )


def require_no_class(void: int, logits: Tensor) -> None:
    """Refuse a label that is ignored and is one of the classes of outputs (batch, classes, *positions)."""
    classes = logits.shape[1]
    if void < classes:
        raise ConfigError(
            f"Label {void}, which segmentation ignores, is one of the model's {classes} classes.",
            where="labels",
            got=classes,
            expected=f"at most {void} classes, or another void label",
            hint=f"Write `task = Segmentation(void={IGNORED})`, or your own void label, into a file and name it: --task file.py:task.",
        )
