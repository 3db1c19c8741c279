"""Damage model files at random and load them: each must load or be refused with a clear error, never crash or hang.

    python benchmarks/fuzz_loading.py [--count 500] [--seed 0] [--json FILE] [--audit]

Kinds: a whole module (`.pt`), the same in the format before PyTorch 1.6, weights in both formats, safetensors, `.pt2`.
Half of the mutations of an archive are made inside one of its entries and the archive is rewritten, so that its
checksums are right and the damage reaches the readers after them. Files are loaded in child processes with a limit on
time and memory; a child that dies or hangs is counted against the file it was at. `--audit` searches constructors of
all allowed module classes for code that opens, fetches or evaluates, which the allow-list relies on not being there.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import io
import json
import pkgutil
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIMIT_SECONDS, LIMIT_EXTRA_BYTES = 20, 6 << 30
FACTORY = (
    "from torch import nn\ndef make():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
)


def write_samples(folder: Path) -> dict[str, str]:
    """One sound file of each kind; returns the spec that loads it, with FILE where the file goes."""
    import torch
    import torchvision
    from safetensors.torch import save_file

    (folder / "factory.py").write_text(FACTORY)
    sys.path.insert(0, str(folder))
    model = importlib.import_module("factory").make().eval()
    whole = torchvision.models.squeezenet1_1(num_classes=2).features[:5].eval()
    torch.save(whole, folder / "module")
    torch.save(whole, folder / "legacy-module", _use_new_zipfile_serialization=False)
    torch.save(model.state_dict(), folder / "weights")
    torch.save(model.state_dict(), folder / "legacy-weights", _use_new_zipfile_serialization=False)
    save_file(model.state_dict(), folder / "safetensors")
    images = (torch.randn(2, 3, 8, 8),)
    program = torch.export.export(model, images, dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "export.pt2")
    (folder / "export.pt2").rename(folder / "export")
    weights = f"{folder / 'factory.py'}:make@FILE"
    whole_kinds = dict.fromkeys(("module", "legacy-module", "export"), "FILE")
    return whole_kinds | dict.fromkeys(("weights", "legacy-weights", "safetensors"), weights)


def mutate(content: bytes, dice: random.Random) -> bytes:
    """Flip bits, overwrite, insert, repeat, delete or cut off."""
    data, how = bytearray(content), dice.randrange(6)
    spot = dice.randrange(len(data))
    length = min(dice.choice((1, 2, 8, 64, 512)), len(data) - spot)
    if how == 0:
        for _ in range(dice.choice((1, 1, 2, 8, 32))):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == 1:
        data[spot : spot + length] = dice.randbytes(length)
    elif how == 2:
        data[spot:spot] = dice.randbytes(length)
    elif how == 3:
        data[spot:spot] = data[spot : spot + length]
    elif how == 4:
        del data[spot : spot + length]
    else:
        del data[spot:]
    return bytes(data)


def mutate_inside(content: bytes, dice: random.Random) -> bytes:
    """Mutate one entry of an archive, mostly one that is not a tensor, and rewrite the archive."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(target, "w") as written:
        entries = archive.infolist()
        structural = [
            entry for entry in entries if entry.file_size and re.search(r"(pkl|json|/model\.pt)$", entry.filename)
        ]
        chosen = dice.choice(structural if dice.random() < 0.8 else [entry for entry in entries if entry.file_size])
        for entry in entries:
            data = archive.read(entry)
            written.writestr(entry.filename, mutate(data, dice) if entry is chosen else data)
    return target.getvalue()


def load_one(spec: str) -> str:
    """Load a spec as a user would, and walk what comes out."""
    from indistill_fx.errors import ConfigError, FrontendError
    from indistill_fx.loading.load import load_source

    try:
        module = load_source(spec).module
    except (ConfigError, FrontendError) as error:
        return f"refused: {type(error).__name__}: {error}"
    module.train(module.training)
    return f"loaded: {len(module.state_dict())} tensors, {len(repr(module))}"


def work(specs: list[str], start: int) -> None:
    """In the child: load one after the other, saying which before and what came out after."""
    import torch
    import torch.export

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_EXTRA_BYTES, used + LIMIT_EXTRA_BYTES))
    for index in range(start, len(specs)):
        print(json.dumps({"at": index}), flush=True)
        try:
            outcome = load_one(specs[index])
        except Exception as error:
            outcome = f"escaped: {type(error).__name__}: {error}"
        print(json.dumps({"done": index, "outcome": outcome}), flush=True)


