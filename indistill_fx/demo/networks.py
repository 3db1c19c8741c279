"""The demo's networks: a small residual teacher, and a chain as its student."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, cin, height, width) → (batch, cout, height / stride, width / stride)."""
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        total: Tensor = branch + self.shortcut(x)
        return total.relu()


class DigitsTeacher(nn.Module):
    """Three stages of residual blocks, at 8x8, 4x4 and 2x2."""

    def __init__(self, widths: tuple[int, int, int] = (32, 64, 128)):
        super().__init__()
        self.layer1 = nn.Sequential(ResidualBlock(1, widths[0], 1), ResidualBlock(widths[0], widths[0], 1))
        self.layer2 = nn.Sequential(ResidualBlock(widths[0], widths[1], 2), ResidualBlock(widths[1], widths[1], 1))
        self.layer3 = nn.Sequential(ResidualBlock(widths[1], widths[2], 2), ResidualBlock(widths[2], widths[2], 1))
        self.fc = nn.Linear(widths[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) → (batch, 10)."""
        x = self.layer3(self.layer2(self.layer1(x)))
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores


class DigitsStudent(nn.Module):
    """A plain chain of three convolutions at the same sizes."""

    def __init__(self, widths: tuple[int, int, int] = (6, 12, 24)):
        super().__init__()
        sizes = zip((1, *widths), widths, (1, 2, 2), strict=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b, stride in sizes
        )
        self.fc = nn.Linear(widths[2], 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) → (batch, 10)."""
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return scores
