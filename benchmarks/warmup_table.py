"""The tables of docs/performance.md from benchmarks/results/warmup.json.

python -m benchmarks.warmup_table
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/warmup.json"
PAGE = Path(__file__).parent.parent / "docs/performance.md"
MARKS = "<!-- measured: python -m benchmarks.warmup_table -->", "<!-- end of what was measured -->"

SAMPLES = (1_281_167, 50_000)  # ImageNet's, and CIFAR-10's for the paper's pair


def main() -> None:
    """Put the tables between the page's marks."""
    told = json.loads(RESULTS.read_text())
    about = told["about"]
    lines = [f"torch {about['torch']}, torchvision {about['torchvision']}, {about['machine']}, {about['date']}.", ""]
    for row in sorted(told["rows"], key=lambda row: (row["pair"], row["threads"], not row["memory_kept"])):
        lines += pair(row)
    if "setup" in told:
        lines += setting_up(told["setup"])
    page = PAGE.read_text()
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{chr(10).join(lines)}\n{MARKS[1]}{after}")


def pair(row: dict[str, Any]) -> list[str]:
    """One pair's table."""
    ways = ("ours", "before", "compiled hooks", "compiled", "before compiled", "compiled with all", "cached", "bf16")
    kinds = [kind for kind in ways if f"{kind}_ms" in row["stages"][0]]
    head = ["stage", "hooks, ms", *(f"{kind}, ms (×)" for kind in kinds), "floor, ms", "ours / floor"]
    memory = "freed memory kept" if row["memory_kept"] else "memory as glibc has it"
    lines = [f"### {row['pair']}, batch {row['batch']}, threads: {row['threads']}, {memory}", ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for stage in row["stages"]:
        cells = [f"{stage[f'{kind}_ms']:.1f} ({stage['hooks_ms'] / stage[f'{kind}_ms']:.2f})" for kind in kinds]
        floor = [f"{stage['floor_ms']:.1f}", f"{stage['ours_ms'] / stage['floor_ms']:.1f}"]
        hooks = f"{stage['hooks_ms']:.1f}"
        lines.append(f"| {' | '.join([stage['tap'], hooks, *cells, *floor])} |")
    total = [f"**{row[f'speedup_{kind}']:.2f}**" if f"speedup_{kind}" in row else "" for kind in kinds]
    lines += [f"| curriculum |  | {' | '.join(total)} |  |  |", ""]
    lines += lowerings(row) + compiled_lowerings(row)
    if "note" in row:
        lines += [f"({row['note'][0].upper()}{row['note'][1:]}.)", ""]
    if "compile_seconds" in row["stages"][0]:
        seconds = ", ".join(f"{stage['compile_seconds']:.0f}" for stage in row["stages"])
        even = row.get("break_even_steps")
        epochs = even * row["batch"] / SAMPLES[row["pair"] == "paper"] if even else 0.0
        length = f"{epochs:.2g}" if epochs < 10 else f"{epochs:,.0f}"
        won = f"it is won back after {even:,.0f} steps ({length} epochs of the data it is meant for)" if even else ""
        after = won or "it is not won back"
        lines += [f"Compiling took {seconds} s (not counted above; one graph each, `fullgraph=True`); {after}.", ""]
    ways = {
        "difference": "Equal training, float32, Adam",
        "difference_sgd": "SGD with momentum, float32",
        "difference64": "Adam in float64",
    }
    for key, what in ways.items():
        checks = [stage[key] for stage in row["stages"] if key in stage]
        if checks:
            loss, weights = (max(check[kind] for check in checks) for kind in ("loss", "parameters"))
            lines += [f"{what}: losses differ by {loss:.1e} at most, trained parameters by {weights:.1e}.", ""]
    peaks = {
        "peak_mib": "freed blocks given back at once",
        "peak_default_mib": "with the freed blocks that glibc keeps",
    }
    for key, what in peaks.items():
        if peak := row.get(key):
            share = peak["ours"] / peak["hooks"]
            lines += [
                f"Peak memory of stage 1, {what}: {peak['ours']:.0f} MiB against {peak['hooks']:.0f} ({share:.2f}×).",
                "",
            ]
    return lines


def lowerings(row: dict[str, Any]) -> list[str]:
    """What each rewrite of the target's table is worth: a step without it, beside the step with all of them."""
    keys = [key.removesuffix("_ms") for key in row["stages"][0] if key.startswith("without ")]
    if not keys:
        return []
    lines = [f"| stage | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    for stage in row["stages"]:
        cells = [f"{stage[f'{key}_ms'] / stage['ours_ms']:.2f}" for key in keys]
        lines.append(f"| {stage['tap']} | {' | '.join(cells)} |")
    total = [f"**{row['speedup_ours'] / row[f'speedup_{key}']:.2f}**" for key in keys]
    return ["A step beside ours; above 1, the rewrite pays:", "", *lines, f"| curriculum | {' | '.join(total)} |", ""]


def compiled_lowerings(row: dict[str, Any]) -> list[str]:
    """Likewise for the compiled target, of the stages that were measured so."""
    lines = [
        f"- {stage['tap']}, {key.removesuffix('_ms')}: {stage[key] / stage['compiled_ms']:.2f}"
        for stage in row["stages"]
        for key in stage
        if key.startswith("compiled without ")
    ]
    return ["A compiled step beside ours compiled; above 1, the rewrite pays:", "", *lines, ""] if lines else []


def setting_up(found: dict[str, Any]) -> list[str]:
    """What it takes to make the stages."""
    one = found["resnet152-resnet50"]
    lines = ["### Setting up", ""]
    lines += [f"resnet152 → resnet50, {one['stages']} stages, {one['nodes']} nodes: {one['seconds']:.1f} s.", ""]
    lines += ["| nodes of a chain | seconds | ms a node |", "|---|---|---|"]
    for chain in found["chains"]:
        lines.append(f"| {chain['nodes']} | {chain['seconds']:.1f} | {1e3 * chain['seconds'] / chain['nodes']:.2f} |")
    return [*lines, ""]


if __name__ == "__main__":
    main()
