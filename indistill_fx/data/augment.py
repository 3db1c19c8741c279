"""Random augmentation of small images. Drawing and applying are separate, so the same draws give the same images on every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.errors import ConfigError
from indistill_fx.system.random_state import OwnRandomness

STRONGEST = 30
"""RandAugment's magnitudes are 0 to 30."""


class Augmentation(Protocol):
    """Done to batches of images before they are normalised."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers of each image's augmentation: (count, numbers)."""

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented images (batch, channels, height, width); both on one device."""


@dataclass(frozen=True, slots=True)
class FlipAndCrop:
    """Each image shifted by up to `padding` pixels (zeros come in), and half of them mirrored.

    The transforms of torchvision.transforms.v2 draw once for a whole batch of tensors; this draws for every image.
    """

    padding: int = 4
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw row shift, column shift and mirroring of each image: (count, 3)."""
        shifts = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat((shifts, mirrored), 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented images (batch, channels, height, width); both on one device."""
        count, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        columns = torch.arange(width, device=images.device).expand(count, -1)
        columns = torch.where(draws[:, 2:] == 1, width - 1 - columns, columns) + draws[:, 1:2]
        rows = torch.arange(height, device=images.device) + draws[:, :1]
        places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        places = places.flatten(1)[:, None].expand(-1, channels, -1)
        pixels = padded.flatten(2)
        if pixels.dtype == torch.uint16:  # older versions of torch cannot gather it: the same bits as int16
            return pixels.view(torch.int16).gather(2, places).view(torch.uint16).view_as(images)
        return pixels.gather(2, places).view_as(images)


@dataclass(frozen=True, slots=True)
class ShiftAndRandAugment:
    """`FlipAndCrop`, then RandAugment with draws of its own for every image.

    Source: Cubuk et al., "RandAugment", arXiv:1909.13719, as torchvision.transforms.v2 has it: two operations of this magnitude.
    """

    magnitude: int
    shift: FlipAndCrop = FlipAndCrop()
    operations: Callable[[Any], Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", rand_augment(self.magnitude))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the shift's three numbers and a seed for each image: (count, 4)."""
        seeds = torch.randint(2**31, (count, 1), generator=generator)
        return torch.cat((self.shift.draw(count, generator), seeds), 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented images, uint8 (batch, channels, height, width); both on one device."""
        done = []
        for image, seed in zip(self.shift.apply(images, draws[:, :3]), draws[:, 3].tolist(), strict=True):
            with OwnRandomness(seed).lent():
                done.append(self.operations(image))
        return torch.stack(done)


def rand_augment(magnitude: int) -> Callable[[Any], Any]:
    """RandAugment as torchvision has it, for an image or a tensor of one.

    Raises:
        ConfigError: no such magnitude.
    """
    from torchvision.transforms import v2

    if not 0 <= magnitude <= STRONGEST:
        raise ConfigError(
            f"RandAugment's magnitude is {magnitude}, but it must be from 0 to {STRONGEST}.",
            where="randaugment",
            got=magnitude,
            expected=f"0 to {STRONGEST}",
            hint=f"Give 0 to {STRONGEST}; 9 is usual.",
        )
    transform: Callable[[Any], Any] = v2.RandAugment(magnitude=magnitude)
    return transform


def of_small_images(augment: bool, magnitude: int | None) -> Augmentation | None:
    """What is done to training images that are held in memory.

    Args:
        augment: whether anything is.
        magnitude: RandAugment's; None: shifts and mirrors only.
    """
    if not augment:
        return None
    return FlipAndCrop() if magnitude is None else ShiftAndRandAugment(magnitude)
