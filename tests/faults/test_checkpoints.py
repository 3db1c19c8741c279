"""Checkpoints and run directories that are torn, foreign, or of another version: refused with a reason, and never waited for."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from indistill_fx.errors import ConfigError
from indistill_fx.report import run_page
from indistill_fx.runs.directory import LAST
from indistill_fx.runs.load import load_run
from tests.faults.harness import Victims, finishes_as_if_nothing_happened, run, steps_saved


@pytest.fixture(scope="module")
def half_done(tmp_path_factory: pytest.TempPathFactory, victims: Victims) -> Path:
    place = tmp_path_factory.mktemp("half") / "run"
    assert victims.run("gone_after_eight_steps", place) == 5
    assert steps_saved(place) == 8
    return place


@pytest.fixture
def place(half_done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(half_done, tmp_path / "run"))


def rewritten(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
    changed = change(state)
    save_file(load_file(path), path, metadata={"state": json.dumps(state if changed is None else changed)})


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is not a checkpoint"),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "is not a checkpoint"),
    "one byte short": (lambda p: os.truncate(p, p.stat().st_size - 1), "is not a checkpoint"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "is not a checkpoint"),
    "noise": (lambda p: p.write_bytes(random.Random(0).randbytes(5000)), "is not a checkpoint"),
    "a folder": (folder, "is not a checkpoint"),
    "a pipe nobody writes": (fifo, "is not a checkpoint of a run: it is a named pipe, not a file"),
    "a header that promises more": (lambda p: p.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"), "is not a checkpoint"),
    "no state": (lambda p: save_file(load_file(p), p), "is not a checkpoint"),
    "a state that is a list": (lambda p: rewritten(p, lambda s: [1, 2]), "is not a checkpoint"),
    "a state without parts": (lambda p: rewritten(p, lambda s: {"x": 1}), "is not a checkpoint"),
    "a step that is text": (lambda p: rewritten(p, lambda s: s["state"].update(steps="8")), "no fitting 'steps'"),
    "a field of tomorrow": (lambda p: rewritten(p, lambda s: s["state"].update(mood=1)), "no fitting 'mood'"),
    "a later version": (lambda p: rewritten(p, lambda s: s.update(schema_version=2)), "later version.*format 2"),
    "another optimiser": (lambda p: rewritten(p, lambda s: s["optimizer"].update({"99/step": 1})), "another optimiser"),
    "another run": (lambda p: rewritten(p, lambda s: s["identity"].update(seed=5)), "a run with other settings: seed is 5"),
    "a tensor less": (
        lambda p: save_file({k: v for k, v in load_file(p).items() if "weight" not in k}, p, metadata={"state": header(p)["state"]}),
        "another model",
    ),
}  # fmt: skip


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_with_the_reason(how: str, place: Path) -> None:
    damage, reason = BROKEN[how]
    kept = (place / LAST).read_bytes()
    damage(place / LAST)
    with pytest.raises(ConfigError, match=reason) as caught:
        run(place)
    assert str(place / LAST) in str(caught.value) or caught.value.where in str(caught.value)
    if (place / LAST).is_dir():
        (place / LAST).rmdir()
    else:
        (place / LAST).unlink()
    (place / LAST).write_bytes(kept)  # nothing else of the run was touched
    finishes_as_if_nothing_happened(place)


STORIES = {
    "gone": None,
    "torn": b'{"status": "runn',
    "a list": b"[]",
    "numbers of 5,000 digits": b'{"resumed": ' + b"1" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "not text": b"\xff\xfe\x00",
    "words for numbers": b'{"resumed": "often", "teacher_accuracy": "high", "started": 4, "schedule": 7, "about": []}',
}


@pytest.mark.parametrize("story", STORIES)
def test_a_broken_run_json_stops_neither_resuming_nor_the_page(story: str, place: Path) -> None:
    content = STORIES[story]
    (place / "run.json").unlink()
    if content is not None:
        (place / "run.json").write_bytes(content)
    assert "</html>" in run_page(place)
    with pytest.raises(ConfigError, match="does not say which model"):
        load_run(place)
    finishes_as_if_nothing_happened(place)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl"])
def test_a_pipe_in_a_run_directory_is_not_waited_for(name: str, place: Path, victims: Victims) -> None:
    (place / name).unlink(missing_ok=True)
    os.mkfifo(place / name)
    assert victims.run("reads_a_run", place, seconds=30) == 6


@pytest.mark.parametrize(
    "lines",
    [
        b"null\n",
        b"5\n",
        b'{"epochs": "x", "step": []}\n',
        b"[" * 50_000 + b"\n",
        b"\xff\n",
        b'{"epochs": 0, "step": 1}',
    ],
)
def test_odd_lines_of_metrics_are_dropped_when_a_run_goes_on(lines: bytes, place: Path) -> None:
    before = (place / "metrics.jsonl").read_bytes()
    (place / "metrics.jsonl").write_bytes(lines + before if lines.endswith(b"\n") else before + lines)
    finishes_as_if_nothing_happened(place)
    assert len((place / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_of_a_later_version_is_refused(place: Path) -> None:
    told = json.loads((place / "run.json").read_text())
    assert told["schema_version"] == 1
    (place / "run.json").write_text(json.dumps(told | {"schema_version": 2}))
    with pytest.raises(ConfigError, match="later version"):
        run(place)


def test_weights_that_are_not_finite_are_never_saved_over_good_ones(place: Path) -> None:
    from indistill_fx.errors import TrainError
    from tests.faults.harness import network

    module = network()
    with pytest.raises(TrainError, match=r"is not finite|the loss is"):
        run(place, module=Poisoned(module), allow_changed=["code of the student"])
    assert steps_saved(place) >= 8


class Poisoned(torch.nn.Sequential):
    """After a few steps everything is NaN."""

    def __init__(self, module: torch.nn.Module):
        super().__init__(*module)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x) * (float("nan") if self.calls > 4 else 1.0)
