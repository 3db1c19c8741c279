"""Random shifts and mirrors of small images, drawn apart from being done: the same draws give the same images on every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class FlipAndCrop:
    """Each image shifted by up to `padding` pixels (zeros come in), and half of them mirrored.

    The transforms of torchvision.transforms.v2 draw once for a whole batch of tensors; this draws for every image.
    """

    padding: int = 4
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Row shift, column shift, mirror: (count, 3)."""
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
        return padded.flatten(2).gather(2, places).view_as(images)
