"""Does the warm-up pay where nothing is pruned, and where the networks are of different kinds? On scikit-learn's digits.

    python benchmarks/digits_pairs.py --json benchmarks/results/digits_pairs.json [--resume]
    python benchmarks/digits_pairs.py --table benchmarks/results/digits_pairs.json          the results as Markdown

Two pairs, three seeds. `equal widths`: a residual teacher and a plain student as wide as it, so that no channel is
chosen. `other kind`: the demo's ResNet and a narrow student of inverted residuals with depthwise convolutions (after
MobileNetV2). For each seed a teacher is trained by cross-entropy, and one and the same initial student in these ways:

    cross-entropy, KD, PKT                  for all epochs
    InDistill + KD, InDistill + PKT         the warm-up and, in what is left of the epochs, the main loss: equal total epochs
    KD, PKT (main epochs)                   for as many epochs as the main stage of InDistill has: equal main epochs

The student learns by PKT from the same teacher; PKT leaves the last layer untrained, so it has no accuracy.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.evaluation.retrieval import evaluate_retrieval
from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import trace
from indistill_fx.runs.record import environment
from indistill_fx.training.distill import distill
from indistill_fx.training.supervised import train

SEEDS = (0, 1, 2)
TEACHER_EPOCHS, EPOCHS, WARMUP = 10, 15, (1, 2, 3)
RATE = 5e-3
MEASURES = ("accuracy", "map_cosine", "map_euclidean", "precision_cosine", "precision_euclidean", "loss", "seconds")


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, 1x1 down without activation; added to the input where the shape is the same."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        wide = 3 * cin
        self.layers = nn.Sequential(
            nn.Conv2d(cin, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, cout, 1, bias=False), nn.BatchNorm2d(cout),
        )  # fmt: skip
        self.adds = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileStudent(nn.Module):
    """A stem and three stages of inverted residuals, at 8x8, 4x4 and 2x2."""

    def __init__(self, widths: tuple[int, int, int] = (6, 12, 18)):
        super().__init__()
        first, second, third = widths
        self.stem = nn.Sequential(nn.Conv2d(1, first, 3, 1, 1, bias=False), nn.BatchNorm2d(first), nn.ReLU6())
        self.stage1 = nn.Sequential(InvertedResidual(first, first, 1))
        self.stage2 = nn.Sequential(InvertedResidual(first, second, 2), InvertedResidual(second, second, 1))
        self.stage3 = nn.Sequential(InvertedResidual(second, third, 2), InvertedResidual(third, third, 1))
        self.fc = nn.Linear(third, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "equal widths": (lambda: DigitsTeacher((12, 24, 48)), lambda: DigitsStudent((12, 24, 48))),
    "other kind": (lambda: DigitsTeacher((16, 32, 64)), MobileStudent),
}


def ways() -> dict[str, tuple[str, int, bool]]:
    """Name -> main loss, main epochs, whether the warm-up comes before."""
    rest = EPOCHS - sum(WARMUP)
    found: dict[str, tuple[str, int, bool]] = {"cross-entropy": ("labels", EPOCHS, False)}
    for loss in ("kd", "pkt"):
        name = loss.upper()
        found[f"{name} (main epochs)"] = (loss, rest, False)
        found[name] = (loss, EPOCHS, False)
        found[f"InDistill + {name}"] = (loss, rest, True)
    return found


def measure(model: nn.Module, data: Data, x: Tensor) -> dict[str, float]:
    """Accuracy and retrieval; training digits are the database."""
    found = evaluate_retrieval(trace(model, x), data, k=100)
    return {
        "accuracy": evaluate(model, data.test).accuracy,
        **{name: getattr(found, name) for name in MEASURES if hasattr(found, name)},
    }


def one_seed(pair: str, seed: int, rows: dict[str, Any]) -> Iterator[list[str]]:
    """A teacher, and the student in every way that is not in `rows` yet; stops after each with the plan's pairs in words."""
    data = open_data("digits", batch_size=64, seed=seed)
    x = next(iter(data.train_plain))[0][:2]
    torch.manual_seed(seed)
    teacher, initial = (make() for make in PAIRS[pair])
    shared: dict[str, Any] = {
        "seed": seed, "progress": False, "device": "cpu", "learning_rate": RATE, "schedule": "cosine",
    }  # fmt: skip
    record = train(teacher, data.train, epochs=TEACHER_EPOCHS, **shared)
    rows["teacher"] = {**measure(teacher, data, x), "loss": record.epochs[-1].loss, "seconds": record.seconds}
    plan = align(teacher, initial, example_inputs=x)
    kept = [
        f"{p.teacher} → {p.student}: {'all' if p.kept is None else len(p.kept)} of {p.teacher_shape[1]} channels"
        for p in plan.pairs
    ]
    for name, (loss, epochs, warm) in ways().items():
        if name in rows:
            continue
        student = copy.deepcopy(initial)
        curriculum = Curriculum(lengths=WARMUP if warm else [], learning_rate=RATE)
        record = distill(
            teacher, student, data.train, plan=plan, curriculum=curriculum, main=loss, epochs=epochs,
            example_inputs=x, **shared,
        )  # fmt: skip
        rows[name] = {**measure(student, data, x), "loss": record.epochs[-1].loss, "seconds": record.seconds}
        print(f"{pair}, seed {seed}, {name}: {rows[name]}", flush=True)
        yield kept


