"""The networks of the usual comparison of distillation methods on CIFAR-100, as model specs: `benchmarks/cifar100_nets.py:resnet8x4`.

All take images of (batch, 3, 32, 32). Residual networks of depth 6n + 2 (He et al., arXiv:1512.03385; `x4` is four times as wide
behind the stem, and twice as wide in it), VGG with batch norms (Simonyan and Zisserman, arXiv:1409.1556), MobileNetV2 of half width
(Sandler et al., arXiv:1801.04381) and ShuffleNetV2 (Ma et al., arXiv:1807.11164), the last two with the strides of Tian et al.,
arXiv:1910.10699.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import MobileNetV2, ShuffleNetV2

CLASSES = 100


class Block(nn.Module):
    """Two convolutions, and a shortcut that is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, height, width) → (batch, outputs, height / stride, width / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A stem and three stages of `blocks` blocks."""

    def __init__(self, blocks: int, widths: tuple[int, int, int, int]):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(*(Block(outputs if k else inputs, outputs, 1 if k else stride) for k in range(blocks)))
            for inputs, outputs, stride in zip(widths, widths[1:], (1, 2, 2), strict=False)
        )
        self.fc = nn.Linear(widths[3], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → (batch, 100)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class VGG(nn.Module):
    """Five stages of `each` convolutions; pooling behind the first three."""

    def __init__(self, each: int):
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 3
        for place, width in enumerate((64, 128, 256, 512, 512)):
            layers: list[nn.Module] = []
            for _ in range(each):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            stages.append(nn.Sequential(*layers, *([nn.MaxPool2d(2)] if place < 3 else [])))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → (batch, 100)."""
        return self.fc(self.stages(x).mean((2, 3)))


def resnet20() -> nn.Module:
    """0.28 M parameters, 41 M multiply-accumulates."""
    return ResNet(3, (16, 16, 32, 64))


def resnet56() -> nn.Module:
    """0.86 M parameters, 126 M multiply-accumulates."""
    return ResNet(9, (16, 16, 32, 64))


def resnet8x4() -> nn.Module:
    """1.2 M parameters, 177 M multiply-accumulates."""
    return ResNet(1, (32, 64, 128, 256))


def resnet32x4() -> nn.Module:
    """7.4 M parameters, 1.1 G multiply-accumulates."""
    return ResNet(5, (32, 64, 128, 256))


def vgg8() -> nn.Module:
    """4.0 M parameters, 96 M multiply-accumulates."""
    return VGG(1)


def vgg13() -> nn.Module:
    """9.5 M parameters, 285 M multiply-accumulates."""
    return VGG(2)


def mobilenetv2() -> nn.Module:
    """Half width, no dropout; 0.8 M parameters, 6.5 M multiply-accumulates."""
    blocks = [
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    return MobileNetV2(CLASSES, width_mult=0.5, inverted_residual_setting=blocks, round_nearest=1, dropout=0.0)


def shufflenetv2() -> nn.Module:
    """A 1x1 stem without stride or pooling; 1.4 M parameters, 45 M multiply-accumulates."""
    model = ShuffleNetV2([4, 8, 4], [24, 116, 232, 464, 1024], num_classes=CLASSES)
    model.conv1[0] = nn.Conv2d(3, 24, 1, bias=False)
    model.maxpool = nn.Identity()
    return model
