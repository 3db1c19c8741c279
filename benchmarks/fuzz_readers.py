"""Coverage-guided fuzzing (atheris, libFuzzer) of everything that reads a file or a text from outside: no crash, no hang, no fault of ours.

    python benchmarks/fuzz_readers.py --minutes 30 [--reader module …] [--json FILE]
    python benchmarks/fuzz_readers.py --json FILE --add FILE…

For each reader one process of its own starts from sound files and follows what reaches new lines of ours. Archives are also
taken apart, mutated within one entry, and put together anew, so that their checksums do not stop it at the door. A refusal
is an `IndistillError`; everything else that is raised, more than 60 s for one input, or 4 GiB, is a fault. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "0.1.0"
LIMIT_SECONDS, LIMIT_MIB = 60, 4096
Reader = Callable[[Path], object]


def model() -> Any:
    """A small one; written whole its file has the kinds of records that larger ones have."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)).eval()


def saved(write: Callable[[Any], None]) -> bytes:
    """What a function writes."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def readers() -> dict[str, tuple[Reader, Callable[[], list[bytes]]]]:
    """By name: what reads a file, and sound files to start from."""
    import torch

    from indistill_fx.data.decoding import decode
    from indistill_fx.data.image_folders import Listing
    from indistill_fx.data.pictures import read_head, read_picture
    from indistill_fx.loading.inputs import parse_input
    from indistill_fx.loading.load import load_source
    from indistill_fx.loading.spec import parse_spec
    from indistill_fx.loading.state_dicts import load_weights, read_state_dict
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.report.read_runs import read_runs
    from indistill_fx.runs.checkpoint import load_checkpoint
    from indistill_fx.runs.load import load_run, run_fingerprint
    from indistill_fx.system.tensor_files import save_tensors
    from indistill_fx.training.feature_cache import FeatureStore, fault_of, index_digest
    from indistill_fx.training.state import State, check_parts

    def whole(path: Path) -> object:
        return load_source(str(path.rename(path.with_suffix(".pt"))))

    def program(path: Path) -> object:
        return load_source(str(path.rename(path.with_suffix(".pt2"))))

    def weights(path: Path) -> object:
        return load_weights(model(), path)

    def checkpoint(path: Path) -> object:
        return State.read(check_parts(load_checkpoint(path)[1], path)["state"], path)

    def run(path: Path) -> object:
        home = path.parent / "run"
        shutil.copytree(GOLDEN / "run", home, dirs_exist_ok=True)
        path.replace(home / "run.json")
        run_fingerprint(home)
        read_runs(home)
        return load_run(home)

    def metrics(path: Path) -> object:
        home = path.parent / "run"
        shutil.copytree(GOLDEN / "run", home, dirs_exist_ok=True)
        path.replace(home / "metrics.jsonl")
        return read_runs(home)

    def picture(path: Path) -> object:
        read_head(str(path))
        return read_picture(str(path))

    def features(path: Path) -> object:
        """As found; and with the right digest of what it says, which is where a damaged file never comes to."""
        (path.parent / "0.bin").write_bytes(bytes(96))
        index = path.rename(path.with_name("features.json"))
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            taps = json.loads(index.read_bytes()).get("taps")
            if index.stat().st_size % 2:
                index.write_text(json.dumps({"taps": taps, "digest": index_digest(taps)}))
        return fault_of(path.parent) or FeatureStore(path.parent, ["x"]).features

    def feature_index() -> list[bytes]:
        digest = hashlib.sha256(bytes(96)).hexdigest()
        taps = {"layer1": {"file": "0.bin", "shape": [2, 3, 2, 2], "dtype": "float32", "digest": digest}}
        whole = json.dumps({"taps": taps, "digest": index_digest(taps)}).encode()
        return [whole, whole + b" "]

    names: list[str] = []

    def cached_pictures(path: Path) -> object:
        """Bytes in the place of the cache, whose name stays the same; a damaged one is made anew."""
        cache, shown = path.parent / "cache", path.parent / "0.png"
        shown.write_bytes(pictures()[0])
        os.utime(shown, (0, 0))
        listing = Listing(path.parent, (str(shown),), None, ())
        if not names:
            decode(listing, (4, 4), cache=cache)
            names.append(next(cache.glob("*.safetensors")).name)
        cache.mkdir(exist_ok=True)
        path.replace(cache / names[0])
        return decode(listing, (4, 4), cache=cache)

    def picture_cache() -> list[bytes]:
        from safetensors.torch import save as to_bytes

        held = {"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "resized": torch.tensor(0)}
        with tempfile.TemporaryDirectory() as folder:
            save_tensors(Path(folder, "a"), held, {"format": "pictures 3"})
            return [Path(folder, "a").read_bytes(), to_bytes(held, {"format": "pictures 3"})]

    def text(parse: Callable[[str], object]) -> Reader:
        return lambda path: parse(path.read_bytes().decode("utf-8", "replace"))

    def exported() -> list[bytes]:
        made = torch.export.export(
            model(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
        return [saved(lambda file: torch.export.save(made, file))]

    def tensors(path: Path) -> object:
        return read_state_dict(path)

    def pictures() -> list[bytes]:
        from PIL import Image

        kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
        return [saved(lambda file, kind=kind: Image.new("RGB", (4, 4)).save(file, kind)) for kind in kinds]

    def safetensors() -> list[bytes]:
        from safetensors.torch import save as to_bytes

        return [to_bytes(model().state_dict(), {"sha256": "{}"}), to_bytes(model().state_dict())]

    about = {
        "model": "indistill_fx.demo:DigitsStudent",
        "input_size": [1, 8, 8],
        "classes": ["a"],
        "normalisation": [[0.5], [0.5]],
    }
    told = json.loads((GOLDEN / "run" / "run.json").read_text()) | {"about": about}
    specs = ["torchvision:resnet18?num_classes=10@w.pt", "models.py:make?width=(1,2)", "a@b.pt", "C:\\m.pt"]
    inputs = ["3x32x32", "input_ids:int64[0..30521]x128", "mask:boolx8"]
    return {
        "module": (
            whole,
            lambda: [
                saved(lambda f: torch.save(model(), f)),
                saved(lambda f: torch.save(torch.fx.symbolic_trace(model()), f)),
            ],
        ),
        "legacy module": (
            whole,
            lambda: [saved(lambda f: torch.save(model(), f, _use_new_zipfile_serialization=False))],
        ),
        "weights": (
            weights,
            lambda: [saved(lambda f: torch.save({"state_dict": model().state_dict(), "epoch": 3}, f))],
        ),
        "safetensors": (tensors, safetensors),
        "pt2": (program, exported),
        "plan": (AlignmentPlan.load, lambda: [(GOLDEN / "plan.json").read_bytes()]),
        "run.json": (run, lambda: [json.dumps(told).encode()]),
        "metrics": (metrics, lambda: [(GOLDEN / "run" / "metrics.jsonl").read_bytes()]),
        "checkpoint": (checkpoint, lambda: [(GOLDEN / "run" / "checkpoints" / "last.safetensors").read_bytes()]),
        "picture": (picture, pictures),
        "picture cache": (cached_pictures, picture_cache),
        "feature cache": (features, feature_index),
        "spec": (text(parse_spec), lambda: [spec.encode() for spec in specs]),
        "input": (text(parse_input), lambda: [shape.encode() for shape in inputs]),
    }


def within_an_entry(content: bytes, most: int, seed: int) -> bytes:
    """Mutate one entry of an archive, and write it anew; anything else as it is."""
    import atheris

    dice = random.Random(seed)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:
        entries = []
    if not entries or dice.random() < 0.2:
        return bytes(atheris.Mutate(content, most))
    place = dice.randrange(len(entries))
    name, held = entries[place]
    entries[place] = name, bytes(atheris.Mutate(held, 2 * len(held) + 64))
    return saved(lambda file: _written(file, entries))


def _written(file: Any, entries: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, held in entries:
            archive.writestr(name, held)


def fuzz(name: str, seconds: int, place: Path) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["indistill_fx"]):
        found = readers()
    from indistill_fx.errors import IndistillError

    read, sound = found[name]
    corpus = place / "corpus"
    corpus.mkdir()
    for k, content in enumerate(sound()):
        (corpus / str(k)).write_bytes(content)
    faults: dict[str, str] = {}

    def one(content: bytes) -> None:
        home = place / "now"
        home.mkdir()
        try:
            (home / "file").write_bytes(content)
            read(home / "file")
        except IndistillError:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}"
            if key not in faults:
                faults[key] = str(error)[:200]
                (place / f"fault-{len(faults)}").write_bytes(content)
                (place / "faults.json").write_text(json.dumps(faults))
        finally:
            shutil.rmtree(home)

    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={LIMIT_SECONDS}",
        f"-rss_limit_mb={LIMIT_MIB}",
        "-print_final_stats=1",
    ]
    arguments += [f"-artifact_prefix={place}/", "-max_len=65536", "-verbosity=0", str(corpus)]
    zipped = name in ("module", "weights", "pt2")
    atheris.Setup([sys.argv[0], *arguments], one, **({"custom_mutator": within_an_entry} if zipped else {}))
    atheris.Fuzz()


def trial(name: str, seconds: int, keep: Path | None) -> dict[str, Any]:
    """Fuzz one reader in a process of its own; how many inputs, and what went wrong."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, __file__, "--child", name, "--seconds", str(seconds), "--place", folder]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        inputs = re.search(r"stat::number_of_executed_units: *(\d+)", done.stderr)
        told = Path(folder, "faults.json")
        faults = json.loads(told.read_text()) if told.exists() else {}
        if done.returncode:
            faults[f"exit code {done.returncode}"] = done.stderr[-600:]
        artifacts = [
            path for path in Path(folder).iterdir() if path.name.startswith(("fault-", "crash-", "timeout-", "oom-"))
        ]
        for path in artifacts if keep is not None else ():
            shutil.copy(path, keep / f"{name.replace(' ', '-')}-{path.name[:20]}")
    seconds_taken = round(time.monotonic() - began)
    return {"reader": name, "seconds": seconds_taken, "inputs": int(inputs[1]) if inputs else None, "faults": faults}


