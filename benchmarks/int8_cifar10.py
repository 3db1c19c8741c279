"""What export and int8 do to the paper's CIFAR-10 student: accuracy, size, latency, beside the assistant.

    python benchmarks/int8_cifar10.py --data DIR --weights REFERENCE_DIR [-o benchmarks/results/int8_cifar10.json] [--limit 2000]

DIR is the image folder (train/<class>/, test/<class>/), REFERENCE_DIR holds the authors' published state dicts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch

from indistill_fx.data.open import open_data
from indistill_fx.deploy.bench import bench
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.quantize import quantize_onnx

PAPER = Path(__file__).parents[1] / "examples" / "paper_cifar10.py"
MODELS = {
    "assistant": ("cnn32_assistant_cifar10.pt", (16, 32, 64), 128),
    # Trained on labels: the one distilled by PKT is for retrieval, its last layer has never been trained.
    "student": ("cnn32_small_baseline_cifar10.pt", (8, 16, 32), 64),
}


def main() -> None:
    """Export, quantise and time both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--limit", type=int, help="test images, spread over the classes [default: all]")
    parser.add_argument("--calibrations", default="minmax,entropy,percentile")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    network = runpy.run_path(str(PAPER))["Cnn32"]
    data = open_data(f"imagefolder:{options.data}", batch_size=100, seed=0, augment=False, limit=options.limit)
    test = [(x, y) for x, y in data.test]
    calibration = list(itertools.islice(data.train, 5))  # shuffled: of all classes
    contestants: dict[str, Any] = {}
    record: dict[str, Any] = {"test_images": sum(len(y) for _, y in test), "calibration_images": 500}
    with tempfile.TemporaryDirectory() as directory:
        for name, (weights, widths, hidden) in MODELS.items():
            model = network(widths, hidden)
            model.load_state_dict(torch.load(options.weights / weights, map_location="cpu", weights_only=True))
            model.eval()
            path = Path(directory) / f"{name}.onnx"
            report = export_onnx(model, path, test[0][0][:2], real_inputs=torch.cat([x for x, _ in test[:10]]))
            record[name] = {
                "max_abs": report.max_abs,
                "agreement": report.real.agreement,
                "parameters": report.parameters,
            }
            for calibrate in options.calibrations.split(","):
                out = path.with_suffix(f".{calibrate}.onnx")
                int8 = quantize_onnx(
                    path, out, evaluation=test, calibration=calibration, calibrate=calibrate, max_drop=1.0
                )
                record[name][calibrate] = {
                    "fp32": int8.metric_fp32, "int8": int8.metric_int8, "drop": int8.drop,
                    "size_fp32": int8.size_fp32, "size_int8": int8.size_int8,
                }  # fmt: skip
            contestants |= {
                name: model,
                f"{name}.onnx": path,
                f"{name} int8": path.with_suffix(f".{options.calibrations.split(',')[0]}.onnx"),
            }
        record["bench"] = bench(contestants, test[0][0][:2], seconds=options.seconds, compile=options.compile).to_json()
    for name in MODELS:
        print(name, json.dumps(record[name]))
    for row in record["bench"]["rows"]:
        print(f"{row['name']:16} {row['runtime']:17} batch {row['batch']:2} threads {row['threads']}"
              f"  median {row['median_ms']:7.3f}  p95 {row['p95_ms']:7.3f} ms  {row['size']:7} bytes")  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
