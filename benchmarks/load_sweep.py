"""Save whole models by torch.save and load them back: one of every timm family, every torchvision model.

    python benchmarks/load_sweep.py [--json FILE] [--largest 60]

A model passes when the loaded one has the same class, weights and training flags. Of each timm family the smallest
model is taken; models of more than `--largest` million parameters are left out, and counted.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from indistill_fx.constructors import build_timm, build_torchvision
from indistill_fx.errors import ConfigError
from indistill_fx.unpickle import load_rehearsed, rehearse


def count_parameters(build: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def smallest_of_family(family: str) -> str:
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        try:
            sizes[name] = count_parameters(lambda name=name: timm.create_model(name))
        except Exception:  # some cannot be built without data
            continue
    return min(sizes, key=lambda name: sizes[name]) if sizes else timm.list_models(module=family)[0]


def round_trip(build: Callable[[], nn.Module]) -> dict[str, Any]:
    model, file = build(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    start = time.perf_counter()
    try:
        rehearsal = rehearse(file, "model.pt")
        rehearsed = time.perf_counter()
        loaded = load_rehearsed(file, "model.pt", rehearsal)
    except ConfigError as error:
        return {"ok": False, "reason": str(error)}
    seconds = {"rehearse": round(rehearsed - start, 4), "load": round(time.perf_counter() - rehearsed, 4)}
    own, back = model.state_dict(), loaded.state_dict()
    same = own.keys() == back.keys() and all(torch.equal(own[key], back[key]) for key in own)
    flags = [part.training for part in model.modules()] == [part.training for part in loaded.modules()]
    return {"ok": type(loaded) is type(model) and same and flags, **seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--largest", type=float, default=60, help="in million parameters")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    builders: dict[str, Callable[[], nn.Module]] = {
        f"timm:{name}": lambda name=name: build_timm(name, {}) for name in map(smallest_of_family, timm.list_modules())
    }
    for name in torchvision.models.list_models():
        builders[f"torchvision:{name}"] = lambda name=name: build_torchvision(name, {})
    results: dict[str, Any] = {}
    skipped: list[str] = []
    for spec, build in builders.items():
        if count_parameters(build) > options.largest * 1e6:
            skipped.append(spec)
            continue
        results[spec] = round_trip(build)
        if not results[spec]["ok"]:
            print(spec, results[spec])
    passed = sum(result["ok"] for result in results.values())
    print(f"{passed} of {len(results)} whole-model pickles load as saved; {len(skipped)} were too large to try")
    if options.json:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
        record = {"date": datetime.now(UTC).isoformat(), "python": platform.python_version(), **versions}
        options.json.write_text(json.dumps({**record, "skipped": skipped, "results": results}, indent=1))


if __name__ == "__main__":
    main()
