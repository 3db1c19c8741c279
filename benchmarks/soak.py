"""Train for long in little time: many tiny runs with stages, epochs, checkpoints and resumes in one process, and watch what grows.

    python benchmarks/soak.py [--minutes 8] [--json FILE]

One round is a distillation on digits with a warm-up stage, a main stage, checkpoints and validation, then the same run
again from its middle. What a process keeps for good (caches, allocator pools) it has after the first rounds, so growth
is counted from the end of the first fifth to the end. Memory is the resident set after a collection; handles are open files.
Exit code 1 if memory grew by 1% or more, or a handle is left.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from kills import network

from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.system.signals import Interrupted
from indistill_fx.training.distill import distill


def measure() -> tuple[float, int, int]:
    """MiB resident, open files, live tensors."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tensors = sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd")), tensors


def round_of(data: Data, place: Path) -> int:
    """A run that is stopped half way and resumed; returns optimiser steps."""
    import signal

    from indistill_fx.training import loop

    original = loop.TrainingLoop._after_step

    def step(self: loop.TrainingLoop, *args: Any) -> None:
        if self.state.all_steps == 13:  # the fourteenth is about to be counted
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    def go() -> int:
        torch.manual_seed(0)
        record = distill(
            network(16, 32), network(8, 16), data.train, curriculum=Curriculum(lengths=[1, 1]), epochs=2, val_loader=data.test,
            run_dir=place, resume=True, progress=False, checkpoint_every_steps=3,
        )  # fmt: skip
        return record.steps

    loop.TrainingLoop._after_step = step  # type: ignore[method-assign]
    try:
        go()
    except Interrupted:
        pass
    finally:
        loop.TrainingLoop._after_step = original  # type: ignore[method-assign]
    return go()


def soak(minutes: float, place: Path) -> dict[str, Any]:
    """Rounds until the time is over."""
    data = open_data("digits", batch_size=64, limit=512)
    began, steps = time.monotonic(), 0
    rows: list[tuple[float, int, int]] = []
    while time.monotonic() - began < 60 * minutes or len(rows) < 10:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            steps += round_of(data, Path(folder) / "run")
        rows.append(measure())
    fifth = max(len(rows) // 5, 1)
    early, late = (statistics.median(row[0] for row in part) for part in (rows[fifth : 2 * fifth], rows[-fifth:]))
    return {
        "rounds": len(rows), "runs": 2 * len(rows), "optimiser steps": steps, "seconds": round(time.monotonic() - began, 1),
        "MiB early": round(early, 2), "MiB late": round(late, 2), "growth": round(late / early - 1, 5),
        "handles": [rows[fifth][1], rows[-1][1]], "tensors": [rows[fifth][2], rows[-1][2]],
        "MiB": [round(row[0], 1) for row in rows[:: max(len(rows) // 50, 1)]],
    }  # fmt: skip


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options.minutes, Path(folder))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), **versions, **result}
    print(json.dumps(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    grew = result["growth"] >= 0.01 or result["handles"][1] > result["handles"][0]
    sys.exit(1 if grew else 0)


if __name__ == "__main__":
    main()
