"""How much of a network's work goes at ratio 0.5, over the zoo; beside what an older version of the package takes away.

    python benchmarks/removed.py run --json benchmarks/results/removed.json
    PYTHONPATH=OLDER_CHECKOUT python benchmarks/removed.py run --json benchmarks/results/removed_0.1.0.json
    python benchmarks/removed.py table benchmarks/results/removed_0.1.0.json benchmarks/results/removed.json --into docs/coverage.md

It uses the public names alone, so that it runs with any version. One model of each of timm's families and torchvision's classifiers;
the work that goes is what the smaller network's own facts say. A model that is refused, or not done in its time, loses nothing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from zoo import ZooModel, zoo

import indistill_fx as ifx

_BEGIN, _END = "<!-- removed: made by benchmarks/removed.py table -->", "<!-- removed: end -->"
_SMALL = 96
_LIMIT = 120
"""CPU seconds for each model."""


def removed(model: ZooModel) -> dict[str, Any]:
    """The part of the multiply-accumulates and of the parameters that goes, on small pictures where the network takes them."""
    for size in sorted({min(_SMALL, model.size), model.size}):
        try:
            small = replace(model, size=size)
            module = small.build()
            traced = ifx.trace(module, small.example(2))
            report = ifx.shrink(traced, ratio=0.5).report
        except Exception as error:  # whatever a network says about pictures of the wrong size, or we about the network
            found = {"macs": 0.0, "parameters": 0.0, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        return {
            "macs": round(1 - report.macs[1] / max(report.macs[0], 1), 4),
            "parameters": round(1 - report.parameters[1] / max(report.parameters[0], 1), 4),
            "size": size,
        }
    return found


def _in_process(model: ZooModel) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()  # type: ignore[no-any-return]
    except EOFError:
        return {"macs": 0.0, "parameters": 0.0, "error": f"not done in {_LIMIT} s of CPU time"}
    finally:
        process.kill()
        process.join()


def _send(model: ZooModel, sender: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (_LIMIT, _LIMIT + 5))
    sender.send(removed(model))


def run(path: Path, only: str, minutes: float) -> None:
    """Every model that is not in the file yet; the file is written after each."""
    record = json.loads(path.read_text()) if path.exists() else {"models": {}}
    record["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__}
    end = time.monotonic() + 60 * minutes
    wanted = [m for source in ("timm", "torchvision") for m in zoo(source) if m.id not in record["models"]]  # type: ignore[arg-type]
    for model in wanted:
        if only in model.id and time.monotonic() < end:
            record["models"][model.id] = found = _in_process(model)
            print(model.id, found, flush=True)
            path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The medians, over the models that both records hold, and where most changed."""
    lines = [
        "| at ratio 0.5 | models | MACs removed, median | least | parameters removed, median | nothing removed |",
        "|---|---|---|---|---|---|",
    ]
    for source in ("torchvision", "timm"):
        names = [name for name in after["models"] if name in before["models"] and name.startswith(source)]
        for title, record in (("0.1.0", before), ("now", after)):
            some = [record["models"][name] for name in names]
            if some:
                macs, params = [m["macs"] for m in some], [m["parameters"] for m in some]
                lines.append(
                    f"| {source}, {title} | {len(some)} | {statistics.median(macs):.1%} | {min(macs):.1%} | "
                    f"{statistics.median(params):.1%} | {sum(m == 0 for m in macs)} |"
                )
    both = [name for name in after["models"] if name in before["models"]]
    gain = {name: after["models"][name]["macs"] - before["models"][name]["macs"] for name in both}
    most = sorted(gain, key=lambda name: -gain[name])[:8]
    told = (f"{n} {before['models'][n]['macs']:.0%} → {after['models'][n]['macs']:.0%}" for n in most if gain[n] > 0.01)
    lines += ["", f"Most changed: {', '.join(told)}."]
    less = [name for name in both if gain[name] < -0.01]
    lines += [f"Less is removed than before in {len(less)}: {', '.join(less)}."] if less else []
    errors = [f"{name} ({m['error']})" for name, m in after["models"].items() if m.get("error")]
    lines += [f"Nothing is removed now: {'; '.join(errors)}."] if errors else []
    dates = f"({before['date'][:10]} with 0.1.0, {after['date'][:10]}; torch {after['versions']['torch']})"
    return "\n".join([*lines, "", dates])


def main() -> None:
    """See the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["run", "table"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no more models after that")
    parser.add_argument("--into", type=Path, help="the document whose table is replaced")
    options = parser.parse_args()
    if options.task == "run":
        import timm  # noqa: F401  once, before the forks

        run(options.json, options.only, options.minutes)
        return
    text = table(*(json.loads(path.read_text()) for path in options.files))
    if options.into is None:
        print(text)
        return
    old = options.into.read_text()
    before, rest = old.split(_BEGIN, 1)
    options.into.write_text(f"{before}{_BEGIN}\n{text}\n{_END}{rest.split(_END, 1)[1]}")


if __name__ == "__main__":
    main()
