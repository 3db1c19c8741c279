"""Run directories as models: what `distill` and `train` left behind, loaded again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from indistill_fx.errors import ConfigError
from indistill_fx.record import BEST, LAST, STUDENT
from indistill_fx.sources import Source, load_source, parse_spec
from indistill_fx.weights import load_weights


def is_run(spec: str) -> bool:
    """Whether a spec is a run directory."""
    return Path(spec).is_dir() and (Path(spec) / "run.json").exists()


def absolute(spec: str) -> str:
    """A model spec that means the same from any working directory: files in it by their full path."""
    parsed = parse_spec(spec)
    place, at, weights = parsed.place, "@" if parsed.weights else "", parsed.weights
    if not Path(place).exists() and not weights:
        return spec
    head = spec.removesuffix(f"@{weights}") if weights else spec
    if Path(place).exists():
        head = str(Path(place).resolve()) + head.removeprefix(place)
    return f"{head}{at}{Path(weights).resolve() if weights else ''}"


def about(model: str, data: str, input_size: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """What a run must keep so that its model can be built again: the `about` of `distill` and `train`."""
    return {"model": absolute(model), "data": data, "input_size": list(input_size), **more}


def load_run(path: str | os.PathLike[str], *, trust: Sequence[str] = (), best: bool = False) -> Source:
    """The trained model of a run directory.

    Args:
        path: the directory.
        trust: see `sources.load`.
        best: the weights of the best main epoch instead of the last ones.

    Raises:
        ConfigError: the run has not finished, or was not started from the command line (then it does not know its model).
    """
    home = Path(path)
    try:
        told = json.loads((home / "run.json").read_text(encoding="utf-8"))
        kept = told["about"]
        spec, size = str(kept["model"]), tuple(int(n) for n in kept["input_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{home / 'run.json'} does not say which model was trained.",
            where=str(home),
            hint=f"Give the model and the weights: MODEL@{home / STUDENT}.",
        ) from error
    weights = home / (BEST if best else STUDENT)
    if not weights.exists():
        reached = f"it has reached {LAST}" if (home / LAST).exists() else "it has no checkpoint"
        raise ConfigError(
            f"The run in {home} has no {weights.name}; {reached}.", where=str(home), hint="Finish it with --resume."
        )
    source = load_source(spec, trust=trust)
    notes = load_weights(source.module, weights)
    return replace(source, spec=str(home), input_size=size, example_inputs=None, notes=(*source.notes, *notes))
