"""The results of `channels.py` as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from datetime import date, timedelta
from typing import Any

_CNN = (
    *("alexnet", "vgg", "resnet", "resnext", "wide", "densenet", "googlenet", "inception", "mnasnet", "mobilenet"),
    *("regnet", "shufflenet", "squeezenet", "efficientnet"),
)
"""How the names of torchvision's families of plain convolutional networks begin."""
Models = dict[str, Any]


def tables(records: dict[str, Any]) -> str:
    """One section per file of results."""
    makers = {"narrow": _narrow, "shrink": _shrink, "beside": _shrink, "exact": _exact}
    parts = []
    for name, record in records.items():
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        missing = record.get("missing", [])
        also = f"\n\nNot run yet, {len(missing)}: {', '.join(missing)}." if missing else ""
        also += older(record)
        parts.append(f"{makers[record['task']](record)}{also}\n\n({name}, {record['date']}; {versions})")
    return "\n\n".join(parts)


def older(record: Any) -> str:
    """Which rows were measured on the record's last two days, and which before; rows say so themselves."""
    models = record.get("models", {})
    new, old = (sorted(name for name in models if _is_new(record, name) is wanted) for wanted in (True, False))
    if not new or not old:
        return ""
    which, names = f"; the {len(old)} rows listed here are older", old
    if len(new) <= len(old):
        which, names = ", listed here; the other rows are older", new
    days = sorted({models[name]["date"] for name in new})
    title = f"Measured on {' and '.join(days)}: {len(new)} of {len(models)}{which}"
    return f"\n\n{folded(title, names)}"


def folded(title: str, names: Iterable[str]) -> str:
    """A list of names that opens with a click, so that tables do not stand pages apart."""
    return f"<details><summary>{title}</summary>{', '.join(names)}.</details>"


def _is_new(record: Any, name: str) -> bool:
    last = date.fromisoformat(record["date"][:10])  # a sweep may run past midnight
    return record["models"][name].get("date") in (str(last), str(last - timedelta(days=1)))


def _narrow(record: Any) -> str:
    models: Models = record["models"]
    lines = [
        "Narrowing: every tap to a random half of its channels, compared with the whole network's feature there.",
        "",
        "| models | right at every tap | taps | fully absorbed | largest difference | control |",
        "|---|---|---|---|---|---|",
    ]
    sets = {
        "torchvision CNN families": _some(models, "torchvision", _CNN),
        "torchvision transformers, ConvNeXt": {
            k: m for k, m in _some(models, "torchvision").items() if not m["family"].startswith(_CNN)
        },
        "torchvision segmentation": _some(models, "segmentation"),
        "timm, one of each family": _some(models, "timm"),
    }
    for name, some in sets.items():
        taps, absorbed = (sum(m.get(key, 0) for m in some.values()) for key in ("taps", "absorbed"))
        right = sum(m.get("ok", False) for m in some.values())
        worst = max((m["worst"] for m in some.values() if "worst" in m), default=0.0)
        share = f"{absorbed} ({100 * absorbed / max(taps, 1):.1f}%)"
        seen, could = (sum(m.get("control", (0, 0))[k] for m in some.values()) for k in (0, 1))
        lines.append(f"| {name} | {right} of {len(some)} | {taps} | {share} | {worst:.0e} | {seen} of {could} |")
    lines += [
        "",
        "Control: taps where the same comparison notices channels in the wrong order (the others are constant).",
    ]
    lines += [f"\n- {key}: {m.get('error') or m.get('failures')}" for key, m in models.items() if not m.get("ok")]
    return "\n".join(lines)


def _some(models: Models, source: str, families: tuple[str, ...] = ("",)) -> Models:
    return {k: m for k, m in models.items() if k.startswith(source) and m["family"].startswith(families)}


