"""The demo's table over several seeds, as README shows it; with one thread, since sums by several threads round otherwise.

python -m benchmarks.demo --seeds 0 1 2 --json benchmarks/results/demo.json --into README.md
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev

import torch

from indistill_fx.demo.run import run_demo
from indistill_fx.runs.record import environment

BEGIN, END = "<!-- made by benchmarks/demo.py -->", "<!-- demo: end -->"


def main() -> None:
    """Run the demo seed by seed, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--into", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    macs: dict[str, int] = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for row in run_demo(Path(folder, "demo"), seed=seed, progress=False):
                found.setdefault(row.name, []).append(100 * row.accuracy)
                macs[row.name] = row.macs
    lines = ["| model | multiply-accumulates | test accuracy |", "|---|---|---|"]
    for name, values in found.items():
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {macs[name] / 1e6:.2f} M | {mean(values):.1f}{spread}% |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.json:
        told = {"command": " ".join(["python -m benchmarks.demo", *sys.argv[1:]]), "seeds": options.seeds}
        told |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment("cpu", 1)}
        options.json.write_text(json.dumps({**told, "accuracy": found, "macs": macs}, indent=1) + "\n")
    if options.into:
        head, _, rest = options.into.read_text().partition(BEGIN)
        options.into.write_text(head + BEGIN + "\n" + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
