"""Published networks for CIFAR-10 through `indistill-fx evaluate`: do they reach the accuracy that was published?

    python benchmarks/published.py --data DIR --reference DIR [--cache DIR]

DIR is an image folder of the lossless CIFAR-10, and the folder of the published weights. Each network is measured twice: normalised by
CIFAR-10's own figures, which is not what it was trained on, and with the one option that it needs. Writes results/published.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

HOME = Path(__file__).parent
PUBLISHED = {"resnet20": 91.73, "resnet32": 92.63, "resnet56": 93.39}
OPTION = ("--mean", "imagenet")


def measured(command: list[str]) -> dict[str, Any]:
    """What `evaluate --json` prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("/tmp/published-cache"))
    parser.add_argument("--json", type=Path, default=HOME / "results" / "published.json")
    arguments = parser.parse_args()
    networks: dict[str, Any] = {}
    for name, expected in PUBLISHED.items():
        file = arguments.reference / f"cifar10_{name}.safetensors"
        model = f"{HOME / 'resnet_cifar.py'}:{name}?bare=True&file={file}"
        command = [sys.executable, "-m", "indistill_fx", "evaluate", model, "--data", f"imagefolder:{arguments.data}"]
        command += ["--cache", str(arguments.cache), "--json"]
        plain, right = measured(command), measured([*command, *OPTION])
        networks[name] = {
            "published": expected,
            "with the option": round(100 * right["accuracy"], 2),
            "without": round(100 * plain["accuracy"], 2),
            "samples": right["count"],
        }
        print(name, networks[name], flush=True)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "option": " ".join(OPTION),
    }
    arguments.json.write_text(json.dumps({**about, "networks": networks}, indent=2) + "\n")


if __name__ == "__main__":
    main()
