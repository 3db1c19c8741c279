"""How images are normalised: by mean and standard deviation per channel, of values from 0 to 1."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, nearest

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
Figures = str | Sequence[float]
"""Numbers per channel, `auto`, or a name of `PUBLISHED`."""

PUBLISHED: dict[str, Normalisation] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""By name: what networks trained on these data usually want; `half`: values from -1 to 1, as many transformers do."""

_GREY = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in grey, ITU-R 601."""


class Known(tuple[float, ...]):
    """Figures that nobody asked for: a model's own. `origin` says in words whose."""

    origin: str

    def __new__(cls, numbers: Iterable[float], origin: str) -> Known:
        """Numbers per channel, and where they are from."""
        known = super().__new__(cls, numbers)
        known.origin = origin
        return known


class Normaliser:
    """Pixels to float32: (value / peak - mean) / std per channel, to the same bits on every device.

    Args:
        figures: mean and std.
        peak: the pixel value that stands for 1.
    """

    def __init__(self, figures: Normalisation, peak: float = 255.0):
        self.figures = figures
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in figures)
        # A tensor: a GPU would multiply by the reciprocal of a plain number, which rounds differently.
        self.peak = torch.tensor(peak)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels (..., channels, height, width) of any dtype, which stay as they are."""
        return pixels.to(torch.float32, copy=True).div_(self.peak).sub_(self.mean).div_(self.std)

    def __repr__(self) -> str:
        return f"Normaliser({self.mean.flatten().tolist()}, {self.std.flatten().tolist()}, {self.peak.item()})"

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.6g}" for value in part.flatten().tolist()) for part in (self.mean, self.std))
        return f"mean {mean} and std {std}, of values up to {self.peak.item():g}"

    def to(self, device: torch.device | str) -> Normaliser:
        """The same for pixels on this device."""
        moved = copy.copy(self)
        moved.mean, moved.std, moved.peak = self.mean.to(device), self.std.to(device), self.peak.to(device)
        return moved


def choose(
    mean: Figures | None,
    std: Figures | None,
    default: Normalisation,
    channels: int,
    measure: Callable[[], Normalisation],
) -> tuple[Normalisation, str]:
    """The figures that were asked for, or the default.

    Args:
        mean: numbers, one for all channels or one each; `auto` measures; a name of `PUBLISHED`; None: the default's.
        std: likewise; None: by what `mean` says, if that is a word.
        default: where nothing was asked for; of three channels, or of as many as there are.
        channels: of the images.
        measure: finds the figures of the data themselves.

    Returns:
        Mean and std; and in words what they are and where they are from.

    Raises:
        ConfigError: an unknown name, a wrong count of numbers, a std that is not positive, numbers above 1, or numbers for only one.
    """
    if mean is None and std is None:
        found = in_channels(default, channels)
        return found, _said(found, "the default for these data")
    std = mean if std is None and isinstance(mean, str) else std
    mean = std if mean is None and isinstance(std, str) else mean
    if mean is None or std is None:
        given, absent = ("std", "mean") if mean is None else ("mean", "std")
        raise ConfigError(
            f"The {given} of the images is given as numbers, but their {absent} is missing.",
            where=absent,
            hint=f"Give both, --mean and --std, or one word for both: auto, {', '.join(PUBLISHED)}.",
        )
    measured = measure() if "auto" in (mean, std) else default
    found = (
        _figures("mean", mean, 0, measured, channels),
        _figures("std", std, 1, measured, channels),
    )
    largest = max(*found[0], *found[1])
    if largest > 1 and not isinstance(mean, Known):
        raise ConfigError(
            f"Mean and std of the images are of values from 0 to 1, but one is {largest:g}.",
            where="mean" if largest in found[0] else "std",
            got=largest,
            expected="at most 1",
            hint="If they are of values from 0 to 255, divide them by 255.",
        )
    if min(found[1]) <= 0:
        raise ConfigError(f"A std of the images is {min(found[1]):g}.", where="std", got=found[1], expected="> 0")
    origin = mean.origin if isinstance(mean, Known) else "as given"
    return found, _said(found, "measured on the training set" if "auto" in (mean, std) else origin)


def _said(figures: Normalisation, origin: str) -> str:
    means, stds = (", ".join(f"{value:.4f}" for value in part) for part in figures)
    return f"Images are normalised by mean {means} and std {stds}, {origin}."


def in_channels(figures: Normalisation, channels: int) -> Normalisation:
    """Figures of colours as those of grey images, and the other way round: the mean by the shares of grey, the std by the mean."""
    mean, std = figures
    if len(mean) == channels:
        return figures
    if len(mean) == 1:
        return mean * channels, std * channels
    return (round(sum(a * b for a, b in zip(_GREY, mean, strict=True)), 6),), (round(sum(std) / len(std), 6),)


def measured(batches: Iterable[Tensor], peak: float) -> Normalisation:
    """Mean and standard deviation per channel over all pixels of all batches (batch, channels, height, width)."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for pixels in batches:
        values = pixels.double().div_(peak).movedim(1, 0).flatten(1)
        count += values.shape[1]
        total, squares = total + values.sum(1), squares + values.square().sum(1)
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _figures(name: str, wanted: Figures, place: int, measured: Normalisation, channels: int) -> tuple[float, ...]:
    if wanted == "auto":
        return in_channels(measured, channels)[place]
    if isinstance(wanted, str):
        if wanted not in PUBLISHED:
            raise ConfigError(
                f"{wanted!r} is not a known {name} of images.",
                where=name,
                got=wanted,
                expected=["auto", *PUBLISHED],
                hint=f"{nearest(wanted, PUBLISHED)} Give auto, {', '.join(PUBLISHED)}, or numbers such as 0.485,0.456,0.406.",
            )
        return in_channels(PUBLISHED[wanted], channels)[place]
    numbers = tuple(float(value) for value in _listed(wanted))
    if not all(map(math.isfinite, numbers)):
        raise ConfigError(f"A {name} of the images is not finite.", where=name, got=numbers, expected="finite numbers")
    if len(numbers) not in (1, channels):
        raise ConfigError(
            f"The {name} has {len(numbers)} numbers, but the images have {channels} channel{'s' * (channels > 1)}.",
            where=name,
            got=numbers,
            expected="1 number" if channels == 1 else f"1 or {channels} numbers",
        )
    return numbers * channels if len(numbers) == 1 else numbers


def _listed(values: Any) -> Sequence[float]:
    return [values] if isinstance(values, (int, float)) else values
