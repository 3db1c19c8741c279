"""The check of benchmarks/widths.py: channel axes lie where the shapes of two widths differ, and one that does not is seen."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
