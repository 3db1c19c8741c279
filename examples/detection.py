"""A RetinaNet of torchvision → a smaller one: its own loss, and beside it that of the pyramid's features. The backbone runs once a step.

    python examples/detection.py [--epochs 12] [--pictures 512]

The stages are compiled of the two backbones. The main loss is the detector's own, from the features that the stage's graph hands to it,
plus their distance from the teacher's. Pictures are squares and discs on noise.
"""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

import indistill_fx as ifx

SIDE, SHAPES, FPN = 64, 2, 32
LEVELS = [f"fpn[{level}]" for level in range(3)]
"""Names of the pyramid's maps, fine to coarse (`indistill-fx inspect` lists them)."""


def make_detector(width: int, depth: int) -> RetinaNet:
    """Four stages of convolutions, a pyramid of the last three, and torchvision's heads."""
    widths = [width, 2 * width, 4 * width, 4 * width]
    stages = OrderedDict()
    for number, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
        layers: list[nn.Module] = []
        for place in range(depth):
            first = place == 0
            layers += [nn.Conv2d(before if first else after, after, 3, 2 if first else 1, 1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        stages[f"stage{number}"] = nn.Sequential(*layers)
    inner = {f"stage{number}": str(number - 1) for number in (1, 2, 3)}
    backbone = BackboneWithFPN(nn.Sequential(stages), inner, widths[1:], FPN, extra_blocks=_NoMore())
    return RetinaNet(
        backbone, SHAPES, min_size=SIDE, max_size=SIDE, image_mean=[0.0] * 3, image_std=[1.0] * 3,
        anchor_generator=AnchorGenerator(((8, 11), (16, 22), (28, 36)), ((1.0,),) * 3),
    )  # fmt: skip


class Detection(nn.Module):
    """The detector's own loss, plus `weight` times the mean square between the pyramids."""

    needs, weight_labels = frozenset({"features"}), 0.0  # what of the two backbones is read

    def __init__(self, detector: RetinaNet, weight: float):
        super().__init__()
        self.detector, self.weight = detector, weight

    def forward(self, student: Any, teacher: Any, boxes: Tensor) -> Tensor:
        """A scalar; boxes (batch, shapes, 5): corners, and the class."""
        maps = [student.features[level] for level in LEVELS]
        blank = boxes.new_zeros(len(boxes), 3, SIDE, SIDE)
        anchors = self.detector.anchor_generator(ImageList(blank, [(SIDE, SIDE)] * len(boxes)), maps)
        own = self.detector.compute_loss(targets_of(boxes), self.detector.head(maps), anchors)
        apart = [F.mse_loss(student.features[level], teacher.features[level]) for level in LEVELS]
        return sum(own.values()) + self.weight * torch.stack(apart).mean()


def make_stages(teacher: RetinaNet, student: RetinaNet, weight: float = 1.0) -> list[ifx.Stage]:
    """A stage for each level of the pyramid, then the main stage."""
    x = torch.zeros(2, 3, SIDE, SIDE)
    plan = ifx.align(teacher.backbone, student.backbone, example_inputs=x, fixed=[(level, level) for level in LEVELS])
    plan = plan.model_copy(update={"pairs": tuple(pair for pair in plan.pairs if pair.student in LEVELS)})
    return ifx.compile_stages(
        teacher.backbone, student.backbone, plan, example_inputs=x,
        curriculum=ifx.Curriculum(lengths=1), main=Detection(student, weight),
    )  # fmt: skip


def fit(loss: Callable[[Any], Tensor], module: nn.Module, loader: Iterable[Any], epochs: int) -> None:
    """The user's own loop."""
    module.train()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], 2e-3)
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()


def alone(detector: RetinaNet) -> Callable[[Any], Tensor]:
    """Its own loss, from torchvision's forward."""
    return lambda batch: sum(detector(list(batch[0]), targets_of(batch[1])).values())  # type: ignore[return-value]


def targets_of(boxes: Tensor) -> list[dict[str, Tensor]]:
    """As torchvision's detectors take them."""
    return [{"boxes": own[:, :4], "labels": own[:, 4].long()} for own in boxes]


@torch.no_grad()
def found(detector: RetinaNet, loader: Iterable[Any]) -> float:
    """Share of the shapes of which one of the best boxes, as many as there are shapes, has the class and half of the area in common."""
    detector.eval()
    hits = []
    for images, boxes in loader:
        for told, own in zip(detector(list(images)), boxes, strict=True):
            best = slice(0, len(own))
            same = told["labels"][best][None] == own[:, 4:].long()
            hits.append(((box_iou(own[:, :4], told["boxes"][best]) > 0.5) & same).any(1).float())
    return torch.cat(hits).mean().item()


def pictures(count: int, seed: int, shapes: int = 2) -> TensorDataset:
    """Pictures (count, 3, side, side), and boxes (count, shapes, 5); class 0 is a square, 1 a disc."""
    random = torch.Generator().manual_seed(seed)
    images = 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=random)
    sizes = torch.randint(10, 29, (count, shapes), generator=random)
    corners = (torch.rand(count, shapes, 2, generator=random) * (SIDE - sizes[..., None])).long()
    kinds = torch.randint(SHAPES, (count, shapes), generator=random)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    for k in range(shapes):
        size, (x, y) = sizes[:, k, None, None], (corners[:, k, axis, None, None] for axis in (0, 1))
        across, down = (columns - x + 0.5) / size - 0.5, (rows - y + 0.5) / size - 0.5
        square, disc = torch.maximum(across.abs(), down.abs()) <= 0.5, across**2 + down**2 <= 0.25
        inside = torch.where(kinds[:, k, None, None] == 0, square, disc)
        images += inside[:, None] * (1 + torch.rand(count, 3, 1, 1, generator=random))
    return TensorDataset(images, torch.cat((corners, corners + sizes[..., None], kinds[..., None]), 2).float())


class _NoMore(ExtraFPNBlock):
    """In the place of the level that BackboneWithFPN would add to the pyramid."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        return results, names


def ways(epochs: int, count: int, seed: int) -> Iterator[tuple[str, float]]:
    """Each way of training, and the share of the shapes found then; every student has the same weights at first."""
    torch.manual_seed(seed)
    teacher, student = make_detector(32, 2), make_detector(8, 1)
    train = DataLoader(pictures(count, 1), 16, shuffle=True)
    test = DataLoader(pictures(max(1, count // 4), 2), 64)
    fit(alone(teacher), teacher, train, epochs)
    yield "teacher", found(teacher, test)
    for name in ("student alone", "features beside its own loss", "warm-up before that"):
        torch.manual_seed(seed)  # the same order of the pictures
        own, left = copy.deepcopy(student), epochs
        if name == "student alone":
            fit(alone(own), own, train, left)
        else:
            *warm, last = make_stages(teacher, own)
            for stage in warm if name == "warm-up before that" else []:
                fit(stage, stage, train, 1)
                left -= 1
            fit(last, last, train, left)
        yield name, found(own, test)


def main() -> None:
    """Train a teacher, a student alone, and one by the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name, share in ways(asked.epochs, asked.pictures, asked.seed):
        print(f"{name}: {share:.1%} of the shapes found", flush=True)


if __name__ == "__main__":
    main()