def add(found: list[dict[str, Any]], path: Path) -> None:
    """Write results to a file, added to those of earlier sittings in it: seconds and inputs are summed, faults kept."""
    from indistill_fx.runs.record import environment

    held = {one["reader"]: one for one in json.loads(path.read_text())["readers"]} if path.exists() else {}
    for one in found:
        before = held.get(one["reader"], {"seconds": 0, "inputs": 0, "faults": {}})
        sums = {key: before[key] + (one[key] or 0) for key in ("seconds", "inputs")}
        held[one["reader"]] = {"reader": one["reader"], **sums, "faults": before["faults"] | one["faults"]}
    told = {"command": " ".join(sys.argv), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    whole = {**told, "environment": environment("cpu", 1), "readers": list(held.values())}
    path.write_text(json.dumps(whole, indent=2) + "\n")


NAMES = (
    *(
        "module",
        "legacy module",
        "weights",
        "safetensors",
        "pt2",
        "plan",
        "run.json",
        "metrics",
        "checkpoint",
        "picture",
    ),
    *("picture cache", "feature cache", "spec", "input"),
)


def main() -> None:
    """Print the result; exit code 1 if a reader failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="for each reader")
    parser.add_argument("--reader", action="append", choices=NAMES, help="only this one; may be repeated")
    parser.add_argument("--json", metavar="FILE", help="also add the result to what is in this file")
    parser.add_argument("--add", metavar="FILE", nargs="+", help="do not fuzz: add what these files hold")
    parser.add_argument("--keep", metavar="DIR", help="copy inputs that failed here")
    for hidden in ("--child", "--seconds", "--place"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        fuzz(options.child, int(options.seconds), Path(options.place))
    if options.add:
        for path in map(Path, options.add):
            add(json.loads(path.read_text())["readers"], Path(options.json))
        return
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    found = []
    for name in options.reader or NAMES:
        found.append(trial(name, round(60 * options.minutes), Path(options.keep) if options.keep else None))
        print(json.dumps(found[-1]), flush=True)
        if options.json:
            add(found[-1:], Path(options.json))
    sys.exit(1 if any(one["faults"] or not one["inputs"] for one in found) else 0)


if __name__ == "__main__":
    main()
