"""The demo by one process and by two under torchrun, with the same global batches: how far do they end apart?

    python benchmarks/processes.py --json benchmarks/results/processes.json

Both runs start from the same weights and see the same batches; batch norms take their statistics over both processes. What is left is
rounding, in another order, which hundreds of steps of Adam make larger; tests/numerics/test_processes.py shows, over a few steps of SGD,
that nothing else is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from indistill_fx.record import STUDENT, environment

ARMS = ("teacher", "labels", "kd", "indistill")
LAUNCHERS = {
    "one": [sys.executable, "-m"],
    "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"],
}


def told(place: Path, arm: str) -> dict[str, Any]:
    """What a run left behind."""
    found: dict[str, Any] = json.loads((place / arm / "run.json").read_text(encoding="utf-8"))
    return found


def compared(one: Path, two: Path, arm: str) -> dict[str, Any]:
    """Two runs of one arm: accuracies, losses, and the largest difference of a tensor relative to its largest entry."""
    results = [told(place, arm)["result"] for place in (one, two)]
    losses = [[epoch["loss"] for epoch in result["epochs"]] for result in results]
    left, right = (load_file(place / arm / STUDENT) for place in (one, two))
    apart = {
        name: float(
            (left[name].double() - right[name].double()).abs().max() / left[name].double().abs().max().clamp(min=1e-12)
        )
        for name in left
    }
    assert [told(place, arm)["environment"]["processes"] for place in (one, two)] == [1, 2]
    return {
        "accuracy": [result["accuracy"] for result in results],
        "first_loss": [own[0] for own in losses],
        "last_loss": [own[-1] for own in losses],
        "first_loss_differs": abs(losses[0][0] / losses[1][0] - 1),
        "last_loss_differs": abs(losses[0][-1] / losses[1][-1] - 1),
        "weights_differ": max(apart.values()),
        "seconds": [round(result["seconds"], 1) for result in results],
    }


def main() -> None:
    """Run both, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, launcher in LAUNCHERS.items():
            command = [*launcher, "indistill_fx", "demo", "-o", str(Path(folder, name))]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})
        arms = {arm: compared(Path(folder, "one"), Path(folder, "two"), arm) for arm in ARMS}
    result = {
        "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment("cpu", 2), "arms": arms,
    }  # fmt: skip
    print(json.dumps(arms, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
