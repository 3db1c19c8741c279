"""The layers of teacher and student, and what each costs, as run.json has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from indistill_fx.report.read_runs import Run
from indistill_fx.report.values import finite, listed, mapped

MOST_LAYERS = 2000
"""Of a model that a page shows."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: its name, its operation, the shape of its output for one sample, its parameters and multiply-accumulates."""

    name: str
    op: str
    shape: str
    parameters: float
    macs: float


@dataclass(frozen=True, slots=True)
class LayerTable:
    """The layers of a model.

    Attributes:
        title: its role and name.
        layers: the first `MOST_LAYERS`, in the order of computation.
        count: of all layers.
        parameters: of all layers.
        macs: likewise.
    """

    title: str
    layers: tuple[Layer, ...]
    count: int
    parameters: float
    macs: float


def layer_tables(runs: Sequence[Run]) -> list[tuple[LayerTable, ...]]:
    """Teacher and student of every run, side by side; what several runs have in common once, and nothing of models that were not traced."""
    found = [
        tuple(table for role in ("teacher", "student") if (table := _table(mapped(run.record.get("models")), role)))
        for run in runs
    ]
    return [tables for tables in dict.fromkeys(found) if tables]


def _table(models: Mapping[str, Any], role: str) -> LayerTable | None:
    facts = mapped(models.get(role))
    layers = tuple(layer for entry in listed(facts.get("layers")) if (layer := _layer(mapped(entry))) is not None)
    if not layers:
        return None
    return LayerTable(
        title=": ".join(filter(None, (role.capitalize(), str(facts.get("name", ""))))),
        layers=layers[:MOST_LAYERS],
        count=len(layers),
        parameters=sum(layer.parameters for layer in layers),
        macs=sum(layer.macs for layer in layers),
    )


def _layer(entry: Mapping[str, Any]) -> Layer | None:
    parameters, macs = finite(entry.get("parameters")), finite(entry.get("macs"))
    if parameters is None or macs is None:
        return None
    sizes = [finite(size) for size in listed(entry.get("shape"))]
    shape = "×".join("?" if size is None else f"{size:.0f}" for size in sizes)
    return Layer(str(entry.get("name", "")), str(entry.get("op", "")), shape, parameters, macs)
