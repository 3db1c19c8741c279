"""The tables of docs/compress.md from what benchmarks/compress.py has measured (its command `table`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from page import put_between

ARMS = ("joint", "kept", "tp", "kd", "fed", "steps", "unlabelled", "l1kd", "freshjoint", "freshkd", "fresh")


def table(options: argparse.Namespace) -> None:
    """Mean and deviation over the seeds of every arm, as JSON and as a table."""
    rows, repaired = [], []
    for out in map(Path, options.out):
        if out.is_file():
            earlier = json.loads(out.read_text())
            rows, repaired = rows + earlier["arms"], repaired + earlier["repair"]
            continue
        rows += [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
        if (out / "repair.json").exists():
            repaired += json.loads((out / "repair.json").read_text())
    rows = list({json.dumps(row, sort_keys=True): row for row in rows}.values())  # one that is named twice counts once
    text = "\n".join([*arm_lines(rows), *repair_lines([*repaired, *begun(rows, repaired)])]).strip() + "\n"
    print(text)
    if options.json:
        Path(options.json).write_text(json.dumps({"arms": rows, "repair": repaired}, indent=1) + "\n")
    if options.into:
        page = Path(options.into)
        begin, end = "<!-- compress: made by benchmarks/compress.py table -->", "<!-- compress: end -->"
        put_between(page, begin, end, text)


def begun(rows: list[dict[str, Any]], repaired: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What arms say of the time before their training, for networks that have no row of `repair`: the first seed's."""
    known = {(row["net"], row["macs"]) for row in repaired}
    found: dict[tuple[str, float], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        one = found.setdefault((row["net"], row["macs"]), {"net": row["net"], "macs": row["macs"]})
        if row["arm"] == "tp":
            one.setdefault("uniform", row["before"])
        elif row["steps"]:
            one.setdefault("steps", row["steps"])
    return [row for key, row in found.items() if key not in known and {"uniform", "steps"} <= row.keys()]


def warmed(row: dict[str, Any]) -> tuple[int, float]:
    """Epochs of the one warm-up stage, and the weight with which its loss stays; 0 of arms that have none of their own."""
    one = row["arm"] in ("joint", "kept", "fed", "unlabelled", "freshjoint")
    return (row["warmup"] if one else 0), row.get("keep", 0.0)


def arm_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A table for every network, share and number of images."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        recipe = [row["optimizer"], f"{row['lr']:g}"]
        recipe += [f"weight decay {row['weight_decay']:g}"] if row["weight_decay"] else []
        recipe += [f"batches of {row['batch']}"] if row["batch"] != 128 else []
        recipe += [row["main"]] if row.get("main", "kd") != "kd" else []
        recipe += [f"{name} {value:g}" for name, value in row.get("main_options", {}).items()]
        recipe += ["bfloat16"] if row.get("precision") == "bf16" else []
        recipe += [f"{name} {value:g}" for name, value in row.get("also", {}).items()]
        key = (row["net"], row["macs"], row["images"], row["epochs"], ", ".join(recipe), row["teacher"])
        groups.setdefault(key, []).append(row)
    lines: list[str] = []
    for (net, macs, images, epochs, recipe, accuracy), own in sorted(groups.items()):
        teacher = f"teacher {accuracy:.2%}"
        lines += [
            "",
            f"{net}, {macs:.0%} of its MACs, {images:,} images, {epochs} epochs in all ({recipe}), {teacher}:",
        ]
        lines += ["", "| arm | before training | test accuracy | seeds | s a run |", "|---|---|---|---|---|"]
        kinds = sorted({(ARMS.index(row["arm"]), *warmed(row)) for row in own})
        for number, warm, keep in kinds:
            found = [row for row in own if (ARMS.index(row["arm"]), *warmed(row)) == (number, warm, keep)]
            figures = [100 * row["accuracy"] for row in found]
            spread = f" ± {stdev(figures):.2f}" if len(figures) > 1 else ""
            how = f" ({found[0]['how']})" if found[0]["how"] else ""
            how += f", {warm} epochs of warm-up" if warm else ""
            how += f", its loss kept with weight {keep:g}" if keep else ""
            before = mean(row["before"] for row in found)
            whole = [row["seconds"] for row in found if not row.get("resumed")]
            seconds = f"{mean(whole):.0f}" if whole else "interrupted"
            cells = (f"{100 * before:.2f}", f"{mean(figures):.2f}{spread}", str(len(found)), seconds)
            lines.append(f"| {ARMS[number]}{how} | {' | '.join(cells)} |")
    return lines


_REPAIR_CAPTION = (
    "Test accuracy in % before any training, without labels. *Uniform*: the same share of every layer is removed. "
    "*Our widths*: the chosen widths; then with the norms' statistics re-estimated, and with the layers refitted:"
)


def repair_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What the repairs give before any training."""
    if not rows:
        return []
    lines = [
        "",
        _REPAIR_CAPTION,
        "",
    ]
    lines += [
        "| network | MACs | uniform, by L1 | our widths | norms re-estimated | layers refitted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        steps = {step["name"]: step["accuracy"] for step in row["steps"]}
        cells = [row["uniform"], steps["shrunk"], steps["norms estimated anew"], steps["readers fitted"]]
        lines.append(f"| {row['net']} | {row['macs']:.0%} | {' | '.join(f'{100 * cell:.2f}' for cell in cells)} |")
    return lines
