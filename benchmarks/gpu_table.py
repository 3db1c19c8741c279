"""What benchmarks/gpu.py has measured as tables, and put into docs/performance.md.

python -m benchmarks.gpu_table
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/gpu.json"
PAGE = Path(__file__).parent.parent / "docs/performance.md"
MARKS = "<!-- measured: python -m benchmarks.gpu_table -->", "<!-- end of what was measured on a GPU -->"

Found = Mapping[str, Any]

NOT = "not measured"
WAYS = ("hooks", "ours", "recorded", "hooks compiled", "ours compiled", "recorded compiled")


def goals(found: Found) -> dict[str, tuple[str, str]]:
    """What is to be shown: in words → (what was measured, the goal)."""
    pair, compiled = found.get("curricula", {}).get, found.get("compiled curricula", {}).get
    paper, resnet, vit = (_rows(found, name) for name in ("paper", "resnet50-resnet18", "vit_b-vit_ti"))
    graphs, trained = found.get("graphs on and off", {}), found.get("recipe") or {}
    floor = [row["ours over the floor"] for row in resnet if row.get("ours over the floor")]
    memory = [
        row["recorded peak MiB"] / row["ours peak MiB"] for row in paper + resnet + vit if "recorded peak MiB" in row
    ]
    shown = _shown
    return {
        "losses and gradients of every stage of the paper's pair in float32, TF32 off, beside hooks in float64 on a CPU": (
            _errors(found.get("correctness")), "losses relative 1e-5; gradients about as near as hooks in float32"),
        "the same for resnet50 → resnet18 in bfloat16 with the rewrites for it": (
            _errors(found.get("reduced precision")), "about as near as hooks in bfloat16"),
        "losses of 50 steps with graphs and without (float32, TF32 off)": (
            shown(max(graphs.values(), default=None), "{:.1e}"), "relative 1e-5"),
        "augmented batches made on the device": (_data(found.get("data on the device and off")), "the CPU's bits"),
        "paper's pair, batch 128, a step of any warm-up stage beside hooks": (
            _all([shown(min(_of(paper, "speedup"), default=None), "{:.1f}×"),
                  shown(max(_of(paper, "ms"), default=None), "{:.2f} ms")]), "≥ 8×, ≤ 0.35 ms"),
        "the trainer's step beside the bare recorded stage": (shown(_overhead(found, paper), "{:.2f}×"), "≤ 1.1×"),
        "the paper's recipe for CIFAR-10, one arm, 70 epochs": (
            shown(trained.get("seconds"), "{:.1f} s") if trained else _reckoned(found), "≤ 15 s"),
        "resnet50 → resnet18, bfloat16, batch 128, curriculum beside eager hooks, and beside compiled hooks": (
            _all([_best(pair("resnet50-resnet18"), compiled("resnet50-resnet18")),
                  shown((compiled("resnet50-resnet18") or {}).get("beside hooks compiled"), "{:.2f}×")]), "≥ 2.2×, ≥ 1.4×"),
        "ViT-B → ViT-Ti, bfloat16, batch 128, curriculum beside eager hooks": (
            _best(pair("vit_b-vit_ti"), compiled("vit_b-vit_ti")), "≥ 2.5×"),
        "last stage of resnet50 → resnet18: distance from the floor": (
            shown(floor[-1] if floor else None, "{:.2f}×"), "≤ 1.6×"),
        "peak memory of a recorded step beside the step as it is": (
            shown(max(memory, default=None), "{:.0%}"), "≤ 110%"),
    }  # fmt: skip


def _shown(value: float | None, form: str) -> str:
    return NOT if value is None else form.format(value)


def _all(parts: list[str]) -> str:
    return NOT if set(parts) == {NOT} else ", ".join(parts)


def _rows(found: Found, pair: str) -> list[Any]:
    return [row for row in found.get("rows", []) if row["pair"] == pair]


def _of(rows: list[Any], what: str) -> list[float]:
    """What the recorded step has; nothing, unless all stages have it."""
    values = [row[what].get("recorded") for row in rows]
    return [] if None in values else values


def _errors(rows: list[Any] | None) -> str:
    if not rows:
        return NOT
    ways = [way for way in rows[0] if way != "stage"]
    worst = {way: [max(row[way][what] for row in rows) for what in ("loss", "gradients")] for way in ways}
    return "; ".join(f"{way}: {loss:.1e}, {gradients:.1e}" for way, (loss, gradients) in worst.items())


def _data(found: Found | None) -> str:
    if not found:
        return NOT
    differing = found["tensors that differ"]
    return f"{differing} of {2 * found['batches']} tensors differ" if differing else "the CPU's bits"


def _overhead(found: Found, paper: list[Any]) -> float | None:
    """The largest over the stages."""
    rates = found.get("trainer", {}).get("recorded", {}).get("steps a second", {})
    both = [(1e3 / rates[row["stage"]], row["ms"]["recorded"]) for row in paper if "recorded" in row["ms"] and rates]
    return max((one / other for one, other in both), default=None)


def _reckoned(found: Found) -> str:
    return _shown(found.get("trainer", {}).get("recorded", {}).get("70 epochs, reckoned seconds"), "{:.0f} s, reckoned")


def _best(*curricula: Found | None) -> str:
    """The best of our ways over a curriculum, with the stages that it was measured on."""
    both = [
        (one[way], way, one["stages"])
        for one in curricula
        if one
        for way in WAYS
        if not way.startswith("hooks") and way in one
    ]
    if not both:
        return NOT
    value, way, stages = max(both)
    return f"{value:.2f}× ({way}, stages {', '.join(map(str, stages))})"


def curricula(rows: list[Any]) -> dict[str, Any]:
    """The speedup of every way over the measured stages of a pair, weighed 3 : 4 : 5 : … by their numbers."""
    found: dict[str, Any] = {}
    for pair in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == pair]
        ways = [way for way in WAYS if all(way in row["ms"] for row in own)]
        total = {way: sum((2 + row["number"]) * row["ms"][way] for row in own) for way in ways}
        one: dict[str, Any] = {"stages": [row["number"] for row in own]}
        if "hooks" in total:
            one |= {way: total["hooks"] / ms for way, ms in total.items()}
        ours = [ms for way, ms in total.items() if not way.startswith("hooks")]
        if "hooks compiled" in total and ours:
            one["beside hooks compiled"] = total["hooks compiled"] / min(ours)
        found[pair] = one
    return found


def table(found: Found) -> list[str]:
    """The page's first table, and where something was measured those of all stages."""
    where = found["about"]["device"] if found else "one H100"
    lines = [f"| work, {where} | this version | goal, one H100 |", "|---|---|---|"]
    lines += [f"| {work} | {value} | {goal} |" for work, (value, goal) in goals(found).items()]
    if not found:
        return lines
    about = found["about"]
    facts = (f"torch {about['torch']}", f"CUDA {about['cuda']}", f"cuDNN {about['cudnn']}", f"driver {about['driver']}")
    lines += ["", f"Measured on {about['device']}, {', '.join(facts)}, {about['date']}, by `{about['command']}`.", ""]
    lines += _stages(found)
    if found.get("left out"):
        lines += ["", f"Left out: {'; '.join(found['left out'])}."]
    return lines


def _stages(found: Found) -> list[str]:
    rows = [*found.get("rows", []), *found.get("compiled", [])]
    if not rows:
        return []
    lines = ["Milliseconds a step (times as fast as hooks; images a second; peak MiB):", ""]
    lines += [f"| pair, stage, batch, precision | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 1) + "|"]
    for row in rows:
        cells = [_cell(row, way) for way in WAYS]
        name = f"{row['pair']}, `{row['stage']}`, {row['batch']}, {row['dtype']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _cell(row: Found, way: str) -> str:
    if way not in row["ms"]:
        return "failed" if f"{way} failed" in row else "–"
    more = [f"{row['speedup'][way]:.2f}×"] if way in row["speedup"] else []
    more += [f"{row['images a second'][way]:.0f}/s"]
    more += [f"{row[f'{way} peak MiB']:.0f} MiB"] if f"{way} peak MiB" in row else []
    return f"{row['ms'][way]:.2f} ({'; '.join(more)})"


def main() -> None:
    """Put the tables between the page's marks."""
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{chr(10).join(table(found))}\n{MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
