"""Networks of `pairings.py`, from their published architecture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from alignment_dev import conv, narrow_auto_encoder
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

LAYERS = ["layer1", "layer2", "layer3", "layer4"]


def unit(cin: int, cout: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(cin, cout, kernel, stride, groups), nn.BatchNorm2d(cout), nn.ReLU())


class MobileNetV1(nn.Module):
    """Separable convolutions in one long sequence."""

    def __init__(self, width: int = 32):
        super().__init__()
        plan = [(2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *[(16, 1)] * 5, (32, 2), (32, 1)]
        layers, cin = [unit(3, width, 3, 2)], width
        for factor, stride in plan:
            layers.append(nn.Sequential(unit(cin, cin, 3, stride, cin), unit(cin, factor * width, 1)))
            cin = factor * width
        self.model, self.fc = nn.Sequential(*layers), nn.Linear(cin, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.model(x).mean((2, 3)))


class ShuffleV2Block(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.stride, half = stride, cout // 2
        inner = half if stride == 1 else cin
        self.right = nn.Sequential(
            *unit(inner, half, 1), conv(half, half, 3, stride, half), nn.BatchNorm2d(half), *unit(half, half, 1)
        )
        self.left = nn.Sequential(conv(cin, cin, 3, stride, cin), nn.BatchNorm2d(cin), *unit(cin, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            keep, change = x.chunk(2, 1)
            joined = torch.cat([keep, self.right(change)], 1)
        else:
            joined = torch.cat([self.left(x), self.right(x)], 1)
        n, c, h, w = joined.shape
        return joined.view(n, 2, c // 2, h, w).permute(0, 2, 1, 3, 4).reshape(n, c, h, w)


class CifarShuffleV2(nn.Module):
    """ShuffleNetV2 for 32x32 images: a 1x1 stem, three stages, an expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, cin = unit(3, 24, 1), 24
        for number, (width, count) in enumerate(((116, 4), (232, 8), (464, 4)), 1):
            blocks = [ShuffleV2Block(cin if i == 0 else width, width, 2 if i == 0 else 1) for i in range(count)]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
            cin = width
        self.conv2, self.linear = unit(cin, 1024, 1), nn.Linear(1024, 100)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(self.conv2(x), 1).flatten(1))