def run(specs: list[str], folder: Path) -> list[str]:
    """Load all specs in children; one more child after each death."""
    outcomes: dict[int, str] = {}
    (folder / "specs.json").write_text(json.dumps(specs))
    while len(outcomes) < len(specs):
        start = len(outcomes)
        command = [sys.executable, __file__, "--work", str(folder / "specs.json"), str(start)]
        ended = "crashed"
        try:
            budget = 60 + LIMIT_SECONDS * 5 + len(specs)
            text = subprocess.run(command, capture_output=True, text=True, timeout=budget, check=False).stdout
        except subprocess.TimeoutExpired as expired:
            text, ended = (expired.stdout or b"").decode(), "hung"
        for line in text.splitlines():
            report = json.loads(line)
            if "done" in report:
                outcomes[report["done"]] = report["outcome"]
        if len(outcomes) < len(specs):
            outcomes[len(outcomes)] = f"{ended}:"
    return [outcomes[index] for index in range(len(specs))]


def fuzz(kind: str, spec: str, folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Damage one kind of file `count` times, and count what loading says."""
    dice, content = random.Random(f"{kind}{seed}"), (folder / kind).read_bytes()
    is_archive = content[:2] == b"PK"
    specs = []
    for number in range(count):
        target = folder / f"{kind}-{number}"
        target.write_bytes(mutate_inside(content, dice) if is_archive and number % 2 else mutate(content, dice))
        specs.append(spec.replace("FILE", str(target)))
    outcomes = run(specs, folder)
    tally = Counter(outcome.partition(":")[0] for outcome in outcomes)
    sound = [
        f"{index}: {outcome}" for index, outcome in enumerate(outcomes) if not outcome.startswith(("loaded", "refused"))
    ]
    for path in folder.glob(f"{kind}-[0-9]*"):
        path.unlink()
    return {"count": count, **tally, "faults": sound, "reasons": _reasons(outcomes)}


def _reasons(outcomes: list[str]) -> dict[str, int]:
    """The refusals with paths, numbers and quoted names taken out, the most frequent first."""
    plain = (re.sub(r"`[^`]*`|'[^']*'|\d[\d,]*", "…", outcome)[:110] for outcome in outcomes if outcome[0] == "r")
    return dict(Counter(plain).most_common(12))


def audit() -> list[str]:
    """Constructors, `__setstate__` and `forward` of allowed module classes that do more than compute."""
    from torch import nn

    from indistill_fx.loading.allow_list import MODULE_PACKAGES

    warnings.simplefilter("ignore")
    classes: set[type] = set()
    for package in MODULE_PACKAGES:
        root = importlib.import_module(package)
        paths = getattr(root, "__path__", None)
        names = (
            [entry.name for entry in pkgutil.walk_packages(paths, f"{package}.", onerror=lambda _: None)]
            if paths
            else []
        )
        for name in [package, *names]:
            try:
                held = vars(importlib.import_module(name)).values()
            except Exception:  # optional dependencies
                continue
            classes |= {value for value in held if isinstance(value, type) and issubclass(value, nn.Module)}
    risky = re.compile(
        r"\b(open|load|exec|import_module|__import__|urlopen|download\w*|system|popen|pickle|hub|unlink)\s*\("
    )
    found = []
    for kind in sorted(classes, key=lambda kind: kind.__module__ + kind.__qualname__):
        for method in ("__init__", "__new__", "__setstate__", "forward"):
            code = kind.__dict__.get(method)
            if code is None or not kind.__module__.startswith(MODULE_PACKAGES):
                continue
            try:
                if hits := risky.findall(inspect.getsource(code)):
                    found.append(f"{kind.__module__}.{kind.__qualname__}.{method}: {', '.join(hits)}")
            except (OSError, TypeError):  # object's own
                continue
    print(f"audit: {len(classes)} module classes, {len(found)} to look at")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--audit", action="store_true")
    parser.add_argument("--work", nargs=2)
    options = parser.parse_args()
    if options.work:
        work(json.loads(Path(options.work[0]).read_text()), int(options.work[1]))
        return
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    record: dict[str, Any] = {"date": datetime.now(UTC).isoformat(), **versions, "seed": options.seed, "kinds": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, spec in write_samples(folder).items():
            whole = run([spec.replace("FILE", str(folder / kind))], folder)[0]
            result = fuzz(kind, spec, folder, options.count, options.seed)
            record["kinds"][kind] = {"undamaged": whole[:160], **result}
            shown = {key: value for key, value in result.items() if key not in ("faults", "reasons", "count")}
            print(f"{kind:15} {result['count']} mutations: {shown}; undamaged: {whole[:60]}", flush=True)
            for fault in result["faults"]:
                print("   ", fault[:300])
    if options.audit:
        record["audit"] = audit()
        print(*record["audit"], sep="\n")
    if options.json:
        options.json.write_text(json.dumps(record, indent=1))
    if any(kind["faults"] for kind in record["kinds"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
