"""Kill a training run with SIGKILL at random moments and resume it, until it is done; then compare with a run left alone.

    python benchmarks/kills.py --kills 20 --json benchmarks/results/kills.json

After every kill the checkpoint is read back. In the end the weights must have the same bits as those of the run that was
left alone. Children are forked, so that a kill costs no new import of torch: run it with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from indistill_fx.curriculum import Curriculum
from indistill_fx.data.open import open_data
from indistill_fx.runs.checkpoint import load_checkpoint
from indistill_fx.runs.directory import LAST, STUDENT
from indistill_fx.runs.record import environment
from indistill_fx.training.distill import distill


def network(first: int, second: int) -> nn.Module:
    """Two blocks for 8x8 digits, with dropout, so that the random state matters."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, first, 3, padding=1), nn.BatchNorm2d(first), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(first, second, 3, padding=1), nn.BatchNorm2d(second), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * second, 10),
    )


def run(run_dir: Path | None) -> None:
    """Distil, or go on distilling. Without a directory: only set up, which loads all the code that a fork then has."""
    torch.manual_seed(0)
    teacher, student = network(16, 32), network(8, 16)
    data = open_data("digits", batch_size=64)
    if run_dir is None:
        distill(teacher, student, data.train, curriculum=Curriculum(lengths=[]), epochs=0, progress=False)
        return
    distill(
        teacher, student, data.train, epochs=4, val_loader=data.test, run_dir=run_dir, resume=True, progress=False,
        checkpoint_every_steps=5,
    )  # fmt: skip


def in_child(work: Callable[[], None], *, kill_after: float | None) -> bool:
    """Do it in a forked process; returns whether it ended by itself, and well."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        torch.set_num_threads(1)  # see attacks.py: else autograd's threads race for the pool that the fork lost
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    if kill_after is not None:
        ends = time.monotonic() + kill_after
        while time.monotonic() < ends:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return _well(status)
            time.sleep(0.002)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return _well(status)


def _well(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with exit code {code}")
    return code == 0


def trial(folder: Path, kills: int, seed: int, work: Callable[[Path], None] = run) -> dict[str, Any]:
    """Kill and resume until so many kills have hit.

    Args:
        folder: for the runs.
        kills: how many.
        seed: of the moments.
        work: trains in a run directory; called again it goes on.

    Returns:
        kills, runs, unreadable checkpoints, runs whose weights differ in any bit, and drafts left when runs were done.
    """
    moments = random.Random(seed)
    began = time.monotonic()
    assert in_child(lambda: work(folder / "alone"), kill_after=None)
    length = time.monotonic() - began
    alone = load_file(folder / "alone" / STUDENT)
    done = runs = unreadable = different = leftovers = 0
    steps = []
    while done < kills:
        place = folder / f"run-{runs}"
        while True:
            ended = in_child(partial(work, place), kill_after=moments.uniform(0, length / 2) if done < kills else None)
            if ended:
                break
            done += 1
            if (place / LAST).exists():
                try:
                    steps.append(load_checkpoint(place / LAST)[1]["state"]["all_steps"])
                except Exception as error:
                    print(f"unreadable after kill {done}: {error}", file=sys.stderr)
                    unreadable += 1
        weights = load_file(place / STUDENT)
        same = weights.keys() == alone.keys() and all(torch.equal(weights[name], alone[name]) for name in alone)
        different += not same
        leftovers += len(list(place.rglob("*.draft")))
        runs += 1
    return {
        "kills": done, "runs": runs, "unreadable": unreadable, "different": different, "leftovers": leftovers, "resumed_at_steps": steps,
        "seconds_of_a_run": round(length, 2),
    }  # fmt: skip


def main() -> None:
    """Print the result; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the result here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run(None)
    with tempfile.TemporaryDirectory() as folder:
        result = trial(Path(folder), options.kills, options.seed)
    told = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    result = {**told, "environment": environment("cpu", 1), **result}
    print(json.dumps(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(1 if result["unreadable"] or result["different"] or result["leftovers"] else 0)


if __name__ == "__main__":
    main()
