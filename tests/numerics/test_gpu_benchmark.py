"""benchmarks/gpu.py in small and without a GPU, so that it does not rot: what it compares is equal, and one failure costs one row."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu


@pytest.fixture
def on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        gpu.torch, "compile", lambda module, **options: module
    )  # compiling takes minutes, and is tested elsewhere
    monkeypatch.setattr(gpu, "trainer", lambda device, tiny: {"pool": 1.0})  # tests/unit/test_train.py runs the trainer

    def run() -> dict:
        path = tmp_path / "gpu.json"
        arguments = ["gpu", "--tiny", "--pairs", "paper", "--steps", "1", "--json", str(path)]
        monkeypatch.setattr(gpu.sys, "argv", arguments)
        gpu.main()
        return json.loads(path.read_text())

    return run


def test_stages_are_those_of_float64_and_two_runs_agree_to_the_bit(on_a_cpu):
    found = on_a_cpu()
    assert found["left out"] == []
    assert len(found["correctness"]) == 3
    assert all(row["loss"] < 1e-5 and row["gradients"] < 1e-3 for row in found["correctness"])
    assert found["recorded beside eager, losses"] == {"pool": 0.0, "pool@2": 0.0, "pool@3": 0.0}
    assert set(found["rows"][0]["ms"]) == {"hooks", "ours", "hooks compiled", "ours compiled"}
    assert found["trainer, steps a second"] == {"pool": 1.0}


def test_what_fails_is_named_and_the_rest_is_measured(on_a_cpu, monkeypatch):
    def fails(*_: object) -> None:
        raise RuntimeError("the card is gone")

    monkeypatch.setattr(gpu, "correctness", fails)
    monkeypatch.setattr(gpu, "HookBaseline", fails)
    found = on_a_cpu()
    assert found["left out"] == ["correctness: RuntimeError: the card is gone"]
    row = found["rows"][0]
    assert row["hooks failed"] == "RuntimeError: the card is gone"
    assert set(row["ms"]) == {"ours", "ours compiled"} and row["speedup"] == {}
