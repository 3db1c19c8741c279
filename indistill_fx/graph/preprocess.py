"""Normalisation inside the deployed graph: uint8 pixels in, as a camera or a decoder gives them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.system.files import parse_json

_MOST_CHANNELS = 1 << 16
Pair: TypeAlias = tuple[Sequence[float] | float, Sequence[float] | float]


@dataclass(frozen=True, slots=True)
class Preprocess:
    """Mean and standard deviation per channel, of pixels scaled to 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @staticmethod
    def make(pair: Preprocess | Pair | None) -> Preprocess | None:
        """A checked `Preprocess` from (mean, std), each one number or one per channel; None from None.

        Raises:
            ConfigError: lengths differ, or a standard deviation is not positive.
        """
        if pair is None or isinstance(pair, Preprocess):
            return pair
        mean, std = (tuple(map(float, v)) if isinstance(v, Sequence) else (float(v),) for v in pair)
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ConfigError(
                f"`preprocess` needs (mean, std) with one mean and one positive standard deviation per channel; "
                f"got {mean} and {std}.",
                where="preprocess",
                hint="Give ((m, …), (s, …)) of values from 0 to 1.",
            )
        return Preprocess(mean, std)

    @staticmethod
    def from_metadata(metadata: Mapping[str, str]) -> Preprocess | None:
        """The preprocessing built into an exported file, from its metadata.

        Raises:
            ConfigError: the metadata is invalid.
        """
        text = metadata.get("preprocess")
        if not text:
            return None
        try:
            mean, std = ([float(number) for number in parse_json(text)[key]] for key in ("mean", "std"))
            if all(map(math.isfinite, mean + std)) and len(mean) <= _MOST_CHANNELS:
                return Preprocess.make((mean, std))
        except (OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError, ConfigError):
            pass
        raise ConfigError(
            f"The preprocessing in the file's metadata is invalid: {text[:100]!r}.",
            where="preprocess",
            got=text[:100],
            hint="Export it again.",
        )

    def metadata(self) -> dict[str, str]:
        """The metadata entry that `from_metadata` reads."""
        return {"preprocess": json.dumps({"mean": self.mean, "std": self.std, "input": "uint8 NHWC"})}

    def to_pixels(self, images: Tensor) -> Tensor:
        """Normalised float images (N, C, H, W) as the pixels (N, H, W, C) they came from; pixels pass as they are.

        Raises:
            ConfigError: they are not images of as many channels.
        """
        if images.dtype == torch.uint8:
            return images
        if images.ndim != 4 or len(self.mean) not in (1, images.shape[1]):
            raise ConfigError(
                f"The file's preprocessing is for images of {len(self.mean)} channels, and the inputs are {list(images.shape)}.",
                where="preprocess",
                got=list(images.shape),
                hint="Give the inputs that the file was exported for.",
            )
        pixels: Tensor = ToPixels(self, whole=True).to(images.device)(images)
        return pixels.contiguous()


class FromPixels(nn.Module):
    """uint8 pixels (N, H, W, C) to normalised float images (N, C, H, W), as one multiplication and one addition."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess):
        super().__init__()
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean / std).view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalise the pixels, and run the model."""
        return pixels.permute(0, 3, 1, 2).to(self.scale.dtype) * self.scale + self.shift


class ToPixels(nn.Module):
    """The way back: normalised float images (N, C, H, W) to pixels (N, H, W, C) of values from 0 to 255; uint8 pixels pass as they are.

    Args:
        preprocess: what the images are normalised by.
        whole: round to uint8, instead of leaving real numbers.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess, *, whole: bool):
        super().__init__()
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        self.register_buffer("scale", (255 * std).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (255 * mean).view(1, -1, 1, 1), persistent=False)
        self.whole = whole

    def forward(self, images: Tensor) -> Tensor:
        """The pixels."""
        if images.dtype == torch.uint8:
            return images
        pixels = (images.float() * self.scale + self.shift).permute(0, 2, 3, 1)
        return pixels.round().clamp(0, 255).to(torch.uint8) if self.whole else pixels
