"""A run so small that a fault costs milliseconds, children to be killed, and disks to be filled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.runs.checkpoint import load_checkpoint
from indistill_fx.runs.directory import LAST, STUDENT
from indistill_fx.runs.record import RunRecord
from indistill_fx.training.supervised import train

EPOCHS, SAMPLES, BATCH = 3, 40, 8
ROOT = Path(__file__).parents[2]
STEPS = EPOCHS * SAMPLES // BATCH


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def loader() -> MemoryLoader:
    images = torch.randint(256, (SAMPLES, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return MemoryLoader(images, torch.arange(SAMPLES) % 3, mean=(0.5,), std=(0.2,), batch_size=BATCH, shuffle=True)


def run(place: Path | None, seed: int = 0, module: nn.Module | None = None, **options: Any) -> RunRecord:
    """Train, or go on; every step is saved where there is a directory."""
    saved = {"run_dir": place, "resume": True, "checkpoint_every_steps": 1} if place is not None else {}
    return train(module or network(seed), loader(), epochs=EPOCHS, progress=False, **(saved | options))


def weights_alone() -> dict[str, Tensor]:
    """The weights of a run that nothing happened to."""
    module = network()
    run(None, module=module)
    return module.state_dict()


def steps_saved(place: Path) -> int:
    """Where the checkpoint stands; it must be readable."""
    return int(load_checkpoint(place / LAST)[1]["state"]["all_steps"])


def finishes_as_if_nothing_happened(place: Path) -> None:
    """Resumed by a process with other weights, the run ends with the bits of one that was left alone."""
    run(place, seed=9)
    found, wanted = load_file(place / STUDENT), weights_alone()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert list(place.rglob("*.draft")) == []


class Victims:
    """Children of one process without threads (`zygote.py`): they can be killed, and waited for no longer than a time."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=environment,
        )  # fmt: skip

    def start(self, name: str, *args: object) -> int:
        """A child that does what `victims.py` says under that name."""
        return int(self._ask({"call": name, "args": [str(a) if isinstance(a, Path) else a for a in args]}))

    def end(self, child: int, seconds: float = 60) -> object:
        """Its exit code, -9 if it was killed, `hung` if it had to be."""
        return self._ask({"wait": child, "seconds": seconds})

    def run(self, name: str, *args: object, seconds: float = 60) -> object:
        """Both."""
        return self.end(self.start(name, *args), seconds)

    def close(self) -> None:
        """No more of them."""
        self._zygote.stdin.close()  # type: ignore[union-attr]
        self._zygote.wait(60)
        self._zygote.stdout.close()  # type: ignore[union-attr]

    def _ask(self, wish: dict[str, object]) -> Any:
        self._zygote.stdin.write(json.dumps(wish) + "\n")  # type: ignore[union-attr]
        self._zygote.stdin.flush()  # type: ignore[union-attr]
        return json.loads(self._zygote.stdout.readline())  # type: ignore[union-attr]


@contextmanager
def disk(place: Path, kibibytes: int) -> Iterator[Callable[[str], None]]:
    """A small disk of its own at `place`; yields a function that mounts it again with other options."""
    place.mkdir(exist_ok=True)

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", *options, "tmpfs", str(place)]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    if not mount("-o", f"size={kibibytes}k"):
        pytest.skip("a tmpfs cannot be mounted here: needs root")
    try:
        yield lambda options: pytest.skip("no remount") if not mount("-o", f"remount,{options}") else None
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