def _shrink(record: Any) -> str:
    models: Models = record["models"]
    right = {k: m for k, m in models.items() if m.get("ok")}
    lines = [
        f"Shrinking: {len(right)} of {len(models)} torchvision classifiers that were run: halved (`ratio=0.5`, no hints), with the exact "
        "widths, running in both modes and equal to the masked reference "
        f"(largest difference {max((m['difference'] for m in right.values()), default=0):.0e}; with two kept columns swapped at least "
        f"{min((m['control'] for m in right.values()), default=0):.0e}).",
    ]
    gone = [1 - m["macs"][1] / m["macs"][0] for m in models.values() if "macs" in m]
    lines.append(
        f"A median of {statistics.median(gone):.1%} of the multiply-accumulates is removed, at least {min(gone):.1%}."
    )
    lines += [f"\n- {key}: {_why(m)}" for key, m in models.items() if not m.get("ok")]
    others = {k: m["torch_pruning"] for k, m in models.items() if "torch_pruning" in m}
    if others:
        new = {k: m for k, m in right.items() if _is_new(record, k)}
        lines += ["", *_beside(new or right, others)]
    return "\n".join(lines)


def _why(m: Any) -> Any:
    keys = ("eval", "train", "difference", "control", "inexact", "parameters")
    return m.get("error") or m.get("refused") or {key: m.get(key) for key in keys}


def _beside(right: Models, others: Models) -> list[str]:
    passed = {k: m for k, m in others.items() if _pruned(m)}
    lines = [
        f"Torch-Pruning in the same run: {len(passed)} of {len(others)} pruned (a tenth of the parameters or more) and running "
        "in both modes."
    ]
    both = {k: m for k, m in right.items() if others.get(k, {}).get("seconds")}
    if both:
        ours = {k: m["trace_seconds"] + m["shrink_seconds"] for k, m in both.items()}
        ratios = {k: ours[k] / others[k]["seconds"] for k in both}
        alone = statistics.median(m["shrink_seconds"] / others[k]["seconds"] for k, m in both.items())
        lines += [
            f"CPU time, ours / Torch-Pruning's, over the {len(both)} models of the last days that both finish: median "
            f"{statistics.median(ratios.values()):.2f} with tracing and its checks, {alone:.2f} for analysis and shrinking alone.",
            "The table shows the inverse, for the 5 of these models where we are fastest beside Torch-Pruning and the 5 where we are "
            "slowest.",
            "",
            "| model | trace s | shrink s | Torch-Pruning s | its time / ours | without our trace |",
            "|---|---|---|---|---|---|",
        ]
        for k in sorted(both, key=lambda k: ratios[k])[:5] + sorted(both, key=lambda k: ratios[k])[-5:]:
            m, theirs = both[k], others[k]["seconds"]
            own = f"{m['trace_seconds']:.2f} | {m['shrink_seconds']:.2f}"
            lines.append(f"| {k} | {own} | {theirs:.2f} | {1 / ratios[k]:.1f}x | {theirs / m['shrink_seconds']:.1f}x |")
        if (name := "torchvision:densenet201") in both:
            times = others[name]["seconds"], ours[name], both[name]["shrink_seconds"]
            lines += [
                "",
                f"densenet201: {times[0]:.1f} s by Torch-Pruning, {times[1]:.1f} s by us with tracing ({times[0] / times[1]:.1f}x "
                f"faster), {times[2]:.1f} s without ({times[0] / times[2]:.1f}x).",
            ]
    lines += [f"\n- Torch-Pruning, {key}: {_their_why(m)}" for key, m in others.items() if key not in passed]
    return lines


def _pruned(m: Any) -> bool:
    return m.get("eval") is True and m.get("train") is True and bool(m["parameters"][1] < 0.9 * m["parameters"][0])


def _their_why(m: Any) -> str:
    if m.get("error"):
        return str(m["error"])
    bad = [f"{mode}: {m[mode]}" for mode in ("eval", "train") if m[mode] is not True]
    return "; ".join(bad) or f"parameters {m['parameters'][0]:,} → {m['parameters'][1]:,}"


def _exact(record: Any) -> str:
    done = record["wrong"]
    wrong = [text for texts in done.values() for text in texts]
    pairs = sum(int(c) for c in done)
    return (
        f"Asking for n of C channels of a convolution (C = 1 to {len(done)}, {pairs:,} pairs; by `shrink(ratio=n/C)`, `shrink(widths=n)` "
        f"and `narrow`): {len(wrong)} wrong.{' ' + '; '.join(wrong[:5]) if wrong else ''}"
    )
