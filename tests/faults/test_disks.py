"""Disks that fill up or may not be written: an error that says so, and what was there before is still there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.decoding import decode
from indistill_fx.data.image_folders import list_images
from indistill_fx.deploy.save_pt2 import save_program
from indistill_fx.errors import ConfigError, ExportError, IndistillError, TrainError
from indistill_fx.plan import AlignmentPlan, ModelStamp
from indistill_fx.system.files import write
from tests.faults.harness import disk, finishes_as_if_nothing_happened, network, run, steps_saved


def fill(place: Path) -> Path:
    """Not a byte is left."""
    ballast = place / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast


def test_a_disk_that_fills_up_during_training(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 400):
        place, steps = tmp_path / "disk" / "run", [0]
        from indistill_fx.training import loop

        original = loop.TrainingLoop._after_step
        ballast: list[Path] = []

        def step(self: loop.TrainingLoop, *args: object) -> None:
            steps[0] += 1
            if steps[0] == 6:
                ballast.append(fill(tmp_path / "disk"))
            original(self, *args)

        loop.TrainingLoop._after_step = step  # type: ignore[method-assign]
        try:
            with pytest.raises(TrainError, match=r"No space left on device.*What was there before is unchanged"):
                run(place)
        finally:
            loop.TrainingLoop._after_step = original  # type: ignore[method-assign]
        assert steps_saved(place) == 5
        ballast[0].unlink()
        finishes_as_if_nothing_happened(place)


def test_a_disk_that_becomes_read_only_during_training(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 400) as remount:
        place = tmp_path / "disk" / "run"
        run(place)
        before = (place / "checkpoints" / "last.safetensors").read_bytes()
        remount("ro")
        with pytest.raises(ConfigError, match=r"cannot be used for a run: Read-only file system"):
            run(place)
        with pytest.raises(ConfigError, match=r"cannot be used for a run"):
            run(tmp_path / "disk" / "other")
        remount("rw")
        assert (place / "checkpoints" / "last.safetensors").read_bytes() == before


def test_a_run_folder_that_is_deleted_during_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice to free some space was all there was."""
    from torch.optim import Adam

    place, step = tmp_path / "runs" / "one", Adam.step

    def gone(self: Adam, *args: object) -> object:
        shutil.rmtree(place.parent, ignore_errors=True)
        return step(self, *args)

    monkeypatch.setattr(Adam, "step", gone)
    with pytest.raises(
        TrainError, match=rf"the folder {place.parent} is gone\. It was deleted, renamed or unmounted"
    ) as caught:
        run(place)
    assert "space" not in str(caught.value)


@pytest.mark.parametrize("share", [0.8, 1.4])
def test_a_disk_that_becomes_full_is_no_fault_of_the_model_that_is_quantised(share: float, tmp_path: Path) -> None:
    """The advice was to try the other method. On the larger disk onnxruntime cuts a file short, and cannot read it again."""
    net = nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3)
    )
    float_file, batches = tmp_path / "float.onnx", [(torch.randn(4, 1, 6, 6), torch.arange(4) % 3)]
    ifx.export_onnx(net, float_file, torch.zeros(2, 1, 6, 6))
    with disk(tmp_path / "disk", int(share * float_file.stat().st_size) >> 10):
        with pytest.raises(ExportError) as caught:
            ifx.quantize_onnx(float_file, tmp_path / "disk" / "int8.onnx", evaluation=batches, calibration=batches)
        assert str(caught.value) == (
            f"onnxruntime cannot quantise `{float_file}`: No space left on device. Free some space, and try again."
        )
        assert os.listdir(tmp_path / "disk") == []


def plan() -> AlignmentPlan:
    stamp = ModelStamp(name="A" * 4000, fingerprint="0")
    return AlignmentPlan(teacher=stamp, student=stamp, pairs=(), unmatched=("x" * 4000,))


def cached(path: Path) -> None:
    from PIL import Image

    folder = path.parent.parent / "images"
    for kind in "ab":
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for n in range(4):
            Image.new("RGB", (32, 32), (n, n, n)).save(folder / kind / f"{n}.png")
    decode(list_images(folder), (32, 32), cache=path.parent)


WRITERS: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: plan().save(path),
    "page": lambda path: write(path, "x" * 20_000),
    "picture": lambda path: write(path, b"x" * 20_000),
    "program": lambda path: save_program(network().eval(), (torch.zeros(2, 1, 6, 6),), path),
    "onnx": lambda path: ifx.export_onnx(network(), path, torch.zeros(2, 1, 6, 6)),
    "cache": cached,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_that_the_disk_is_full_and_keeps_what_was_there(name: str, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", 64) as remount:
        target = tmp_path / "disk" / "target"
        target.write_text("old")
        fill(tmp_path / "disk")
        for _ in range(2):
            with pytest.raises((ConfigError, ExportError)) as caught:
                WRITERS[name](target)
            assert isinstance(caught.value, IndistillError)
            assert target.read_text() == "old"
            assert sorted(os.listdir(tmp_path / "disk")) == ["ballast", "target"]
            remount("ro")  # and the second time, that it may not be written
