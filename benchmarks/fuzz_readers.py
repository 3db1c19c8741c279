"""Coverage-guided fuzzing (atheris, libFuzzer) of everything that reads a file or a text from outside: no crash, no hang, no fault of ours.

    python benchmarks/fuzz_readers.py --minutes 30 [--reader module …] [--json FILE]
    python benchmarks/fuzz_readers.py --json FILE --add FILE…

For each reader one process of its own starts from sound files and follows what reaches new lines of ours. Archives, JSON, tensor
files and ONNX are also taken apart, changed within one part, and reassembled, so that checksums and grammar do not stop it at
the door. A refusal is an `IndistillError`; everything else that is raised, more than 60 s of a processor for one input, or 4 GiB,
is a fault. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from file_readers import NAMES, reader

LIMIT_SECONDS, LIMIT_MIB, WAITED = 60, 4096, 900
"""For one input: seconds of a processor, memory, and seconds of the clock, which a busy machine takes longer for."""


def fuzz(name: str, seconds: int, place: Path) -> None:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris
    from mutations import mutate

    warnings.simplefilter("ignore")
    with atheris.instrument_imports(include=["indistill_fx"]):
        read, sound = reader(name)
    from indistill_fx.errors import IndistillError

    corpus = place / "corpus"
    corpus.mkdir()
    for k, content in enumerate(sound()):
        (corpus / str(k)).write_bytes(content)
    faults: dict[str, str] = {}

    def one(content: bytes) -> None:
        home = place / "now"
        home.mkdir()
        began = time.process_time()
        try:
            (home / "file").write_bytes(content)
            read(home / "file")
        except IndistillError:
            pass
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            note(f"{type(error).__name__} in {Path(last.filename).name}:{last.lineno}", str(error)[:200], content)
        finally:
            shutil.rmtree(home)
        if time.process_time() - began > LIMIT_SECONDS:
            note(f"more than {LIMIT_SECONDS} s", f"{len(content)} bytes", content)

    def note(fault: str, text: str, content: bytes) -> None:
        if fault not in faults:
            faults[fault] = text
            (place / f"fault-{len(faults)}").write_bytes(content)
            (place / "faults.json").write_text(json.dumps(faults))

    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={WAITED}",
        f"-rss_limit_mb={LIMIT_MIB}",
        "-print_final_stats=1",
    ]
    arguments += [f"-artifact_prefix={place}/", "-max_len=65536", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=mutate)
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
