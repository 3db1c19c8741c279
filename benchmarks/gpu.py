"""What a stage costs on a GPU beside the plain way, and that it computes the same.

    python -m benchmarks.gpu --minutes 8 --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --lowerings                every rewrite of the target's table off, one by one, and `fuse_cudnn` on
    python -m benchmarks.gpu --tiny                     the same in small, on whatever device there is

First what must hold, TF32 off: losses and gradients beside a float64 run on the CPU; the losses of 50 steps recorded as a CUDA graph beside
those of steps that run as they are; the bits of augmented batches made on the device. Then milliseconds a training step (forward, backward,
Adam; medians, the ways in turns), peak memory and images a second: `hooks` (both networks whole, forward hooks) and `ours`, each also by
torch.compile, and `recorded`: ours as the trainer records it. Curricula weigh their stages 3 : 4 : 5 : …. The floor of a pair's last
measured stage is counted (see `gpu_floor`). And the trainer's own steps a second, recorded and not, with the paper's recipe on pictures of
CIFAR-10's size, reckoned for its 70 epochs from a few. Every row is written as soon as it is measured; what the minutes leave out is named.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import indistill_fx as ifx
from benchmarks.gpu_floor import ceilings, floor, sync
from benchmarks.gpu_ways import PAIRS, Row, correctness, data_on_and_off, eager, graphs_on_and_off, paper, recorded
from benchmarks.warmup_ways import HookBaseline
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.target import Target
from indistill_fx.training.recipes import RECIPES


def timed(steps: dict[str, Callable[[], Any]], device: str, count: int) -> dict[str, float]:
    """Median milliseconds of each, in turns; three rounds are not counted."""
    times: dict[str, list[float]] = {key: [] for key in steps}
    for k in range(count + 3):
        for key, step in steps.items():
            sync(device)
            start = time.perf_counter()
            step()
            sync(device)
            if k >= 3:
                times[key].append(1e3 * (time.perf_counter() - start))
    return {key: statistics.median(values) for key, values in times.items()}


class Measured:
    """One stage of one pair, and all ways of training it.

    Args:
        name: of the pair.
        number: of the stage, from 1.
        device: where.
        tiny: small pictures and batches.
    """

    def __init__(self, name: str, number: int, device: str, tiny: bool):
        build, size, batch, dtype, _ = PAIRS[name]
        self.device, self.number = device, number
        self.dtype = dtype if device.startswith("cuda") else torch.float32
        if tiny:
            size, batch = size if name in ("paper", "vit_b-vit_ti") else (3, 64, 64), 2
        torch.manual_seed(0)
        self.teacher, self.student = (model.to(device) for model in build())
        self.x = torch.randn(batch, *size, device=device)
        self.plan = ifx.align(self.teacher, self.student, example_inputs=self.x[:2])
        self.pair = self.plan.pairs[number - 1]
        self.row: Row = {"pair": name, "stage": self.pair.student, "number": number, "batch": batch}
        self.row["dtype"] = str(self.dtype).partition(".")[2]
        self.last = self.dtype != torch.float32 and "vit" not in name  # as their users train them

    def ours(self, *, compiled: bool = False, lowerings: Lowerings | None = None) -> ifx.Stage:
        """Our stage; its student's weights lie as the trainer would lay them."""
        mine = copy.deepcopy(self.student).train()
        mine = mine.to(memory_format=torch.channels_last) if self.last else mine
        stages = ifx.compile_stages(
            self.teacher, mine, self.plan, main=None, example_inputs=self.x[:2],
            target=Target(self.device, self.dtype, compiled), lowerings=lowerings,
        )  # fmt: skip
        return stages[self.number - 1].train()

    def hooks(self) -> nn.Module:
        """The plain way."""
        models = copy.deepcopy(self.teacher), copy.deepcopy(self.student).train()
        if self.last:
            models = tuple(model.to(memory_format=torch.channels_last) for model in models)  # type: ignore[assignment]
        return HookBaseline(*models, self.pair)

    def ways(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """What makes a step of each way."""
        x = self.x.to(memory_format=torch.channels_last) if self.last else self.x
        return {
            "hooks": lambda: eager(self.hooks(), x, self.dtype),
            "ours": lambda: eager(self.ours(), x, self.dtype),
            "recorded": lambda: recorded(self.ours(), x, self.dtype),
            "hooks compiled": lambda: eager(torch.compile(self.hooks()), x, self.dtype),
            "ours compiled": lambda: eager(torch.compile(self.ours(compiled=True), fullgraph=True), x, self.dtype),
            "recorded compiled": lambda: recorded(
                torch.compile(self.ours(compiled=True), fullgraph=True), x, self.dtype
            ),
        }

    def lowered(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """A step with each rewrite off, all off, and those on that stand in no table."""
        own = LOWERINGS[Target(self.device, self.dtype).kind]
        fused = replace(own, teacher=("fuse_cudnn", *own.teacher))
        tried = {f"without {name}": own.without(name) for name in dict.fromkeys((*own.teacher, *own.student))}
        tried |= {"without any": Lowerings(), "with fuse_cudnn": fused, "as it is": own}
        return {
            key: lambda lowerings=lowerings: eager(self.ours(lowerings=lowerings), self.x, self.dtype)
            for key, lowerings in tried.items()
        }

    def measure(self, makers: dict[str, Callable[[], Callable[[], Any]]], count: int) -> Row:
        """Milliseconds, peak memory and seconds to the second step of each way."""
        steps: dict[str, Callable[[], Any]] = {}
        cuda, row = self.device.startswith("cuda"), self.row
        torch._dynamo.reset()  # once: it would let go of what the ways before have compiled
        for key, make in makers.items():
            try:
                before = 0
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                start = time.perf_counter()
                steps[key] = make()
                for _ in range(2):
                    steps[key]()
                sync(self.device)
                row[f"{key} seconds to the second step"] = time.perf_counter() - start
                if cuda:
                    row[f"{key} peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            except Exception as error:  # one way's failure must not cost the others
                steps.pop(key, None)
                row[f"{key} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        try:
            row["ms"] = timed(steps, self.device, count)
        except RuntimeError:  # all together may not fit: then one after the other
            row["not interleaved"], row["ms"] = True, {}
            for key, step in steps.items():
                row["ms"] |= timed({key: step}, self.device, count)
        row["images a second"] = {key: 1e3 * row["batch"] / ms for key, ms in row["ms"].items()}
        return row


def stage_row(name: str, number: int, device: str, tiny: bool, count: int, limits: Row | None) -> Row:
    """All ways of training one stage of one pair; with `limits`, its floor too."""
    stage = Measured(name, number, device, tiny)
    row = stage.measure(stage.ways(), count)
    row["speedup"] = {key: row["ms"]["hooks"] / ms for key, ms in row["ms"].items()} if "hooks" in row["ms"] else {}
    if limits is not None:
        row |= floor(stage.ours(), stage.x, stage.dtype, limits)
        row["ours over the floor"] = min(row["ms"].values()) / row["floor ms"] if row["ms"] else None
    return row


def curricula(rows: list[Row]) -> Row:
    """The speedup of every way over the measured stages of a pair, weighed 3 : 4 : 5 : … by their numbers."""
    found: Row = {}
    for name in dict.fromkeys(row["pair"] for row in rows):
        own = [row for row in rows if row["pair"] == name]
        ways = [way for way in own[0]["ms"] if all(way in row["ms"] for row in own)]
        total = {way: sum((2 + row["number"]) * row["ms"][way] for row in own) for way in ways}
        found[name] = {way: total["hooks"] / ms for way, ms in total.items()} if "hooks" in total else {}
    return found


def trainer(device: str, tiny: bool) -> Row:
    """Steps a second of `distill` itself by stage, on data in memory, recorded and not; and the paper's recipe, reckoned."""
    torch.manual_seed(0)
    count = 512 if tiny else 50_000
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    loader = MemoryLoader(
        images, torch.randint(10, (count,)), mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, augment=FlipAndCrop()
    )
    found: Row = {}
    for graphs in ("auto", False):
        teacher, student = paper()
        options = {**RECIPES["paper"].student, "schedule": "constant", "milestones": []}
        options |= {"curriculum": ifx.Curriculum(lengths=1), "epochs": 1 if tiny else 2}
        record = ifx.distill(teacher, student, loader, progress=False, device=device, graphs=graphs, **options)
        rates = {stage.name: stage.steps / stage.seconds for stage in record.stages}
        epochs = {stage.name: stage.seconds / stage.epochs for stage in record.stages}
        *warm, main = epochs.values()
        seconds = sum((3 + k) * one for k, one in enumerate(warm)) + 58 * main
        found["recorded" if graphs == "auto" else "as they are"] = {
            "steps a second": rates,
            "the paper's recipe, 70 epochs, reckoned seconds": seconds,
            "notes": {stage.name: list(stage.notes) for stage in record.stages},
        }
    return found


def about(device: str) -> Row:
    """Where and with what."""
    driver = ""
    if device.startswith("cuda"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.startswith("cuda") else None,
        "device": name,
        "driver": driver,
        "command": " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun that could end after so many")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--lowerings", action="store_true", help="the rewrites instead of the ways")
    parser.add_argument("--tiny", action="store_true", help="small images and batches, one stage a pair")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start, longest = time.monotonic(), 0.0
    found: Row = {"about": about(device), "rows": [], "left out": []}

    def measured(key: str, measure_it: Callable[[], Any]) -> Any:
        """One entry of the file, or why there is none: one failure must not cost the others."""
        nonlocal longest
        began, value = time.monotonic(), None
        if began - start + longest > 60 * options.minutes:
            found["left out"].append(f"{key}: no time left")
            return None
        try:
            value = measure_it()
            print(key, json.dumps(value), flush=True)
        except Exception as error:
            found["left out"].append(f"{key}: {type(error).__name__}: {str(error)[:200]}")
            print(found["left out"][-1], flush=True)
        longest = max(longest, time.monotonic() - began)
        if device == "cuda":
            torch.cuda.empty_cache()
        return value

    def keep(key: str, value: Any) -> None:
        if value is not None and key == "rows":
            found["rows"].append(value)
        elif value is not None:
            found[key] = value
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")

    keep("correctness", measured("correctness", lambda: correctness(device, options.tiny)))
    steps = 6 if options.tiny else 50
    keep("graphs on and off", measured("graphs on and off", lambda: graphs_on_and_off(device, steps)))
    keep("data on the device and off", measured("data", lambda: data_on_and_off(device, options.tiny)))
    if "paper" in options.pairs and not options.lowerings:
        keep("trainer", measured("trainer", lambda: trainer(device, options.tiny)))
    limits = measured("ceilings", lambda: ceilings(device, torch.bfloat16, options.tiny))
    keep("ceilings", limits)
    for name in options.pairs:
        numbers = PAIRS[name][4][: 1 if options.tiny else None]
        for number in numbers:
            key, counted = f"{name}, stage {number}", limits if number == numbers[-1] and name != "paper" else None
            if options.lowerings:
                stage_of = lambda name=name, number=number: Measured(name, number, device, options.tiny)  # noqa: E731
                keep("rows", measured(key, lambda of=stage_of: (one := of()).measure(one.lowered(), options.steps)))
                continue
            arguments = (name, number, device, options.tiny, options.steps, counted)
            keep("rows", measured(key, lambda arguments=arguments: stage_row(*arguments)))
    keep("curricula", curricula(found["rows"]) if not options.lowerings else None)


if __name__ == "__main__":
    main()
