"""benchmarks/gpu.py in small and without a GPU, so that it does not rot: what it compares is equal, and one failure costs one row."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu, gpu_floor, gpu_ways


@pytest.fixture
def on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        gpu.torch, "compile", lambda module, **options: module
    )  # takes minutes, and is tested elsewhere

    def run(*more: str) -> dict:
        path = tmp_path / "gpu.json"
        arguments = ["gpu", "--tiny", "--pairs", "paper", "--steps", "1", "--json", str(path), *more]
        monkeypatch.setattr(gpu.sys, "argv", arguments)
        gpu.main()
        return json.loads(path.read_text())

    return run


def test_what_is_checked_holds_and_every_way_is_timed(on_a_cpu):
    found = on_a_cpu()
    assert found["left out"] == []
    assert len(found["correctness"]) == 3
    assert all(row["loss"] < 1e-5 and row["gradients"] < 1e-3 for row in found["correctness"])
    assert found["graphs on and off"] == {"pool": 0.0, "pool@2": 0.0, "pool@3": 0.0}
    assert found["data on the device and off"] == {"batches": 3, "tensors that differ": 0}
    ways = {"hooks", "ours", "recorded", "hooks compiled", "ours compiled", "recorded compiled"}
    assert set(found["rows"][0]["ms"]) == ways == set(found["curricula"]["paper"])
    assert found["ceilings"]["operations a second"] > 0
    trained = found["trainer"]
    assert set(trained) == {"recorded", "as they are"}
    assert all(rate > 0 for rate in trained["as they are"]["steps a second"].values())


def test_the_rewrites_one_by_one(on_a_cpu, monkeypatch):
    monkeypatch.setattr(gpu, "correctness", lambda *_: [])
    monkeypatch.setattr(gpu, "graphs_on_and_off", lambda *_: {})
    found = on_a_cpu("--lowerings")
    assert found["left out"] == [] and "trainer" not in found and "curricula" not in found
    tried = {"without fuse_convolutions", "without stem_channels_last", "without any", "with fuse_cudnn", "as it is"}
    assert set(found["rows"][0]["ms"]) == tried


def test_what_fails_is_named_and_the_rest_is_measured(on_a_cpu, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("the card is gone")

    for name in ("correctness", "trainer", "HookBaseline"):
        monkeypatch.setattr(gpu, name, fails)
    found = on_a_cpu()
    assert found["left out"] == [
        "correctness: RuntimeError: the card is gone",
        "trainer: RuntimeError: the card is gone",
    ]
    row = found["rows"][0]
    assert row["hooks failed"] == "RuntimeError: the card is gone"
    assert set(row["ms"]) == {"ours", "recorded", "ours compiled", "recorded compiled"} and row["speedup"] == {}
    assert found["curricula"] == {"paper": {}}


def test_when_the_minutes_are_over_the_rest_is_named(on_a_cpu):
    found = on_a_cpu("--minutes", "0")
    assert found["rows"] == [] and found["left out"][0] == "correctness: no time left"
    assert found["left out"][-1] == "paper, stage 1: no time left"


def test_the_floor_counts_products_and_convolutions():
    """A convolution of 3 to 4 channels, 3x3, on 8x8: forward, and the gradient of its weights alone."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(256, 2, bias=False)
    )

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).sum()

    limits = {"operations a second": 1e9, "bytes a second": 1e30}
    found = gpu_floor.floor(Loss(), torch.randn(5, 3, 8, 8), torch.float32, limits)
    convolution, linear = 2 * 5 * 4 * 3 * 9 * 64, 2 * 5 * 256 * 2
    assert found["operations"] == 2 * convolution + 3 * linear
    assert found["floor ms"] == pytest.approx(1e3 * found["operations"] / 1e9)
    assert found["bytes"] > 4 * 5 * (3 + 4) * 64
    narrow = gpu_floor.floor(Loss(), torch.randn(5, 3, 8, 8), torch.float32, {**limits, "bytes a second": 1.0})
    assert narrow["floor ms"] == pytest.approx(1e3 * found["bytes"])


def test_pairs_of_the_table_are_there():
    assert list(gpu_ways.PAIRS) == [
        "paper",
        "resnet50-resnet18",
        "vit_b-vit_ti",
        "resnet50-mobilenet_v3_large",
        "resnet152-resnet50",
    ]
