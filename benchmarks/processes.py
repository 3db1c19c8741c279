"""A teacher and three students by one process and by two under torchrun, with the same global batches: how far do they end apart?

    python benchmarks/processes.py --json benchmarks/results/processes.json

Both runs start from the same weights and see the same batches; batch norms take their statistics over both processes. What is left is
rounding, in another order. In float32 a ReLU whose input is all but zero sooner or later opens in one run and not in
the other, and from there the runs part. In float64 the same training of the same networks shows that nothing else is left.
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

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from indistill_fx.curriculum import Curriculum
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher
from indistill_fx.runs.directory import STUDENT
from indistill_fx.runs.record import environment
from indistill_fx.training.compare import compare
from indistill_fx.training.supervised import train

ARMS = ("teacher", "labels", "kd", "indistill")
LAUNCHERS = {
    "one": [sys.executable],
    "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"],
}


class Double(nn.Module):
    """A network in float64, for inputs in float32."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.double()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 8, 8) → (batch, 10)."""
        scores: Tensor = self.network(x.double())
        return scores


def train_all(place: Path, precision: str) -> None:
    """Digits: a teacher, and a chain on labels, by KD, and by warm-up and KD."""
    data = open_data("digits", batch_size=64, seed=0)
    torch.manual_seed(0)
    networks = DigitsTeacher(), DigitsStudent()
    teacher, student = (Double(one) if precision == "float64" else one for one in networks)
    shared: dict[str, Any] = {"val_loader": data.test, "seed": 0, "progress": False, "device": "cpu"}
    train(teacher, data.train, epochs=12, run_dir=place / "teacher", **shared)
    curriculum = Curriculum(lengths=(1, 2, 3), learning_rate=5e-3)
    shared |= {"learning_rate": 5e-3, "schedule": "cosine", "epochs": 18}
    compare(teacher, student, data.train, curriculum=curriculum, run_dir=place, **shared)


def told(place: Path, arm: str) -> dict[str, Any]:
    """What a run left in its directory."""
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
    """Run both ways in both precisions, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--float32", type=Path, metavar="DIR", help="only train, in this process")
    parser.add_argument("--float64", type=Path, metavar="DIR", help="likewise, in float64")
    options = parser.parse_args()
    for precision in ("float32", "float64"):
        if place := getattr(options, precision):
            train_all(place, precision)
            return
    ways = {precision: [__file__, f"--{precision}"] for precision in ("float32", "float64")}
    arms = {}
    for precision, command in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            one, two = (Path(folder, name) for name in LAUNCHERS)
            for launcher, place in zip(LAUNCHERS.values(), (one, two), strict=True):
                own = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
                subprocess.run([*launcher, *command, str(place)], check=True, env=own)
            arms[precision] = {arm: compared(one, two, arm) for arm in ARMS}
    result = {
        "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment("cpu", 2), "arms": arms,
    }  # fmt: skip
    print(json.dumps(arms, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
