"""Files that attack and files that are honest, made by code and loaded as a user would: how many do harm, how many are refused.

    python benchmarks/attacks.py [--json FILE]

Every file is given to `indistill-fx inspect`, or to what else reads it, in a process of its own (forked, 60 s of a processor, 2 GiB
beyond what torch itself takes), in an empty folder with a home of its own. Counted of hostile files: code run (a canary lies there),
files written elsewhere, exit code 1 ("our fault"), a crash, too long or too much memory. Counted of honest files: refused.
Whole models of torchvision and timm: benchmarks/load_sweep.py.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from files_made import Make, altered, network, pictures_of, saved
from honest_files import beside, honest
from hostile_files import hostile

SECONDS, BYTES, WAITED = 60, 2 << 30, 600
"""Of the processor, of memory beyond torch's own, and of the clock, for a machine with other work."""


def run_one(make: Make, folder: Path, canary: Path) -> dict[str, Any]:
    """Make a file and load it in a forked process; what came of it."""
    files, work, home = (folder / name for name in ("files", "work", "home"))
    for place in (files, work, home):
        place.mkdir(parents=True)
    try:
        arguments = make(files)
    except Exception as error:  # torch itself does not write it
        return {"outcome": "not made", "said": f"{type(error).__name__}: {error}"[:200]}
    before, start = {str(path) for path in folder.rglob("*")}, time.monotonic()
    key = home / ".local" / "state" / "indistill-fx" / "key"  # the user's own, which a run makes that the user starts
    before |= {str(path) for path in (key, *key.parents)}
    asked = [arguments[k + 1] for k, argument in enumerate(arguments) if argument == "-o"]
    child = os.fork()
    if not child:
        _load(arguments, work, home, folder.with_suffix(".said"))
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - start > WAITED:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    seconds = time.monotonic() - start
    ran, written = (
        canary.exists(),
        [
            str(path.relative_to(folder))
            for path in sorted(folder.rglob("*"))
            if str(path) not in before and not any(path.is_relative_to(place) for place in asked)
        ],
    )
    canary.unlink(missing_ok=True)
    said = folder.with_suffix(".said").read_text(errors="replace")
    code = os.waitstatus_to_exitcode(status)  # a signal's number, negative
    outcome = {0: "loaded", 2: "refused", 1: "our fault"}.get(code, "crashed")
    computed = usage.ru_utime + usage.ru_stime
    if seconds > WAITED or computed > SECONDS:
        outcome = "hung"
    told = {"outcome": outcome, "ran": ran, "written": written, "seconds": round(computed, 2), "said": said[:300],
            "peak_mib": usage.ru_maxrss >> 10}  # fmt: skip
    return (
        told
        if outcome in ("loaded", "refused")
        else {**told, "exit_code": code, "said": said.partition("Extension modules")[0][:4000]}
    )


def _load(arguments: list[str], work: Path, home: Path, said: Path) -> None:
    """In the child; never returns. What it says goes to a file, with every thread's Python stack if a signal ends it."""
    code = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 2)
        faulthandler.enable(file)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS + 1, SECONDS + 2))
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        os.environ["HOME"] = str(home)
        os.chdir(work)
        torch.set_num_threads(
            1
        )  # else the threads that autograd starts race for the pool that the fork lost (torch 2.14 aborts)
        from indistill_fx.cli import run
        from indistill_fx.loading.load import load_source

        with (
            open(file, "w", errors="replace") as err,
            contextlib.redirect_stderr(err),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            code = run(arguments) if arguments[0] != "load" else 2 * (load_source(arguments[1]) is None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def import_first(folder: Path) -> None:
    """Load sound files in this process, so that no fork has to import what loading needs."""
    from indistill_fx.cli import run

    folder.mkdir()
    sound = [saved(network()), beside(), altered(lambda _: None, program=True), pictures_of(lambda content: content)]
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        for number, make in enumerate(sound):
            (folder / str(number)).mkdir()
            run(make(folder / str(number)))


def count(makes: dict[str, Make], top: Path, canary: Path, *, show: bool = False) -> dict[str, dict[str, Any]]:
    """What came of every file."""
    found: dict[str, dict[str, Any]] = {}
    for number, (name, make) in enumerate(makes.items()):
        found[name] = run_one(make, top / str(number), canary)
        if show:
            print(f"{found[name]['outcome']:9} {name}: {found[name].get('said', '')[:110]!r}", flush=True)
    return found


def faults(found: dict[str, dict[str, Any]], *, may_be_refused: bool) -> list[str]:
    """The files that did what none may do."""
    legal = ("loaded", "refused", "not made") if may_be_refused else ("loaded",)
    return [name for name, one in found.items() if one["outcome"] not in legal or one.get("ran") or one.get("written")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        canary = Path(name, "canary")
        import_first(Path(name, "sound"))
        evil = count(hostile(str(canary)), Path(name, "hostile"), canary, show=True)
        good = count(honest(), Path(name, "honest"), canary, show=True)
    wrong, refused = faults(evil, may_be_refused=True), faults(good, may_be_refused=False)
    made = sum(one["outcome"] != "not made" for one in evil.values())
    print(
        f"{made} hostile files: {len(wrong)} did harm {wrong}; {len(good)} honest files: {len(refused)} refused {refused}"
    )
    if options.json:
        record = {
            "date": datetime.now(UTC).isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        record |= {"hostile_files": made, "harm": wrong, "honest_files": len(good), "refused": refused}  # type: ignore[dict-item]
        options.json.write_text(json.dumps({**record, "hostile": evil, "honest": good}, indent=1) + "\n")
    sys.exit(bool(wrong or refused))


if __name__ == "__main__":
    main()
