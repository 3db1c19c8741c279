"""A transformer of twelve blocks: all pairs at once, fed by the teacher, and one by one. Accuracy, and the time it takes.

    python benchmarks/blocks.py --json benchmarks/results/blocks.json [--seeds 0 1 2] [--macs 0.3] [--images 400]

scikit-learn's digits as 16 patches of 2x2; teacher: torchvision's VisionTransformer, 12 blocks of 4 heads and width 64, trained once
a seed on all 1,442 images. Student: the teacher cut by `compress` (heads and MLP widths go). Ways: `kd`: KD alone; `short`: all pairs
at once, from the student's own features, for three tenths of the epochs, which is what `compress` does; `joint`: the same for as many
epochs as there are pairs; `fed`: all blocks at once, each fed by the teacher; `steps`: pair after pair, one epoch each; `curriculum`: the
paper's 3, 4, … epochs. All but the last have the same epochs in all; the curriculum has its own, and the main epochs of `joint`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn
from torchvision.models import VisionTransformer

import indistill_fx as ifx
from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.make_student import Measure, calibration, make_student
from indistill_fx.compression.write_source import source_of
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.runs.record import environment
from indistill_fx.training.recipes import NO_WARMUP

BLOCKS = 12
RATE = 1e-3


def transformer() -> nn.Module:
    """For grey 8x8 images."""
    net = VisionTransformer(
        image_size=8, patch_size=2, num_layers=BLOCKS, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    net.conv_proj = nn.Conv2d(1, 64, 2, 2)
    return net


def ways(epochs: int, pairs: int) -> dict[str, tuple[Curriculum, int]]:
    """The warm-up of every way, and the epochs of its main stage."""
    rest, short = epochs - pairs, round(0.3 * epochs)
    return {
        "kd": (NO_WARMUP, epochs),
        "short": (Curriculum(together=True, lengths=short, learning_rate=RATE), epochs - short),
        "joint": (Curriculum(together=True, lengths=pairs, learning_rate=RATE), rest),
        "fed": (Curriculum(feed="teacher", lengths=pairs, learning_rate=RATE), rest),
        "steps": (Curriculum(lengths=[1] * pairs, learning_rate=RATE), rest),
        "curriculum": (Curriculum(learning_rate=RATE), rest),
    }


def rows_of(seed: int, options: argparse.Namespace, data: Data) -> list[dict[str, Any]]:
    """All ways of one seed."""
    few = replace(open_data("digits", batch_size=64, seed=seed, limit=options.images), test=data.test)
    torch.manual_seed(seed)
    teacher = transformer()
    shared: dict[str, Any] = {"seed": seed, "progress": False, "device": "cpu", "schedule": "cosine"}
    ifx.train(teacher, data.train, epochs=options.teacher_epochs, learning_rate=RATE, **shared)
    x = next(iter(data.train_plain))[0][:2]
    traced = ifx.trace(teacher, x, role="teacher")
    made = make_student(traced, Budget(macs=options.macs), Measure(calibration(few.train_plain, options.images)))
    start = source_of(made.model).build()
    plan = plan_of(traced, ifx.trace(start, x, role="student"), made.shrunk.axes)
    facts = {"seed": seed, "pairs": len(plan.pairs), "teacher": evaluate(teacher, data.test).accuracy}
    facts["before"] = evaluate(start, data.test).accuracy
    rows = []
    for way, (curriculum, main) in ways(options.epochs, len(plan.pairs)).items():
        if way not in options.ways:
            continue
        student, began = copy.deepcopy(start), time.perf_counter()
        ifx.distill(
            traced, student, few.train, plan=plan, curriculum=curriculum, epochs=main, learning_rate=RATE,
            example_inputs=x, **shared,
        )  # fmt: skip
        row = {**facts, "way": way, "seconds": round(time.perf_counter() - began, 1)}
        rows.append(row | {"accuracy": evaluate(student, data.test).accuracy})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, print a table, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--macs", type=float, default=0.3)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--teacher-epochs", type=int, default=30)
    parser.add_argument("--ways", nargs="+", default=[*ways(36, 13)], choices=[*ways(36, 13)])
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data("digits", batch_size=64)
    rows = [row for seed in options.seeds for row in rows_of(seed, options, data)]
    print("| way | test accuracy | s |\n|---|---|---|")
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        figures = [100 * row["accuracy"] for row in own]
        spread = f" ± {stdev(figures):.1f}" if len(figures) > 1 else ""
        print(f"| {way} | {mean(figures):.1f}{spread} | {mean(row['seconds'] for row in own):.0f} |")
    if options.json:
        told = {"command": "python benchmarks/blocks.py", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        kept = {**told, "options": vars(options), "environment": environment("cpu", 1), "rows": rows}
        Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
