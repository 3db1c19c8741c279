"""benchmarks/gpu.py in small and without a GPU, so that it does not rot: what it compares is equal, and one failure costs one row."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch

from benchmarks import gpu, gpu_floor, gpu_table, gpu_ways


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


PLAIN, COMPILED = {"hooks", "ours", "recorded"}, {"hooks compiled", "ours compiled", "recorded compiled"}


def test_what_is_checked_holds_and_every_way_is_timed(on_a_cpu):
    found = on_a_cpu()
    assert found["left out"] == []
    assert len(found["correctness"]) == 3
    for row in found["correctness"]:
        assert row["ours"]["loss"] < 1e-5 and row["ours"]["gradients"] < 1e-4
        assert row["hooks"]["loss"] < 1e-5 and row["hooks"]["gradients"] < 1e-4
    for row in found["reduced precision"]:
        assert all(row["ours"][what] < 2 * row["hooks"][what] + 1e-3 for what in ("loss", "gradients"))
    assert found["graphs on and off"] == {"pool": 0.0, "pool@2": 0.0, "pool@3": 0.0}
    assert found["data on the device and off"] == {"batches": 3, "tensors that differ": 0}
    assert set(found["rows"][0]["ms"]) == PLAIN and set(found["curricula"]["paper"]) == PLAIN | {"stages"}
    assert set(found["compiled"][0]["ms"]) == COMPILED | {"hooks", "recorded"}
    assert found["compiled curricula"]["paper"]["beside hooks compiled"] > 0
    assert found["ceilings"]["operations a second"] > 0
    trained = found["trainer"]
    assert set(trained) == {"recorded", "as they are"}
    assert all(rate > 0 for rate in trained["as they are"]["steps a second"].values())
    assert trained["recorded"]["losses"] == trained["as they are"]["losses"]
    assert found["recipe"]["epochs"] == 70
    shown = {work: value for work, (value, _) in found["goals"].items()}
    measured = [work for work, value in shown.items() if value != gpu_table.NOT]
    assert len(shown) == 11 and len(measured) == 7


def test_the_rewrites_one_by_one(on_a_cpu, without_checks):
    found = on_a_cpu("--lowerings")
    assert found["left out"] == [] and "trainer" not in found and "curricula" not in found and not found["compiled"]
    tried = {"without fuse_convolutions", "without stem_channels_last", "without any", "with fuse_cudnn", "as it is"}
    assert set(found["rows"][0]["ms"]) == tried | {"with channels_last"}


@pytest.fixture
def without_checks(monkeypatch):
    monkeypatch.setattr(gpu.Session, "check", lambda self: None)


def test_what_fails_is_named_and_the_rest_is_measured(on_a_cpu, without_checks, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(gpu, "trainer", fails)
    monkeypatch.setattr(gpu_ways, "HookBaseline", fails)
    found = on_a_cpu()
    assert found["left out"] == ["trainer: RuntimeError: the card is gone"]
    row = found["rows"][0]
    assert row["hooks failed"] == "RuntimeError: the card is gone"
    assert set(row["ms"]) == {"ours", "recorded"} and row["speedup"] == {}
    assert found["curricula"] == {"paper": {"stages": [1]}}
    assert set(found["compiled"][0]["ms"]) == {"recorded", "ours compiled", "recorded compiled"}


def test_when_the_minutes_are_over_the_rest_is_named(on_a_cpu):
    found = on_a_cpu("--minutes", "0")
    assert found["rows"] == [] and found["left out"][0] == "correctness: no time left"
    assert found["left out"][-1] == "paper, models: no time left"


def test_what_takes_longer_than_there_is_time_is_interrupted(on_a_cpu, monkeypatch):
    def waits(*_: object) -> None:
        try:
            time.sleep(600)
        except Exception:
            pytest.fail("it is no failure of what is measured")

    monkeypatch.setattr(gpu, "correctness", waits)
    found = on_a_cpu("--minutes", "0.01")
    assert found["left out"][0] == "correctness: no time left to end it"
    assert found["rows"] == [] and signal.getitimer(signal.ITIMER_REAL)[0] == 0


def row(number: int, **ms: float) -> dict:
    found = {
        "pair": "resnet50-resnet18",
        "number": number,
        "stage": f"layer{number}",
        "batch": 128,
        "dtype": "bfloat16",
    }
    times = {name.replace("_", " "): value for name, value in ms.items()}
    speedup = {name: times["hooks"] / value for name, value in times.items()}
    return {
        **found,
        "ms": times,
        "speedup": speedup,
        "images a second": {name: 128e3 / ms for name, ms in times.items()},
    }


def test_the_tables_of_a_measurement():
    rows = [row(1, hooks=20.0, ours=10.0, recorded=8.0), row(4, hooks=24.0, ours=24.0, recorded=12.0)]
    rows[1]["ours over the floor"] = 1.5
    rows[0] |= {"ours peak MiB": 100.0, "recorded peak MiB": 105.0}
    compiled = [row(1, hooks=20.0, recorded=8.0, hooks_compiled=10.0, recorded_compiled=5.0)]
    found = {
        "about": {"device": "a card", "torch": "2.11.0", "cuda": "13.0", "cudnn": 91002, "driver": "580", "date": "now",
                  "command": "python -m benchmarks.gpu"},
        "rows": rows, "compiled": compiled, "curricula": gpu_table.curricula(rows),
        "compiled curricula": gpu_table.curricula(compiled), "left out": ["paper, models: no time left"],
    }  # fmt: skip
    told = "\n".join(gpu_table.table(found))
    assert "2.57" not in told and "| 4.00× (recorded compiled, stages 1), 2.00× | ≥ 2.2×, ≥ 1.4× |" in told
    assert found["curricula"]["resnet50-resnet18"]["recorded"] == (3 * 20 + 6 * 24) / (3 * 8 + 6 * 12)
    assert "| 1.50× | ≤ 1.6× |" in told and "| 105% | ≤ 110% |" in told
    assert "| work, a card |" in told and "torch 2.11.0" in told and "Left out: paper, models: no time left." in told
    assert "20.00 (1.00×; 6400/s; 100 MiB)" not in told and "10.00 (2.00×; 12800/s; 100 MiB)" in told


def test_the_page_shows_what_was_measured_and_nothing_else():
    """After a measurement: `python -m benchmarks.gpu_table`."""
    found = json.loads(gpu_table.RESULTS.read_text()) if gpu_table.RESULTS.exists() else {}
    page = gpu_table.PAGE.read_text(encoding="utf-8")
    shown = page.partition(gpu_table.MARKS[0])[2].partition(gpu_table.MARKS[1])[0]
    assert shown.strip().splitlines() == gpu_table.table(found)
    assert page.index(gpu_table.MARKS[0]) < page.index("## On a CPU")


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
        "resnet50-resnet18, float32",
    ]
    assert {(name, number) for name, task in gpu_ways.PAIRS.items() for number in task.stages} == set(gpu_ways.COMPILED)
