"""What `compress` says of how it made the student: the student after every step, and its widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indistill_fx.report import numbers
from indistill_fx.report.values import finite, listed, mapped
from indistill_fx.runs.directory import COMPRESSION, MOST_BYTES
from indistill_fx.system.files import read_json


@dataclass(frozen=True, slots=True)
class Compressed:
    """The tables of a page.

    Attributes:
        columns: what is known of the steps, in words.
        steps: the name of each, and a cell per column.
        widths: layer, channels before, channels after.
    """

    columns: tuple[str, ...]
    steps: tuple[tuple[str, tuple[str, ...]], ...]
    widths: tuple[tuple[str, str, str], ...]


def read_compressed(folder: Path) -> tuple[Compressed | None, list[str]]:
    """What compress.json says; None where there is none. And what a reader should know is not there."""
    try:
        saved = mapped(read_json(folder / COMPRESSION, MOST_BYTES))
    except FileNotFoundError:
        return None, []
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{COMPRESSION} cannot be read: {error}."]
    steps = [mapped(step) for step in listed(saved.get("steps"))]
    widths = {str(layer): listed(pair) for layer, pair in mapped(saved.get("widths")).items()}
    if not steps:  # stopped while the student was written
        return None, []
    return Compressed(
        *_steps(steps),
        tuple(
            (layer, numbers.short(finite(pair[0])), numbers.short(finite(pair[1])))
            for layer, pair in widths.items()
            if len(pair) == 2
        ),
    ), []


def _steps(steps: list[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    metric = next((str(step.get("metric")) for step in steps if step.get("shown")), "metric").capitalize()
    rows = [
        (
            _name(step),
            {
                metric: str(step.get("shown") or "–"),
                "MACs": numbers.short(finite(step.get("macs"))),
                "Parameters": numbers.short(finite(step.get("parameters"))),
                "Divergence from the teacher": _text(step.get("divergence"), ""),
                "Latency": _text(step.get("latency_ms"), " ms"),
            },
        )
        for step in steps
    ]
    columns = tuple(name for name in (rows[0][1] if rows else ()) if any(cells[name] != "–" for _, cells in rows))
    return columns, tuple((name, tuple(cells[column] for column in columns)) for name, cells in rows)


def _name(step: Mapping[str, Any]) -> str:
    return f"{step.get('name', '')}{' (training starts here)' if step.get('start') is True else ''}"


def _text(value: object, unit: str) -> str:
    found = finite(value)
    return "–" if found is None else f"{found:.3g}{unit}"