class BertLayer(nn.Module):
    """Attention and MLP, each with a norm after the sum."""

    def __init__(self, width: int, heads: int, norm_first: bool = False):
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.query, self.key, self.value, self.dense = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.intermediate, self.output, self.dropout = (
            nn.Linear(width, 4 * width),
            nn.Linear(4 * width, width),
            nn.Dropout(0.1),
        )

    def attend(self, x: Tensor) -> Tensor:
        split = [f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        weights = (split[0] @ split[1].transpose(-1, -2) / split[0].shape[-1] ** 0.5).softmax(-1)
        return self.dropout(self.dense((self.dropout(weights) @ split[2]).transpose(1, 2).flatten(2)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.dropout(self.output(F.gelu(self.intermediate(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            x = x + self.attend(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


class Bert(nn.Module):
    """Text encoder: ids to classes; with `norm_first` the blocks are GPT's."""

    def __init__(self, layers: int, width: int, norm_first: bool = False):
        super().__init__()
        self.word, self.position, self.norm = nn.Embedding(100, width), nn.Embedding(32, width), nn.LayerNorm(width)
        self.layer = nn.ModuleList(BertLayer(width, 4, norm_first) for _ in range(layers))
        self.norm_first, self.pooler, self.classifier = norm_first, nn.Linear(width, width), nn.Linear(width, 3)
        self.embedded = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.word(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = self.embedded(x if self.norm_first else self.norm(x))
        for layer in self.layer:
            x = layer(x)
        x = self.norm(x) if self.norm_first else x
        return self.classifier(torch.tanh(self.pooler(x[:, 0])))


class UNet(nn.Module):
    def __init__(self, width: int, convs: int):
        super().__init__()
        self.convs = convs
        self.down = nn.ModuleList(self.stack(3 if k == 0 else width << (k - 1), width << k) for k in range(4))
        self.up = nn.ModuleList(nn.ConvTranspose2d(width << (k + 1), width << k, 2, 2) for k in (2, 1, 0))
        self.fuse = nn.ModuleList(self.stack(width << (k + 1), width << k) for k in (2, 1, 0))
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, 5, 1)

    def stack(self, cin: int, cout: int) -> nn.Sequential:
        return nn.Sequential(*[unit(cin if k == 0 else cout, cout) for k in range(self.convs)])

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for k, part in enumerate(self.down):
            x = part(self.pool(x) if k else x)
            kept.append(x)
        for up, fuse, skip in zip(self.up, self.fuse, kept[-2::-1], strict=True):
            x = fuse(torch.cat([skip, up(x)], 1))
        return self.head(x)


class Edsr(nn.Module):
    """Super-resolution: residual blocks at one resolution, a long shortcut, upsampling at the end."""

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.head, self.tail = conv(3, width, bias=True), conv(width, width, bias=True)
        self.body = nn.ModuleList(
            nn.Sequential(conv(width, width, bias=True), nn.ReLU(), conv(width, width, bias=True))
            for _ in range(blocks)
        )
        self.marks = nn.ModuleList(nn.Identity() for _ in range(blocks))
        self.up, self.out = (
            nn.Sequential(conv(width, 4 * width, bias=True), nn.PixelShuffle(2)),
            conv(width, 3, bias=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.head(x)
        for block, mark in zip(self.body, self.marks, strict=True):
            x = mark(x + block(x))
        return self.out(self.up(self.tail(x) + first))


class TextCnn(nn.Module):
    """One-dimensional convolutions over a signal."""

    def __init__(self, width: int, convs: int):
        super().__init__()
        self.stages, cin = nn.ModuleList(), 3
        for k in range(3):
            layers: list[nn.Module] = []
            for j in range(convs):
                layers += [nn.Conv1d(cin, width << k, 9, 4 if j == 0 else 1, 4), nn.BatchNorm1d(width << k), nn.ReLU()]
                cin = width << k
            self.stages.append(nn.Sequential(*layers))
        self.fc = nn.Linear(cin, 10)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.stages:
            x = part(x)
        return self.fc(x.mean(-1))


class Psp(nn.Module):
    """A dilated ResNet with a pyramid pooling head, as MMSegmentation's PSPNet."""

    def __init__(self, name: str, **options: Any):
        super().__init__()
        dilated = {"replace_stride_with_dilation": [False, True, True]} if name != "resnet18" else {}
        net = getattr(torchvision.models, name)(weights=None, **dilated, **options)
        self.stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        width = net.fc.in_features
        self.pools = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), *unit(width, 64, 1)) for n in (1, 2, 3, 6))
        self.bottleneck, self.conv_seg = unit(width + 256, 128), nn.Conv2d(128, 19, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        more = [F.interpolate(pool(x), size=x.shape[2:], mode="bilinear", align_corners=False) for pool in self.pools]
        return self.conv_seg(self.bottleneck(torch.cat([x, *more], 1)))


class HeadReplaced(nn.Module):
    """A network whose first layers are a narrow auto-encoder."""

    def __init__(self, encoder: nn.Module, rest: Sequence[tuple[str, nn.Module]], head: nn.Module):
        super().__init__()
        self.bottleneck_layer, self.names, self.head = encoder, [name for name, _ in rest], head
        for name, part in rest:
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bottleneck_layer(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.head(F.relu(x).mean((2, 3)))


def resnet50_head_replaced() -> nn.Module:
    """Up to layer1 replaced, 256 channels at stride 4 wanted."""
    full = torchvision.models.resnet50(weights=None)
    small = narrow_auto_encoder([(256, 1), (256, 1), (256, 0)], 1, 1)
    return HeadReplaced(small, [(name, getattr(full, name)) for name in LAYERS[1:]], full.fc)


def densenet_head_replaced() -> nn.Module:
    """Up to the second transition replaced (256 channels at stride 16, as transition2 gives)."""
    full = torchvision.models.densenet169(weights=None)
    names = ["denseblock3", "transition3", "denseblock4", "norm5"]
    small = narrow_auto_encoder([(512, 1), (256, 1), (256, 0), (256, 0)], 1, 2)
    return HeadReplaced(small, [(name, getattr(full.features, name)) for name in names], full.classifier)


def inception_head_replaced() -> nn.Module:
    """Everything before the first inception block replaced (192 channels of 35x35)."""
    full = torchvision.models.inception_v3(weights=None, init_weights=False, aux_logits=False)
    names = ["5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"]
    small = narrow_auto_encoder([(192, 1), (192, 0), (192, 0)], 0, 1)
    return HeadReplaced(small, [(f"Mixed_{name}", getattr(full, f"Mixed_{name}")) for name in names], full.fc)


class CifarStem(nn.Module):
    """torchvision's ResNet with the stem for 32x32 images (3x3, stride 1, no pooling)."""

    def __init__(self, name: str):
        super().__init__()
        self.net = getattr(torchvision.models, name)(weights=None, num_classes=100)
        self.net.conv1, self.net.maxpool = conv(3, 64), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def retina(name: str) -> Callable[[], nn.Module]:
    """The backbone of RetinaNet: P3 to P5 from the main path, P6 and P7 by further convolutions."""
    return lambda: resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )


class MainOutput(nn.Module):
    """torchvision's segmentation models return a dict."""

    def __init__(self, name: str):
        super().__init__()
        net = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None, num_classes=21)
        self.backbone, self.classifier = net.backbone, net.classifier

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        out = self.classifier(features if "low" in features else features["out"])
        return F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)
