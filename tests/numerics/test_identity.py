"""A run that broke off is resumed as the run it was: what decides its result is compared by name, and more epochs go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.errors import ConfigError
from indistill_fx.runs.checkpoint import load_checkpoint, save_checkpoint
from indistill_fx.runs.directory import LAST
from indistill_fx.training.distill import distill
from indistill_fx.training.identity import code_digest
from indistill_fx.training.supervised import train


class Net(nn.Module):
    def __init__(self, width: int, sign: float = 1.0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.a = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.b = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
            self.head, self.sign = nn.Linear(2 * width, 5), sign

    def forward(self, x: Tensor) -> Tensor:
        return self.sign * self.head(self.b(self.a(x)).mean((2, 3)))


class Turned(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(3))


class PowerCutError(Exception):
    pass


def loader(cut: int = 10**9, count: int = 64, batch: int = 16, seed: int = 0, mean: float = 0.5) -> MemoryLoader:
    images = torch.randint(256, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    left = [cut]

    class Cut(MemoryLoader):
        def _batches(self, skipped: int) -> Any:
            for one in super()._batches(skipped):
                left[0] -= 1
                if left[0] < 0:
                    raise PowerCutError
                yield one

    labels = torch.arange(count) % 5
    return Cut(images, labels, mean=(mean,) * 3, std=(0.2,) * 3, batch_size=batch, shuffle=True)


def run(place: Path | None, data: Any = None, student: nn.Module | None = None, **options: Any) -> nn.Module:
    student = student or Net(4)
    options = {"main": "kd", "epochs": 2, "curriculum": Curriculum(lengths=1)} | options
    saved = {"run_dir": place, "checkpoint_every_steps": 1} if place is not None else {}
    distill(Net(16), student, data or loader(), progress=False, device="cpu", **saved, **options)
    return student


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """In the second epoch, that of the second warm-up stage."""
    with pytest.raises(PowerCutError):
        run(tmp_path / "run", loader(cut=6))
    return tmp_path / "run"


CHANGES: dict[str, dict[str, Any]] = {
    "learning_rate": {"learning_rate": 0.1},
    "schedule": {"schedule": "cosine"},
    "main loss": {"main": "dist"},
    "main loss ": {"main_options": {"temperature": 9}},
    "main loss  ": {"main": lambda student, teacher, labels: student.logits.square().mean()},
    "warm-up loss": {"curriculum": Curriculum(lengths=1, loss="cosine")},
    "warm-up": {"curriculum": Curriculum(lengths=[1, 2])},
    "epochs": {"epochs": 1},
    "batch size": {"data": loader(batch=15)},
    "data": {"data": loader(seed=7)},
    "data ": {"data": loader(count=65)},
    "normalisation": {"data": loader(mean=0.4)},
    "code of the student": {"student": Net(4, sign=-3.0)},
    "code of the student ": {"student": Turned(4)},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_resume_under_another_is_refused_by_name(broken_off: Path, what: str) -> None:
    before = (broken_off / LAST).read_bytes()
    with pytest.raises(ConfigError, match=f"a run with other settings: {what.strip()} is ") as error:
        run(broken_off, resume=True, **CHANGES[what])
    assert f"--allow-changed {what.strip().replace(' ', '-').replace('_', '-')}" in str(error.value)
    assert (broken_off / LAST).read_bytes() == before


def test_pictures_on_disk_normalised_by_other_figures_are_another_run(tmp_path: Path) -> None:
    """The files are the same, and what the network sees is not."""
    for split in ("train", "test"):
        for number in range(4):
            (tmp_path / split / f"c{number % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (72, 72), (60 * number,) * 3).save(tmp_path / split / f"c{number % 2}" / f"{number}.png")

    def go(epochs: int, **figures: Any) -> None:
        opened = ifx.open_data(f"imagefolder:{tmp_path}", batch_size=2, size=72, **figures)
        train(
            Net(4),
            opened.train,
            epochs=epochs,
            progress=False,
            device="cpu",
            run_dir=tmp_path / "run",
            resume=epochs > 1,
        )

    go(1)
    with pytest.raises(ConfigError, match=r"normalisation is mean 0\.485.* there and mean 0\.5.* here"):
        go(2, mean="half")
    go(2)


def test_what_is_as_it_was_goes_on_and_a_change_that_is_asked_for_is_told(broken_off: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match=r"No setting called 'main los' may change.*Nearest: main loss"):
        run(broken_off, resume=True, allow_changed=["main los"])
    run(broken_off, resume=True, main="dist", allow_changed=["main-loss"])
    (change,) = json.loads((broken_off / "run.json").read_text())["changes"]
    assert (change["what"], change["from"], change["to"]) == ("main loss", "kd", "dist")
    with pytest.raises(ConfigError, match="but this is a new run"):
        run(broken_off.with_name("new"), allow_changed=["data"])


NO_DECAY = {"decay_norms": False, "optimizer": "adamw"}
OTHERWISE: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "an average": ({}, {"average": 0.9}, False),
    "no average": ({"average": 0.9}, {"average": 0.0}, False),
    "sgd, then adam": ({"optimizer": "sgd"}, {"optimizer": "adam"}, True),
    "adam, then sgd": ({"optimizer": "adam"}, {"optimizer": "sgd"}, True),
    "momentum": ({"optimizer": "sgd", "momentum": 0.0}, {"optimizer": "sgd", "momentum": 0.9}, True),
    "decay": (NO_DECAY, {**NO_DECAY, "weight_decay": 0.01}, True),
    "no decay": ({**NO_DECAY, "weight_decay": 0.01}, NO_DECAY, True),
    "more decay": ({**NO_DECAY, "weight_decay": 0.01}, {**NO_DECAY, "weight_decay": 0.02}, False),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_an_average_or_an_optimiser_that_is_allowed_to_change_begins_anew(tmp_path: Path, name: str) -> None:
    """`allow_changed` took these, and then the checkpoint did not fit: "`average/n_averaged` is absent there, not absent"."""
    before, after, anew = OTHERWISE[name]
    shared = {"curriculum": Curriculum(lengths=[]), "val_loader": loader()}
    with pytest.raises(PowerCutError):
        run(tmp_path, loader(cut=8), **shared, **before)
    allowed = ["optimizer", "momentum", "weight_decay", "average"]
    run(tmp_path, **shared, **after, resume=True, allow_changed=allowed)
    result = json.loads((tmp_path / "run.json").read_text())["result"]
    assert [epoch["steps"] for epoch in result["epochs"]] == [4, 4]
    assert ("a new optimiser" in " ".join(result["stages"][0]["notes"])) is anew
    averaged = [epoch["average"] is not None for epoch in result["epochs"]]
    assert averaged == [bool(before.get("average")), bool(after.get("average"))]


def test_a_finished_run_is_given_more_epochs_and_ends_as_one_that_always_had_them(tmp_path: Path) -> None:
    for main in ("kd", "crd"):  # crd has weights and a bank of its own
        place, options = tmp_path / main, {"negatives": 8} if main == "crd" else {}
        run(place, main=main, main_options=options)
        run(place, student=Net(4), main=main, main_options=options, epochs=5, resume=True)
        alone = run(None, main=main, main_options=options, epochs=5)
        for name, tensor in load_file(place / "student.safetensors").items():
            assert torch.equal(tensor, alone.state_dict()[name]), (main, name)
        told = json.loads((place / "run.json").read_text())
        assert [epoch["stage"] for epoch in told["result"]["epochs"]] == ["a", "b"] + 5 * ["main"]
        assert told["changes"][0]["what"] == "epochs"


def test_more_epochs_of_a_cosine_are_another_run(tmp_path: Path) -> None:
    run(tmp_path, schedule="cosine")
    with pytest.raises(ConfigError, match="a cosine's learning rates follow from it"):
        run(tmp_path, schedule="cosine", epochs=5, resume=True)


def test_a_checkpoint_of_a_finished_run_without_its_optimiser_can_have_more_epochs_too(tmp_path: Path) -> None:
    """Version 0.1.0 left it out at the end."""
    run(tmp_path)
    tensors, state = load_checkpoint(tmp_path / LAST)
    del state["phases"]
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("student/")}
    save_checkpoint(tmp_path / LAST, kept, state | {"optimizer": None})
    run(tmp_path, epochs=3, resume=True)
    told = json.loads((tmp_path / "run.json").read_text())
    assert [epoch["epoch"] for epoch in told["result"]["epochs"]] == [1, 1, 1, 2, 3]
    assert "a new optimiser" in told["result"]["stages"][-1]["notes"][0]


def test_a_checkpoint_without_run_json_is_not_written_over(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "run.json").unlink()
    before = (tmp_path / LAST).read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        run(tmp_path)
    assert (tmp_path / LAST).read_bytes() == before


def test_a_run_on_labels_knows_its_code_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"progress": False, "run_dir": tmp_path, "device": "cpu"}
    train(Net(4), loader(), epochs=1, **options)
    with pytest.raises(ConfigError, match="code of the student"):
        train(Turned(4), loader(), epochs=2, resume=True, **options)
    assert len(train(Net(4), loader(), epochs=2, resume=True, **options).epochs) == 2


def test_comments_and_weights_are_no_code() -> None:
    plain, commented = {}, {}
    exec("def loss(a, b):\n    return a - b\n", plain)
    exec("def loss(a, b):\n    return a - b\n", commented)
    assert code_digest(plain["loss"]) == code_digest(commented["loss"])
    one, other = ifx.trace(Net(4), torch.rand(2, 3, 16, 16)), ifx.trace(Net(4), torch.rand(3, 3, 16, 16))
    assert code_digest(one.graph_module) == code_digest(other.graph_module)
    assert code_digest(Net(4)) == code_digest(Net(4).eval()) != code_digest(Net(4, sign=2.0))
