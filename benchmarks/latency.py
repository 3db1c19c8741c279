"""Is a latency budget met? Networks compressed to half of their time on this machine, and what `bench` measures afterwards.

    python benchmarks/latency.py --out OUT --json benchmarks/results/latency.json [--share 0.5] [--only vit]

A convolutional network, one of depthwise convolutions and a vision transformer, with random weights and images, since only time is asked
for. The student that `compress` makes (no training) is exported, and `bench` times it beside the teacher, five times, in processes of its
own. The target: within 5% of the budget. Leave the machine alone meanwhile; `load` in the record says whether it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import indistill_fx as ifx
from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.latency import Clock
from indistill_fx.compression.make_student import Measure, make_student
from indistill_fx.runs.record import environment

NETWORKS = {
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 96),
    "mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), 160),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=96), 96),
}


def compressed(name: str, share: float, out: Path) -> dict[str, Any]:
    """Teacher and student as ONNX files, and the student's row."""
    make, size = NETWORKS[name]
    torch.manual_seed(0)
    module: nn.Module = make().eval()
    images = torch.randn(64, 3, size, size)
    teacher = ifx.trace(module, (images[:2],), role="teacher")
    clock = Clock(seconds=3.0)
    whole = clock.ms(teacher.graph_module, teacher.example_inputs)
    budget = share * whole
    made = make_student(teacher, Budget(latency_ms=budget), Measure([images], clock=clock, say=print))
    files = [out / f"{name}-{which}.onnx" for which in ("teacher", "student")]
    for file, module in zip(files, (teacher.graph_module, made.model.graph_module), strict=True):
        ifx.export_onnx(module, file, (images[:1],))
    timed = [times(files) for _ in range(5)]
    found = median(one[1] for one in timed)
    return {
        "network": name, "input": [3, size, size], "target": str(clock), "teacher ms": whole, "budget ms": budget,
        "when it was chosen ms": made.steps[-1].latency_ms, "bench ms": found, "of the budget": found / budget,
        "bench, teacher ms": median(one[0] for one in timed), "macs": [teacher.macs, made.model.macs],
    }  # fmt: skip


def times(files: list[Path]) -> list[float]:
    """Median milliseconds of each file, by the command."""
    command = [
        sys.executable,
        "-m",
        "indistill_fx",
        "bench",
        *map(str, files),
        "--batch",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)["rows"]
    return [next(row["median_ms"] for row in rows if row["name"] == str(file)) for file in files]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the ONNX files go")
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--share", type=float, default=0.5, help="budget, as a share of the teacher's time")
    parser.add_argument("--only", default="", help="networks whose name contains this")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    for name in NETWORKS:
        if options.only in name:
            row = compressed(name, options.share, options.out) | {"load": os.getloadavg()[0]}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.json:
        record = {
            "command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment("cpu", 1), "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
