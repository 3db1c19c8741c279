"""A reading process dies, a rank dies, a loader ends early, the clock jumps: the run says so, and its checkpoint is good."""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from indistill_fx.data.foreign import repeatable
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.runs import directory as record
from indistill_fx.runs.directory import LAST
from indistill_fx.training.supervised import train
from tests.faults.harness import ROOT, finishes_as_if_nothing_happened, network, run, steps_saved


def test_a_loader_that_ends_before_its_length_is_told() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 5

    batches = Short([(torch.zeros(4, 1, 6, 6), torch.zeros(4, dtype=torch.long))] * 2)
    with pytest.raises(ConfigError, match="says it has 5 batches and ended after 2"):
        train(network(), batches, epochs=1, progress=False)


SCRIPT = """
import os, signal, sys
import torch
from tests.faults.harness import run
from indistill_fx.training import loop

original = loop.TrainingLoop._after_step
def step(self, *args):
    if self.state.all_steps == 6 and int(os.environ["RANK"]) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    original(self, *args)
loop.TrainingLoop._after_step = step
torch.set_num_threads(1)
from pathlib import Path
from indistill_fx.errors import IndistillError
try:
    run(Path(sys.argv[1]), device="cpu")
except IndistillError as error:
    print("told:", error, file=sys.stderr, flush=True)
    sys.exit(2)
"""


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_with_a_message(tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += ["--monitor-interval=10", str(script)]  # time to tell, before torchrun ends the others
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    place = tmp_path / "run"
    done = subprocess.run(
        [*launch, str(place), "1"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    assert "told: Another of the 2 processes of this run has ended" in done.stderr, done.stderr[-3000:]
    assert 1 <= steps_saved(place) <= 6
    assert json.loads((place / "run.json").read_text())["status"] == "failed"


READING = """
import os, signal, sys, time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
from indistill_fx.errors import TrainError
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.training.supervised import train
from tests.faults.harness import network, steps_saved

class Deadly(Dataset):
    "The worker that reads one of the samples is killed, as by the kernel when memory runs out."
    def __len__(self):
        return 40
    def __getitem__(self, index):
        if index == (30 if sys.argv[3] == "later" else 0) and torch.utils.data.get_worker_info() is not None:
            while sys.argv[3] == "later" and steps_saved(Path(sys.argv[1])) < 1:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(1, 6, 6) + index, index % 3

torch.set_num_threads(1)
ours = sys.argv[2] == "ours"
loader = DiskLoader(Deadly(), batch_size=8, workers=1) if ours else DataLoader(Deadly(), 8, num_workers=1)
try:
    train(network(), loader, epochs=2, run_dir=sys.argv[1], progress=False, checkpoint_every_steps=1)
except TrainError as error:
    print("told:", error, file=sys.stderr, flush=True)
    os._exit(2)
"""


@pytest.mark.parametrize(("whose", "when"), [("ours", "later"), ("torch's", "later"), ("ours", "at once")])
def test_a_worker_that_dies_is_told_and_the_checkpoint_is_good(whose: str, when: str, tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(READING)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    place = tmp_path / "run"
    command = [sys.executable, str(script), str(place), whose, when]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    assert re.search(r"told: .*process that reads the data has died: DataLoader worker \(pid", done.stderr, re.DOTALL)
    assert "--resume" in done.stderr
    if when == "at once":  # while the data are looked at, before the run begins
        assert not (place / "run.json").exists()
        return
    assert 1 <= steps_saved(place) <= 3
    told = json.loads((place / "run.json").read_text())
    assert told["status"] == "failed" and "has died" in told["error"]


def test_a_worker_whose_death_is_told_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's handler of the signal raises at whatever place the program is: here, as the last checkpoint is synced."""
    seen = 0

    def told(path: Path) -> None:
        nonlocal seen
        saved = path == tmp_path / "run" / "checkpoints"
        seen += saved
        if saved and seen == 5:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    monkeypatch.setattr("indistill_fx.system.files._sync", told)
    with pytest.raises(TrainError, match=r"has died: DataLoader worker \(pid 5\)"):
        run(tmp_path / "run", module=network())
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed"
    assert not list((tmp_path / "run").rglob("*.draft"))
    monkeypatch.undo()
    finishes_as_if_nothing_happened(tmp_path / "run")


@pytest.mark.parametrize("later", [True, False])
def test_a_connection_that_ends_is_a_dead_worker_only_if_torch_says_so(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(list[Any]):
        def __iter__(self) -> Any:
            raise ConnectionResetError("reset by peer")

    def news(seconds: float) -> None:
        if later:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    monkeypatch.setattr("indistill_fx.data.readers.time.sleep", news)
    loader = repeatable(Broken([0]), 0, "train loader")
    if later:
        with pytest.raises(TrainError, match=r"has died: DataLoader worker \(pid 5\)"):
            list(loader)
    else:
        with pytest.raises(ConnectionResetError, match="reset by peer"):
            list(loader)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back to 1970 and on to 2100, at every look: a run goes by its steps, and times itself by another clock."""
    dice, place = random.Random(0), tmp_path / "run"

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return datetime.datetime.fromtimestamp(dice.uniform(0, 4e9), tz)

    monkeypatch.setattr(time, "time", lambda: dice.uniform(0, 4e9))
    monkeypatch.setattr(record, "datetime", Jumping)
    done = run(place, module=network())
    assert all(0 <= epoch.seconds < 600 for epoch in done.epochs)
    for path in place.rglob("*"):
        os.utime(path, (dice.uniform(0, 4e9),) * 2)
    assert steps_saved(place) == 15
    (place / "student.safetensors").unlink()
    finishes_as_if_nothing_happened(place)
    assert (place / LAST).exists()
