"""int8 before and after quantisation-aware distillation, where rounding breaks a network.

    python benchmarks/qat.py --json benchmarks/results/qat.json

scikit-learn's digits; a depthwise network whose channels are scaled apart (by up to 300, and back in the next layer, so that the float
network is the same): what 8-bit files of MobileNet-like networks suffer from. Three seeds; the teacher is the float network itself.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.quantize import QuantizeReport, quantize_onnx
from indistill_fx.runs.record import environment
from indistill_fx.training.chain import distill_for_int8

EXAMPLE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Separable(nn.Module):
    """A depthwise convolution between two others, for digits."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.depth = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.point = nn.Sequential(nn.Conv2d(width, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.fc(self.point(self.depth(self.stem(x))).mean((2, 3)))

    @torch.no_grad()
    def spread(self) -> None:
        """Scale channels in one layer and back in the next: the function stays, and one scale for all channels is too coarse."""
        scales = 10 ** torch.linspace(-2.5, 0, len(self.depth[1].weight))
        self.depth[1].weight *= scales
        self.depth[1].bias *= scales
        self.point[0].weight /= scales.view(1, -1, 1, 1)


def trained(data: Data, seed: int = 0) -> Separable:
    """A float network."""
    torch.manual_seed(seed)
    net = Separable()
    ifx.train(net, data.train, epochs=8, learning_rate=5e-3, schedule="cosine", progress=False, seed=seed)
    return net.eval()


def int8_of(net: nn.Module, data: Data, where: Path) -> QuantizeReport:
    """Its files `float.onnx` and `int8.onnx`, whatever int8 loses."""
    export_onnx(net.eval(), where / "float.onnx", EXAMPLE[:1])
    return quantize_onnx(
        where / "float.onnx", where / "int8.onnx", evaluation=data.test, calibration=data.train_plain, max_drop=1.0
    )


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = open_data("digits", batch_size=64)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        net = trained(data, seed)
        row: dict[str, Any] = {"seed": seed}
        for name, spread in (("as trained", False), ("channels spread", True)):
            if spread:
                net.spread()
            with tempfile.TemporaryDirectory() as folder:
                before = int8_of(net, data, Path(folder))
                student = copy.deepcopy(net)
                distill_for_int8(
                    net, student, data.train, epochs=options.epochs, learning_rate=options.lr, seed=seed,
                    run_dir=folder, progress=False, example_inputs=EXAMPLE,
                )  # fmt: skip
                after = int8_of(student, data, Path(folder))
            row[name] = {"float": before.metric_fp32, "int8": before.metric_int8, "qat": after.metric_int8}
        rows.append(row)
        print(json.dumps(row), flush=True)
    for name in ("as trained", "channels spread"):
        means = {key: round(100 * mean(row[name][key] for row in rows), 2) for key in ("float", "int8", "qat")}
        print(f"{name}: {means}")
    if options.json:
        facts = {"command": "python benchmarks/qat.py", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        Path(options.json).write_text(
            json.dumps(
                {**facts, "options": vars(options), "environment": environment("cpu", 1), "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
