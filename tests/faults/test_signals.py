"""Signals to a whole group of processes, notices that ask to save, and a standard error that nobody reads: no work is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import indistill_fx as ifx
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from tests.faults.harness import EPOCHS, ROOT, STEPS, finishes_as_if_nothing_happened, steps_saved

SCRIPT = """
import os, sys
import torch
from torch.utils.data import DataLoader, Dataset
from pathlib import Path
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.runs.directory import RunDirectory
from indistill_fx.system.signals import Interrupted
from indistill_fx.training import loop
from indistill_fx.training.supervised import train
from tests.faults.harness import loader, network, run

place, kind, number, target = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)

class Samples(Dataset):
    randomness = None

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return torch.full((1, 6, 6), float(index)), index % 3

def step(self, *args):
    if self.state.all_steps == 6:  # the seventh is about to be counted
        os.kill(os.getpid(), number) if target == "self" else os.killpg(os.getpgrp(), number)
    original(self, *args)

original = loop.TrainingLoop._after_step
loop.TrainingLoop._after_step = step
data = {
    "memory": loader,
    "ours": lambda: DiskLoader(Samples(), batch_size=8, workers=2),
    "theirs": lambda: DataLoader(Samples(), batch_size=8, num_workers=2),
    "theirs, living on": lambda: DataLoader(Samples(), batch_size=8, num_workers=2, persistent_workers=True),
}[kind]()
try:
    train(network(), data, epochs=3, run_dir=place)
except Interrupted as stopped:
    sys.exit(40 if stopped.number == number else 4)
"""


def ends_with(python: Path | str, place: Path, kind: str, number: int, target: str = "group", **pipes: Any) -> int:
    script = place.with_name("work.py")
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [python, str(script), str(place), kind, str(int(number)), target]
    return subprocess.run(
        command, env=environment, start_new_session=True, timeout=120, check=False, **({"stderr": subprocess.DEVNULL} | pipes)
    ).returncode  # fmt: skip


def story(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["ours", "theirs", "theirs, living on"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_group_spares_the_readers_until_the_step_is_saved(
    number: int, kind: str, tmp_path: Path, commands: Path
) -> None:
    place = tmp_path / "run"
    assert ends_with(commands / "python", place, kind, number) == 40
    assert steps_saved(place) == 7 and story(place)["status"] == "stopped"


def test_a_terminal_that_goes_away_saves_too(tmp_path: Path, commands: Path) -> None:
    place = tmp_path / "run"
    assert ends_with(commands / "python", place, "memory", signal.SIGHUP) == 40
    assert steps_saved(place) == 7 and story(place)["status"] == "stopped"
    finishes_as_if_nothing_happened(place)


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    place = tmp_path / "run"
    preexec = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert ends_with(sys.executable, place, "memory", signal.SIGHUP, preexec_fn=preexec) == 0
    assert story(place)["status"] == "done"


def test_a_notice_saves_and_goes_on(tmp_path: Path, commands: Path) -> None:
    place = tmp_path / "run"
    with (tmp_path / "err").open("w") as err:
        assert ends_with(commands / "python", place, "ours", signal.SIGUSR1, stderr=err) == 0
    assert "Saved after 7 steps, because of a signal." in (tmp_path / "err").read_text()
    assert story(place)["status"] == "done" and story(place)["result"]["steps"] == STEPS


@pytest.mark.parametrize("how", ["closed", "full", "a pipe nobody reads"])
def test_a_standard_error_that_takes_nothing_costs_no_work(how: str, tmp_path: Path, commands: Path) -> None:
    place = tmp_path / "run"
    if how == "closed":
        done = ends_with(sys.executable, place, "memory", 0, stderr=None, preexec_fn=lambda: os.close(2))
    elif how == "full":
        with open("/dev/full", "w") as err:
            done = ends_with(commands / "python", place, "memory", 0, stderr=err)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = ends_with(commands / "python", place, "memory", 0, stderr=writing)
        os.close(writing)
    assert done == 0 and len(story(place)["result"]["epochs"]) == EPOCHS


class Stopping:
    """Validation data that are told to stop while they are read for the second time by the student that is trained."""

    def __init__(self, batches: list[Any], at: int | None) -> None:
        self.batches, self.at, self.read = batches, at, 0

    def __iter__(self) -> Any:
        self.read += 1
        if self.read == self.at:
            signal.raise_signal(signal.SIGINT)
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def test_a_signal_in_the_last_validation_begins_no_further_run(tmp_path: Path) -> None:
    batches = [(torch.randn(6, 1, 8, 8), torch.arange(6))]

    def compared(folder: Path, at: int | None, resume: bool = False) -> tuple[Any, Stopping]:
        torch.manual_seed(0)
        teacher, student, validation = DigitsTeacher(), DigitsStudent(), Stopping(batches, at)
        arms = ifx.compare(
            teacher, student, batches, epochs=2, curriculum=ifx.Curriculum(lengths=1, together=True), val_loader=validation, run_dir=folder,
            resume=resume, progress=False,
        )  # fmt: skip
        return arms, validation

    whole, validation = compared(tmp_path / "whole", None)
    last = (validation.read + 1) // 3  # of the first of three arms
    with pytest.raises(KeyboardInterrupt):
        compared(tmp_path / "stopped", last)
    assert sorted(path.name for path in (tmp_path / "stopped").iterdir() if path.is_dir()) == ["labels"]
    resumed, _ = compared(tmp_path / "stopped", None, resume=True)
    for name, arm in whole.items():
        assert [stage.losses for stage in resumed[name].record.stages] == [stage.losses for stage in arm.record.stages]
