r"""A U-Net into a smaller one: which digit every pixel of scikit-learn's 8×8 digits belongs to, or to none.

indistill-fx train   examples/segmentation.py:make_teacher --data examples/segmentation.py:make_loaders -o runs/teacher
indistill-fx distill examples/segmentation.py:make_teacher@runs/teacher/student.safetensors examples/segmentation.py:make_student \
        --data examples/segmentation.py:make_loaders -o runs/student
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

BACKGROUND, VOID = 10, 255


def block(a: int, b: int) -> nn.Sequential:
    """Two convolutions."""
    parts = [[nn.Conv2d(n, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)] for n in (a, b)]
    return nn.Sequential(*parts[0], *parts[1])


class UNet(nn.Module):
    """Three levels, as wide as asked for and twice as wide at each."""

    def __init__(self, width: int, classes: int = 11):
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *widths], widths, strict=False))
        self.up = nn.ModuleList(block(b + a, a) for a, b in pairwise(widths))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, height, width) → (batch, classes, height, width)."""
        kept = []
        for number, part in enumerate(self.down):
            x = part(F.max_pool2d(x, 2) if number else x)
            kept.append(x)
        for part, skip in zip(reversed(self.up), reversed(kept[:-1]), strict=True):
            x = part(torch.cat((F.interpolate(x, scale_factor=2.0, mode="nearest"), skip), 1))
        return self.head(x)


def make_teacher() -> nn.Module:
    """A wide one."""
    return UNet(16)


def make_student() -> nn.Module:
    """A narrow one."""
    return UNet(6)


def make_loaders(batch_size: int = 64, seed: int = 0, limit: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Every fifth digit is for the test. Pixels that are neither ink nor paper count as void."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    digit = torch.tensor(digits.target).view(-1, 1, 1)
    y = torch.where(x[:, 0] > 8, digit, torch.where(x[:, 0] < 4, BACKGROUND, VOID))
    x, test = x / 8 - 1, torch.arange(len(x)) % 5 == 0
    train = TensorDataset(x[~test][:limit], y[~test][:limit])
    generator = torch.Generator().manual_seed(seed)
    return (
        DataLoader(train, batch_size, shuffle=True, generator=generator),
        DataLoader(TensorDataset(x[test][:limit], y[test][:limit]), 256),
    )
