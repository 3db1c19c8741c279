"""Tiny networks, one for each thing that graphs of real ones have, and what makes their checks sharp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unsettle(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms and statistics: fresh ones are the identity and hide errors."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if (
            isinstance(child, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
            and child.weight is not None
        ):
            with torch.no_grad():
                child.weight.copy_(0.5 + torch.rand(child.weight.shape, generator=generator))
                child.bias.copy_(0.3 * torch.randn(child.bias.shape, generator=generator))
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.running_mean is not None:
            child.running_mean.copy_(0.3 * torch.randn(child.running_mean.shape, generator=generator))
            child.running_var.copy_(0.5 + torch.rand(child.running_var.shape, generator=generator))
    return module


class Cnn32(nn.Module):
    """The paper's chain: three blocks of conv, norm, ReLU, max-pool; two linear layers. Names as in the authors' weights."""

    def __init__(
        self, widths: tuple[int, int, int] = (16, 32, 64), hidden: int = 128, classes: int = 10, channels: int = 3
    ):
        super().__init__()
        a, b, c = widths
        self.conv1, self.conv1_bn = nn.Conv2d(channels, a, 3), nn.BatchNorm2d(a)
        self.conv2, self.conv2_bn = nn.Conv2d(a, b, 3), nn.BatchNorm2d(b)
        self.conv3, self.conv3_bn = nn.Conv2d(b, c, 3), nn.BatchNorm2d(c)
        self.fc1, self.fc2 = nn.Linear(4 * c, hidden), nn.Linear(hidden, classes)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1_bn(self.conv1(x))))
        x = self.pool(F.relu(self.conv2_bn(self.conv2(x))))
        x = self.pool(F.relu(self.conv3_bn(self.conv3(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Block(nn.Module):
    """A residual block whose ReLU works in place."""

    def __init__(self, cin: int, cout: int, stride: int = 1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))
            if stride != 1 or cin != cout
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        branch += x if self.shortcut is None else self.shortcut(x)
        return self.relu(branch)


class Residual(nn.Module):
    """Three stages of residual blocks."""

    def __init__(self, width: int = 8, blocks: int = 2, classes: int = 5, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        widths = [width, 2 * width, 4 * width]
        for k, cout in enumerate(widths):
            cin = widths[max(k - 1, 0)]
            layers = [Block(cin, cout, 2 if k else 1), *(Block(cout, cout) for _ in range(blocks - 1))]
            self.add_module(f"layer{k + 1}", nn.Sequential(*layers))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(self.dropout(F.adaptive_avg_pool2d(x, 1).flatten(1)))


class Overwritten(nn.Module):
    """A norm's output is overwritten by the ReLU behind it, and read again by a second branch afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        z = self.relu(y)
        return self.head((z + y).mean((2, 3)))


class PreActivation(nn.Module):
    """Norm and ReLU before the convolution: nothing to fold into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x + self.conv2(F.relu(self.bn1(x)))
        return self.head(F.relu(self.bn2(x)).mean((2, 3)))


class TinyTransformer(nn.Module):
    """Patches, a class token, attention blocks with layer norms before."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, classes: int = 5):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(TinyBlock(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class TinyBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm2(x))


def seeded(make: type[nn.Module], *args: object, seed: int = 0, **kwargs: object) -> nn.Module:
    """A network with fixed random weights and unsettled norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return unsettle(make(*args, **kwargs), seed)


def images(count: int = 2, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def number_or_none(value: object) -> object:
    """Code of another file than the network's, which asks for a type."""
    return value if type(value) is int else None
