"""The published residual networks for CIFAR-10 (He et al., arXiv:1512.03385, shortcuts of kind A), as a model spec of ours.

    benchmarks/resnet_cifar.py:resnet56?file=FILE.safetensors

They were trained on images normalised by ImageNet's figures; here they take images normalised by CIFAR-10's, as our loaders give them.
With `bare=True` they take what they were trained on: `--mean imagenet`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CIFAR10 = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))


class Block(nn.Module):
    """Two convolutions and a shortcut without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, outputs, height / stride, width / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Three stages of `blocks` blocks, 16, 32 and 64 channels wide."""

    scale: Tensor
    shift: Tensor

    def __init__(self, blocks: int, bare: bool = False):
        super().__init__()
        self.bare = bare
        (mean, std), (own_mean, own_std) = (tuple(map(torch.tensor, figures)) for figures in (_IMAGENET, _CIFAR10))
        self.register_buffer("scale", (own_std / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((own_mean - mean) / std).view(3, 1, 1), persistent=False)
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(Block(inputs if k == 0 else outputs, outputs, stride if k == 0 else 1) for k in range(blocks))
            )
            for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32), normalised by CIFAR-10's figures, or by ImageNet's for a bare one → (batch, 10)."""
        x = x if self.bare else x * self.scale + self.shift
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def resnet20(file: str | None = None, bare: bool = False) -> nn.Module:
    """9 blocks."""
    return _loaded(ResNet(3, bare), file)


def resnet32(file: str | None = None, bare: bool = False) -> nn.Module:
    """15 blocks."""
    return _loaded(ResNet(5, bare), file)


def resnet56(file: str | None = None, bare: bool = False) -> nn.Module:
    """27 blocks."""
    return _loaded(ResNet(9, bare), file)


def _loaded(model: ResNet, file: str | None) -> nn.Module:
    """With published weights, which lack the counters of the batch norms."""
    if file is not None:
        state = load_file(file)
        counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
        model.load_state_dict({**counters, **state})
    return model