def table(path: Path) -> str:
    """The results as Markdown: mean ± standard deviation over the seeds."""
    told = json.loads(path.read_text(encoding="utf-8"))
    lines = []
    for pair in PAIRS:
        runs = [run for key, run in told["results"].items() if key.startswith(f"{pair}/")]
        if not runs:
            continue
        lines += [
            f"**{pair}** ({'; '.join(runs[0]['pairs'])}; {len(runs)} seeds)",
            "",
            "| trained by | epochs | accuracy | mAP cosine | mAP Euclidean | P@100 cosine | P@100 Euclidean | final loss | time |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name in ("teacher", *ways()):
            cells = [_cell(name, measure, [run["rows"][name][measure] for run in runs]) for measure in MEASURES]
            _, epochs, warm = ways().get(name, ("labels", TEACHER_EPOCHS, False))
            shown = f"{sum(WARMUP)} + {epochs}" if warm else str(epochs)
            lines.append(f"| {name} | {shown} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _cell(name: str, measure: str, values: list[float]) -> str:
    if measure == "accuracy" and "PKT" in name:
        return "–"
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if measure == "loss":
        return f"{mean:.4g} ± {spread:.2g}"
    return f"{mean:.0f} s" if measure == "seconds" else f"{100 * mean:.2f} ± {100 * spread:.2f}"


def main() -> None:
    """Train what is not there yet; write after every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--resume", action="store_true", help="keep what FILE has")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print FILE as Markdown, train nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--minutes", type=float, help="stop after about so long; --resume goes on")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    torch.set_num_threads(1)
    told: dict[str, Any] = {"results": {}}
    if options.resume and options.json and options.json.exists():
        told = json.loads(options.json.read_text(encoding="utf-8"))
    began = time.monotonic()
    for pair in PAIRS:
        for seed in options.seeds:
            run = told["results"].setdefault(f"{pair}/{seed}", {"pairs": [], "rows": {}})
            if not ways().keys() - run["rows"].keys():
                continue
            for kept in one_seed(pair, seed, run["rows"]):
                run["pairs"] = kept
                told |= {
                    "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "environment": environment("cpu", 1), "teacher_epochs": TEACHER_EPOCHS, "epochs": EPOCHS,
                    "warmup": WARMUP, "learning_rate": RATE,
                }  # fmt: skip
                if options.json:
                    options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
                if options.minutes and time.monotonic() - began > 60 * options.minutes:
                    print("The rest with --resume.")
                    return
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
