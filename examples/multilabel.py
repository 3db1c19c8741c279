r"""Any number of labels a picture: which of the ten digits stand in a row of three of scikit-learn's.

indistill-fx train   examples/multilabel.py:make_teacher --data examples/multilabel.py:make_loaders -o runs/teacher
indistill-fx distill examples/multilabel.py:make_teacher@runs/teacher/student.safetensors examples/multilabel.py:make_student \
        --data examples/multilabel.py:make_loaders -o runs/student
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

IN_A_ROW = 3


def network(width: int) -> nn.Module:
    """Three blocks and a linear layer."""

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(
        *block(1, width), *block(width, 2 * width), *block(2 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def make_teacher() -> nn.Module:
    """A wide one."""
    return network(24)


def make_student() -> nn.Module:
    """A narrow one."""
    return network(8)


def make_loaders(batch_size: int = 64, seed: int = 0, limit: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Every fifth digit is for the test; rows are drawn within each part, as many as it has digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.tensor(digits.target)
    test = torch.arange(len(x)) % 5 == 0
    sets = []
    for part in (~test, test):
        own, names = x[part], y[part]
        drawn = torch.randint(len(own), (len(own), IN_A_ROW), generator=torch.Generator().manual_seed(0))[:limit]
        rows = own[drawn].permute(0, 2, 1, 3).flatten(2).unsqueeze(1)  # (samples, 1, 8, 24)
        sets.append(TensorDataset(rows, torch.zeros(len(rows), 10).scatter(1, names[drawn], 1.0)))
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(sets[0], batch_size, shuffle=True, generator=generator), DataLoader(sets[1], 256)
