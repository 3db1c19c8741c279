"""Images held on a device, from which a batch is one gather: random draws only decide where each image is read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.data.augment import FlipAndCrop


class HeldImages:
    """A data set on a device, a byte a value, with the margin that shifts read.

    Args:
        images: uint8, or uint16, which is held as int32 (count, channels, height, width).
        labels: (count,), or None.
        device: where they are to be.
        shift: what is drawn of them; None: they are read as they are.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, device: torch.device, shift: FlipAndCrop | None):
        wide = images.int() if images.dtype == torch.uint16 else images  # GPUs support few operations on uint16
        self.margin = shift.padding if shift is not None else 0
        self.images = F.pad(wide.to(device), [self.margin] * 4)
        self.labels = labels.to(device) if labels is not None else None
        _, channels, height, width = images.shape
        straight = torch.arange(width, device=device)
        shifts = torch.arange(2 * self.margin + 1, device=device)[:, None]
        self._columns = torch.stack((straight + shifts, straight.flip(0) + shifts))  # indexed by (mirrored, shift)
        self._rows = torch.arange(height, device=device)
        self._channels = torch.arange(channels, device=device)[:, None, None]

    @staticmethod
    def fit(device: torch.device, images: Tensor, shift: FlipAndCrop | None) -> bool:
        """Whether they take no more than half of the device's free memory."""
        if device.type != "cuda":
            return True
        margin = 2 * shift.padding if shift is not None else 0
        count, channels, height, width = images.shape
        size = 4 if images.dtype == torch.uint16 else images.element_size()
        free, _ = torch.cuda.mem_get_info(device)
        return count * channels * (height + margin) * (width + margin) * size <= free // 2

    def pictures(self, samples: Tensor, draws: Tensor | None) -> Tensor:
        """Some of the images, with the same values as `FlipAndCrop.apply` gives for the same draws.

        Args:
            samples: their indices (batch,), on the device.
            draws: of `FlipAndCrop.draw` (batch, 3), on the device; None: no augmentation.
        """
        if draws is None:
            return self.images.index_select(0, samples)
        rows = draws[:, :1] + self._rows
        columns = self._columns[draws[:, 2], draws[:, 1]]
        return self.images[
            samples[:, None, None, None], self._channels, rows[:, None, :, None], columns[:, None, None, :]
        ]
