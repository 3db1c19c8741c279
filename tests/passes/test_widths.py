"""The check of benchmarks/widths.py: channel axes lie where the shapes of two widths differ, and one that does not is seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent.parent / "benchmarks"))
    for needed in ("timm", "transformers"):
        pytest.importorskip(needed)
    yield pytest.importorskip("widths")
    sys.modules.pop("widths", None)


def make(wider: bool) -> nn.Module:
    width = 16 if wider else 8
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 5),
    ).eval()  # fmt: skip


def test_a_wrong_channel_axis_is_seen(widths: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(2, 3, 12, 12)
    right = widths.check(make, inputs)
    assert right["differ"] == 6 and right["wrong"] == [] and right["pairs"] > 0
    trace = ifx.trace

    def turned(model: nn.Module, example: Any) -> ifx.TracedModel:
        traced = trace(model, example)
        facts = {name: replace(one, channel_axis=2) if name == "_2" else one for name, one in traced.facts.items()}
        return replace(traced, facts=facts)

    monkeypatch.setattr(ifx, "trace", turned)
    assert [line.partition(":")[0] for line in widths.check(make, inputs)["wrong"]] == ["_2"]


class Windows(nn.Module):
    """Attention written out, with a bias for each head, as in Swin; and a state that begins with zeros, as in Mamba."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.qkv, self.out = nn.Linear(6, width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias, self.decay, self.head = nn.Embedding(9, 2), nn.Parameter(torch.rand(width, 3)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        places = torch.arange(length)
        bias = self.bias((places[:, None] - places + 9) % 9).permute(2, 0, 1)[None]
        mixed = (q @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        steps = x.transpose(1, 2)[..., None] * torch.exp(-self.decay)[None, :, None]  # (rows, width, length, 3)
        state = torch.zeros(rows, width, 3)
        for place in range(3):
            state = steps[:, :, place] * 0.5 + state
        return self.head(state.sum(-1))


def test_heads_and_states_tell_no_wrong_axis(widths: Any) -> None:
    found = widths.check(lambda wider: Windows(16 if wider else 8).eval(), torch.randn(2, 9, 6))
    assert found["differ"] >= 20 and [line for line in found["wrong"] if not line.startswith("zeros")] == []
    traced = ifx.trace(Windows(8), torch.randn(2, 9, 6))
    states = [
        facts for name, facts in traced.facts.items() if facts.shape == (2, 8, 3) and not name.startswith("zeros")
    ]
    assert states and {facts.channel_axis for facts in states} == {1}
