"""What a stage costs on a GPU beside the plain way, and that it computes the same.

    python -m benchmarks.gpu --minutes 8 --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --lowerings                every rewrite of the target's table off, one by one, and `fuse_cudnn` on
    python -m benchmarks.gpu --tiny                     the same in small, on whatever device there is

First what must hold (`gpu_checks`), TF32 off: losses and gradients beside a float64 run on the CPU, in float32 and with the rewrites
for bfloat16; the losses of 50 steps recorded as a CUDA graph beside those of steps that run as they are; the bits of augmented batches
made on the device. Then the trainer's own steps a second, recorded and not, and the paper's recipe for CIFAR-10 (`gpu_trainer`). Then
milliseconds a training step (forward, backward, Adam; medians, the ways in turns), peak memory and images a second: `hooks` (both networks
whole, forward hooks), `ours`, and `recorded`: ours as the trainer records it. Curricula weigh their stages 3 : 4 : 5 : …. The floor of a
pair's last stage is counted (`gpu_floor`). Last the same by torch.compile, the most important stages first, as many as there is time for.

Every row is written as soon as it is measured; what the minutes leave out is named. `python -m benchmarks.gpu_table` then puts the results
into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import accelerate
import torch
import torchvision

import indistill_fx as ifx
from benchmarks.gpu_checks import correctness, data_on_and_off, graphs_on_and_off, reduced
from benchmarks.gpu_floor import ceilings, floor, sync
from benchmarks.gpu_table import curricula, goals
from benchmarks.gpu_trainer import recipe, trainer
from benchmarks.gpu_ways import COMPILED, PAIRS, Models, Row, Ways

_IN_A_ROW = 3
"""Steps on a GPU between two looks at the clock, as in training, where nothing waits for a step."""


class TimeIsUpError(BaseException):
    """The minutes are over. No `Exception`, so that nobody takes it for a failure of what it interrupts."""


def timed(steps: dict[str, Callable[[], Any]], device: str, count: int) -> dict[str, float]:
    """Median milliseconds of each, in turns; three rounds are not counted."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    many = _IN_A_ROW if device.startswith("cuda") else 1
    for k in range(count + 3):
        for key, step in steps.items():
            sync(device)
            start = time.perf_counter()
            for _ in range(many):
                step()
            sync(device)
            if k >= 3:
                times[key].append(1e3 * (time.perf_counter() - start) / many)
    return {key: statistics.median(values) for key, values in times.items()}


def measure(row: Row, ways: Ways, device: str, count: int) -> Row:
    """Milliseconds, peak memory and seconds to the second step of each way."""
    steps: dict[str, Callable[[], Any]] = {}
    cuda = device.startswith("cuda")
    torch._dynamo.reset()  # once: it would let go of what the ways before have compiled
    for key, make in ways.items():
        try:
            before = 0
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_reserved()
            start = time.perf_counter()
            steps[key] = make()
            for _ in range(2):
                steps[key]()
            sync(device)
            row[f"{key} seconds to the second step"] = time.perf_counter() - start
            if cuda:
                row[f"{key} peak MiB"] = (torch.cuda.max_memory_reserved() - before) / 2**20
        except Exception as error:  # one way's failure must not cost the others
            steps.pop(key, None)
            row[f"{key} failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    try:
        row["ms"] = timed(steps, device, count)
    except torch.OutOfMemoryError:  # all together do not fit: then one after the other
        row["not interleaved"], row["ms"] = True, {}
        while steps:
            key, step = steps.popitem()
            row["ms"] |= timed({key: step}, device, count)
            del step
    row["speedup"] = {key: row["ms"]["hooks"] / ms for key, ms in row["ms"].items()} if "hooks" in row["ms"] else {}
    row["images a second"] = {key: 1e3 * row["batch"] / ms for key, ms in row["ms"].items()}
    return row


def with_floor(row: Row, models: Models, number: int, limits: Row | None) -> Row:
    """The row, with the floor of its stage."""
    if limits is not None and row["ms"]:
        try:
            row |= floor(models.ours(number), models.batch, models.dtype, limits)
        except Exception as error:  # the row itself is measured
            return row | {"floor failed": f"{type(error).__name__}: {str(error)[:300]}"}
        ours = [ms for key, ms in row["ms"].items() if key in ("ours", "recorded")]
        row["ours over the floor"] = min(ours) / row["floor ms"] if ours else None
    return row


def about(device: str) -> Row:
    """Where and with what."""
    driver, cuda = "", device.startswith("cuda")
    if cuda:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            driver = "not known"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "indistill_fx": ifx.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "accelerate": accelerate.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": driver,
        "command": f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}".strip(),
    }


