"""What still needs a GPU, in one sitting: checks, then timings, then trainings side by side until the minutes are over.

    python benchmarks/gpu_session.py --minutes 60 --out OUT --cifar10 imagefolder:DIR --cifar100 imagefolder:DIR
    python benchmarks/gpu_session.py --parts cifar100 --epochs 60 …          one part; a shorter protocol

`checks` are tests/gpu, `timings` benchmarks/gpu.py, `compress` the rows that docs/compress.md lacks, `cifar100` the usual comparison. The
first two have the GPU to themselves; of the trainings so many run at once, most telling first. Small networks leave most of a GPU idle, so
several at once take little longer than one, above all with NVIDIA's MPS. Whatever is under way at the end is stopped and goes on next time.
Logs are in OUT; the tables are made by `compress.py table` and `cifar100.py table` of OUT/compress and OUT/cifar100.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PARTS = ("checks", "timings", "compress", "cifar100")
_GRACE = 20.0
"""Seconds that a job has to save what it did."""


@dataclass(frozen=True)
class Job:
    """A command.

    Attributes:
        name: also of its log.
        command: after `python`.
        after: the job that must have ended before; empty: none.
    """

    name: str
    command: tuple[str, ...]
    after: str = ""


def compress_jobs(options: argparse.Namespace) -> Iterable[Job]:
    """The published resnet56, resnet20 and the paper's assistant, seed by seed."""
    out = str(Path(options.out) / "compress")
    data = ("--data", options.cifar10, "--reference", options.reference, "--out", out, *_cache(options))
    everything, few = ("joint", "kd", "tp", "freshkd", "fresh"), ("fed", "steps", "tp")
    for seed in map(str, options.seeds):

        def job(name: str, *more: str, after: str = "", seed: str = seed) -> Job:
            return Job(f"{name}-{seed}", ("benchmarks/compress.py", "run", *data, "--seeds", seed, *more), after)

        for macs in ("0.476", "0.4"):
            arms = ("--macs", macs, "--epochs", "20", "--arms", *everything[:3])
            yield job(f"resnet56-{macs}", "--net", "resnet56", *arms)
        yield job("resnet20", "--net", "resnet20", "--macs", "0.5", "--epochs", "15", "--arms", *everything)
        first = "" if seed == str(options.seeds[0]) else f"assistant-{options.seeds[0]}"  # which trains the teacher
        arms = ("--macs", "0.35", "--epochs", "15", "--arms", *everything)
        yield job("assistant", "--net", "assistant", *arms, after=first)
        arms = ("--macs", "0.5", "--limit", "5000", "--epochs", "15", "--arms", *few)
        yield job("resnet20-5000", "--net", "resnet20", *arms)


def cifar100_jobs(options: argparse.Namespace) -> Iterable[Job]:
    """Of one teacher a student of its own kind and one of another, seed by seed."""
    out = str(Path(options.out) / "cifar100")
    length = ("--protocol", "short", "--epochs", str(options.epochs)) if options.epochs else ("--protocol", "usual")
    command = ("benchmarks/cifar100.py", "run", "--data", options.cifar100, "--out", out, *length, *_cache(options))
    own, other = "resnet32x4:resnet8x4", "resnet32x4:shufflenetv2"
    first = Job("teacher", (*command, "--pairs", own, "--arms", "labels", "--seeds", str(options.seeds[0])))
    yield first
    for seed in map(str, options.seeds):
        for pair in (own, other):
            yield Job(f"{pair.replace(':', '-')}-{seed}", (*command, "--pairs", pair, "--seeds", seed), first.name)


def _cache(options: argparse.Namespace) -> tuple[str, ...]:
    return ("--cache", options.cache) if options.cache else ()


def run_all(jobs: Iterable[Job], out: Path, ends: float, at_once: int) -> None:
    """Start jobs in order, as many at once as that, until all have ended or the time is over."""
    waiting, running, ended = list(jobs), dict[str, subprocess.Popen[bytes]](), set[str]()
    while (waiting or running) and time.monotonic() < ends:
        for name in [name for name, process in running.items() if process.poll() is not None]:
            print(
                f"{name}: ended with {running.pop(name).returncode}, {ends - time.monotonic():.0f} s left", flush=True
            )
            ended.add(name)
        ready = [job for job in waiting if not job.after or job.after in ended]
        for job in ready[: at_once - len(running)]:
            waiting.remove(job)
            with (out / f"{job.name}.log").open("ab") as log:
                running[job.name] = subprocess.Popen([sys.executable, *job.command], stdout=log, stderr=log)
        time.sleep(0.5)
    for process in running.values():
        process.send_signal(signal.SIGTERM)
    until = time.monotonic() + _GRACE
    for name, process in running.items():
        try:
            process.wait(max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
        print(f"{name}: stopped", flush=True)
    for job in waiting:
        print(f"{job.name}: not begun", flush=True)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=60.0, help="for everything")
    parser.add_argument("--timing-minutes", type=float, default=2.0, help="of these, for the timings")
    parser.add_argument("--at-once", type=int, default=8, help="trainings that run side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of the comparison on CIFAR-100, instead of the usual 240")
    parser.add_argument("--cifar10", default="cifar10", metavar="DATA")
    parser.add_argument("--cifar100", default="cifar100", metavar="DATA")
    parser.add_argument("--reference", default="../shared/reference", help="the folder of published weights")
    parser.add_argument("--cache", help="keep decoded images here")
    options = parser.parse_args()
    out, ends = Path(options.out), time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    timed = ("-m", "benchmarks.gpu", "--minutes", f"{options.timing_minutes:g}", "--json", str(out / "gpu.json"))
    alone = {"checks": Job("checks", ("-m", "pytest", "-q", "tests/gpu")), "timings": Job("timings", timed)}
    for part in (part for part in alone if part in options.parts):
        run_all([alone[part]], out, ends, 1)
    together = [
        *(compress_jobs(options) if "compress" in options.parts else ()),
        *(cifar100_jobs(options) if "cifar100" in options.parts else ()),
    ]
    run_all(sorted(together, key=lambda job: job.name != "teacher"), out, ends, options.at_once)


if __name__ == "__main__":
    main()
