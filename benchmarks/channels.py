"""Are the channel rules right on real networks, and what do they cost? Sweeps of `narrow` and `shrink` over the zoo.

    python benchmarks/channels.py narrow --json benchmarks/results/channels_narrow.json    every tap of every model, a random half
    python benchmarks/channels.py shrink --json benchmarks/results/channels_shrink.json    every classifier at ratio 0.5
    python benchmarks/channels.py beside --json benchmarks/results/channels_shrink.json    the same, with Torch-Pruning after each
    python benchmarks/channels.py exact --json benchmarks/results/channels_exact.json      every (C, n), C up to 256
    python benchmarks/channels.py table FILE… [--into docs/coverage.md]                    the results as Markdown

(With `PYTHONPATH=.`, since the checks are those of the tests.)

Every model runs in a process of its own with a limit on CPU time and memory; the file is written after each. `--resume` keeps what is
in the file, `--minutes` starts no more models after that. All comparisons are in float64 with random weights and batch norms
calibrated on data, and relative to the part of a tensor that depends on the input: a constant cannot pass a test. Pictures are as
small as a network takes them (64 or 96 pixels where it does not mind). Times are CPU seconds of one thread, in a new process for each,
whose garbage (of the imports, 0.2 s) is collected before the clock starts: else who first makes enough objects pays for it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from channel_checks import exact_one, narrow_one, shrink_one, torch_pruning_one
from channel_tables import tables
from zoo import Source, ZooModel, zoo

_HEAVY = "large gf vit_l vit_h 152 101 161 201 _b7 _b6 _b5 _l vgg1 base segmentation deeplab fcn".split()
"""In the names of models that are run last."""
_ENDLESS = ("swin", "maxvit")
"""Families that Torch-Pruning 1.6.1 was not seen to finish: it gets a shorter time there."""
Task = Callable[[ZooModel], dict[str, Any]]
Record = dict[str, Any]


def run_all(task: str, models: list[ZooModel], path: Path | None, options: argparse.Namespace) -> None:
    """One process per model; the file is written after each."""
    record = _open(path, task, resume=options.resume)
    results: dict[str, Any] = record.setdefault("models", {})
    end = time.monotonic() + 60 * options.minutes
    took = _seconds(options.order) if options.order else {}
    for model in sorted(models, key=lambda m: took.get(m.id, 1e6 * any(word in m.name for word in _HEAVY))):
        if time.monotonic() > end:
            print(f"{options.minutes} minutes are over; --resume goes on.")
            return
        steps: dict[str, Task] = {"": narrow_one if task == "narrow" else shrink_one}
        if task == "beside":
            steps["torch_pruning"] = torch_pruning_one
        done = results.get(model.id, {})
        if all(name in done if name else "family" in done for name in steps) and not _again(done, options):
            continue
        found = {"family": model.family, "date": record["date"][:10]}
        for name, step in steps.items():
            limit = options.limit / 4 if name and model.family in _ENDLESS else options.limit
            one = in_process(step, model, limit, options.memory)
            found |= {name: one} if name else one
        results[model.id] = found
        record["missing"] = [m.id for m in zoo(_source(task)) if m.id not in results]
        print(_line(model.id, found), flush=True)
        _write(path, record)


def _seconds(earlier: Path) -> dict[str, float]:
    """What each model took in an earlier record."""
    rows = json.loads(earlier.read_text())["models"]
    parts = ("seconds", "trace_seconds", "shrink_seconds")
    return {name: sum(row.get(part) or 0.0 for part in parts) or 1e6 for name, row in rows.items()}


def _source(task: str) -> Source | None:
    return None if task == "narrow" else "torchvision"


def _again(done: Record, options: argparse.Namespace) -> bool:
    return bool(options.failed and not done.get("ok"))


def exact(path: Path | None, options: argparse.Namespace) -> None:
    """Asking for n gets n, for all (C, n) with C up to 256."""
    record = _open(path, "exact", resume=options.resume)
    results: dict[str, list[str]] = record.setdefault("wrong", {})
    end = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(1)
    for channels in range(1, 257):
        if time.monotonic() > end:
            break
        if str(channels) not in results:
            results[str(channels)] = exact_one(channels)
            _write(path, record)
    print(tables({"": record}))


def _open(path: Path | None, task: str, *, resume: bool) -> Record:
    record: Record = json.loads(path.read_text()) if path and path.exists() and resume else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return record | {"task": task, "versions": _versions(), "date": now, "command": " ".join(sys.argv)}


def _write(path: Path | None, record: Record) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _line(name: str, result: Record) -> str:
    left_out = ("stopped", "whole", "inexact", "frozen", "failures")
    short = {key: value for key, value in result.items() if key not in left_out}
    why = result.get("failures") or result.get("stopped") or result.get("inexact") or result.get("frozen") or ""
    return f"{'ok  ' if result.get('ok') else 'FAIL'} {name} {short} {why}"


def in_process(task: Task, model: ZooModel, limit: float, memory: float) -> dict[str, Any]:
    """What a task says of a model, in a process with so many CPU seconds and GiB of address space."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(task, model, limit, memory, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        process.join()
        ended = "more than its CPU time" if process.exitcode == -24 else f"exit code {process.exitcode}"
        return {"ok": False, "error": f"the process was stopped: {ended} ({limit:.0f} s)"}
    finally:
        process.kill()
        process.join()


def _send(task: Task, model: ZooModel, limit: float, memory: float, sender: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2**30), int(memory * 2**30)))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    try:
        sender.send(task(model))
    except BaseException as error:  # a sweep records whatever happens
        sender.send({"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "timm", "torch-pruning", "indistill-fx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from the repository" if name == "indistill-fx" else "absent"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["narrow", "shrink", "beside", "exact", "table"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--into", type=Path, help="the document whose tables are replaced")
    parser.add_argument("--only", default="", help="models whose id contains one of these, separated by commas")
    parser.add_argument("--limit", type=float, default=400.0, help="CPU seconds per model")
    parser.add_argument("--memory", type=float, default=8.0, help="address space per model, GiB")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no more models after that")
    parser.add_argument("--order", type=Path, help="an earlier record: what took least there comes first")
    parser.add_argument("--resume", action="store_true", help="keep what is in the file")
    parser.add_argument("--failed", action="store_true", help="run again what failed")
    options = parser.parse_args()
    if options.task == "exact":
        exact(options.json, options)
    elif options.task == "table":
        text = tables({path.name: json.loads(path.read_text()) for path in options.files})
        print(text) if options.into is None else put_into(options.into, text)
    else:
        models = zoo(_source(options.task))
        some = [m for m in models if any(part in m.id for part in options.only.split(","))]
        if any(m.source == "timm" for m in some):
            import timm  # noqa: F401  once, before the forks
        run_all(options.task, some, options.json, options)


_BEGIN, _END = "<!-- channels: made by benchmarks/channels.py table -->", "<!-- channels: end -->"


def put_into(path: Path, text: str) -> None:
    """Replace the part between the two marks; at the end, under a heading, where there are none."""
    old = path.read_text() if path.exists() else "# Coverage\n"
    if _BEGIN not in old:
        old = f"{old.rstrip()}\n\n## Channels\n\n{_BEGIN}\n{_END}\n"
    before, rest = old.split(_BEGIN, 1)
    path.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{rest.split(_END, 1)[1]}")


if __name__ == "__main__":
    main()