class Session:
    """What is measured, in the order in which it is asked for, as long as there is time.

    Args:
        options: of the command line.
        device: where.

    Attributes:
        found: all of it so far; it is written after every entry.
    """

    def __init__(self, options: argparse.Namespace, device: str):
        self.options, self.device = options, device
        self.found: Row = {"about": about(device), "rows": [], "compiled": [], "left out": []}
        self._ends, self._longest = time.monotonic() + 60 * options.minutes, 0.0

    def measured(self, key: str, measure_it: Callable[[], Any]) -> Any:
        """What that gives; None, with the reason under `left out`, if it fails or there is no time. One failure costs no others."""
        began, value = time.monotonic(), None
        if began + self._longest > self._ends:
            self.found["left out"].append(f"{key}: no time left")
            return None
        try:
            value = measure_it()
            if isinstance(value, (dict, list)):
                print(key, json.dumps(value), flush=True)
        except TimeIsUpError:
            self.found["left out"].append(f"{key}: no time left to end it")
        except Exception as error:
            self.found["left out"].append(f"{key}: {type(error).__name__}: {str(error)[:300]}")
            print(self.found["left out"][-1], flush=True)
        self._longest = max(self._longest, time.monotonic() - began)
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return value

    def keep(self, key: str, value: Any) -> Any:
        """Write it under its name, or as one more row."""
        rows = self.found.get(key)
        if value is not None and isinstance(rows, list):
            rows.append(value)
        elif value is not None:
            self.found[key] = value
        if self.options.json:
            Path(self.options.json).write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        return value

    def check(self) -> None:
        """What must hold."""
        device, tiny = self.device, self.options.tiny
        self.keep("correctness", self.measured("correctness", lambda: correctness(device, tiny)))
        self.keep("reduced precision", self.measured("reduced precision", lambda: reduced(device, tiny)))
        steps = 6 if tiny else 50
        self.keep("graphs on and off", self.measured("graphs on and off", lambda: graphs_on_and_off(device, steps)))
        self.keep("data on the device and off", self.measured("data", lambda: data_on_and_off(device, tiny)))

    def train(self) -> None:
        """The trainer's own pace."""
        device, tiny = self.device, self.options.tiny
        found = self.keep("trainer", self.measured("trainer", lambda: trainer(device, tiny)))
        if found is not None:
            seconds = found["recorded"]["70 epochs, reckoned seconds"]
            self.keep("recipe", self.measured("recipe", lambda: recipe(device, tiny, seconds)))

    def stages(self) -> None:
        """All ways but those by torch.compile; or with --lowerings the rewrites."""
        tiny, rewrites = self.options.tiny, self.options.lowerings
        limits = self.measured("ceilings", lambda: ceilings(self.device, torch.bfloat16, tiny))
        self.keep("ceilings", limits)
        for name in self.options.pairs:
            models = self.models(name)
            numbers = PAIRS[name].stages[: 1 if tiny else None]
            for number in numbers if models is not None else ():
                ways = models.lowered if rewrites else models.ways
                counted = number == numbers[-1] and PAIRS[name].dtype == torch.bfloat16 and not rewrites
                self.stage("rows", models, number, ways, limits if counted else None)
        if not rewrites:
            self.keep("curricula", curricula(self.found["rows"]))

    def compiled(self) -> None:
        """The ways by torch.compile."""
        models: Models | None = None
        for name, number in COMPILED:
            if name not in self.options.pairs or (self.options.tiny and number != PAIRS[name].stages[0]):
                continue
            if models is None or models.name != name:
                models = self.models(name)
            if models is not None:
                self.stage("compiled", models, number, models.compiled, None)
                self.keep("compiled curricula", curricula(self.found["compiled"]))

    def models(self, name: str) -> Any:
        """A pair's."""
        return self.measured(f"{name}, models", lambda: Models(name, self.device, tiny=self.options.tiny))

    def stage(self, key: str, models: Models, number: int, ways: Callable[[int], Ways], limits: Row | None) -> None:
        """One row."""

        def row() -> Row:
            found = measure(models.row(number), ways(number), self.device, self.options.steps)
            return with_floor(found, models, number, limits)

        self.keep(key, self.measured(f"{models.name}, stage {number}, {key}", row))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="then it ends")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=20, help="timed rounds of each way")
    parser.add_argument("--lowerings", action="store_true", help="the rewrites instead of the ways")
    parser.add_argument("--tiny", action="store_true", help="small images and batches, one stage a pair")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    session = Session(options, "cuda" if torch.cuda.is_available() else "cpu")
    with time_is_up_after(60 * options.minutes):
        try:
            session.check()
            if "paper" in options.pairs and not options.lowerings:
                session.train()
            session.stages()
            if not options.lowerings:
                session.compiled()
        except TimeIsUpError:
            session.found["left out"].append("what comes after: no time left")
    session.keep("goals", goals(session.found))
    for work, (value, goal) in session.found["goals"].items():
        print(f"{work}: {value} (goal {goal})")


@contextmanager
def time_is_up_after(seconds: float) -> Iterator[None]:
    """Within the block `TimeIsUpError` interrupts whatever is under way after so many seconds."""

    def interrupts(number: int, frame: object) -> None:
        raise TimeIsUpError

    before = signal.signal(signal.SIGALRM, interrupts)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    main()
