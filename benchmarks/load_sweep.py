"""Save whole models by torch.save and load them back: one of every timm family, every torchvision model.

    python benchmarks/load_sweep.py [--json FILE] [--largest 60]

A model passes when the loaded one has the same class, weights and training flags. Of each timm family a small model is
taken; models of more than `--largest` million parameters are left out, and counted.
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
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.libraries import build_timm, build_torchvision
from indistill_fx.loading.safe_pickle import open_saved


def count_parameters(build: Callable[[], nn.Module]) -> int:
    try:
        with torch.device("meta"):
            model = build()
    except Exception:  # some constructors compute with tensors
        model = build()
    return sum(parameter.numel() for parameter in model.parameters())


def smallest_of_family(family: str) -> str:
    """The smallest of at most six models, evenly spaced in the family's list."""
    names = timm.list_models(module=family)
    tried = names[:: -(-len(names) // 6)]
    return min(tried, key=lambda name: count_parameters(partial(build_timm, name, {})))


def round_trip(build: Callable[[], nn.Module]) -> dict[str, Any]:
    model, file = build(), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    start = time.perf_counter()
    try:
        with open_saved(file, "model.pt") as saved:
            scanned = time.perf_counter()
            loaded = saved.make(saved.root)
    except ConfigError as error:
        return {"ok": False, "reason": str(error)}
    seconds = {"scan": round(scanned - start, 4), "load": round(time.perf_counter() - scanned, 4)}
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
        f"timm:{name}": partial(build_timm, name, {}) for name in map(smallest_of_family, timm.list_modules())
    }
    for name in torchvision.models.list_models():
        builders[f"torchvision:{name}"] = partial(build_torchvision, name, {})
    results: dict[str, Any] = {}
    skipped: list[str] = []
    for spec, build in builders.items():
        if count_parameters(build) > options.largest * 1e6:
            skipped.append(spec)
            continue
        results[spec] = round_trip(build)
        print(spec, results[spec], flush=True)
    passed = sum(result["ok"] for result in results.values())
    print(f"{passed} of {len(results)} whole-model pickles load as saved; {len(skipped)} were too large to try")
    if options.json:
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
        record = {"date": datetime.now(UTC).isoformat(), "python": platform.python_version(), **versions}
        options.json.write_text(json.dumps({**record, "skipped": skipped, "results": results}, indent=1))


if __name__ == "__main__":
    main()
