"""What a stage costs on a GPU beside the plain way, and that it computes the same.

    python -m benchmarks.gpu --minutes 6 --json benchmarks/results/gpu.json
    python -m benchmarks.gpu --tiny                     the same in small, on whatever device there is

First correctness, TF32 off: losses and gradients beside a float64 run on the CPU, and the losses of 50 steps of the recorded step (see
below) beside the eager one. Then milliseconds a training step (forward,
backward, Adam; medians, the ways in turns), peak memory and images a second: `hooks` (both networks whole, forward hooks), `ours`,
each also by torch.compile, and `recorded`: our stage's whole step captured in a CUDA graph by this benchmark and replayed (the trainer
does not do that yet). Last the trainer's own steps a second. Every row is written as soon as it is measured; what the budget of
minutes leaves out is named.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.warmup_ways import HookBaseline, vision
from benchmarks.warmup_ways import _vit as vit
from examples.paper_cifar10 import Cnn32
from indistill_fx.target import Target

Row = dict[str, Any]


def paper() -> tuple[nn.Module, nn.Module]:
    """The paper's pair."""
    return Cnn32(), Cnn32((8, 16, 32), 64)


# name → (models, image, batch, dtype, stages from 1; the most important rows first)
PAIRS: dict[
    str, tuple[Callable[[], tuple[nn.Module, nn.Module]], tuple[int, ...], int, torch.dtype, tuple[int, ...]]
] = {
    "paper": (paper, (3, 32, 32), 128, torch.float32, (1, 2, 3)),
    "resnet50-resnet18": (vision("resnet50", "resnet18"), (3, 224, 224), 128, torch.bfloat16, (1, 2, 3, 4)),
    "vit_b-vit_ti": (vit, (3, 224, 224), 128, torch.bfloat16, (1, 6, 12)),
    "resnet50-mobilenet_v3_large": (
        vision("resnet50", "mobilenet_v3_large"),
        (3, 224, 224),
        128,
        torch.bfloat16,
        (1, 3),
    ),
    "resnet152-resnet50": (vision("resnet152", "resnet50"), (3, 224, 224), 64, torch.bfloat16, (1, 4)),
}


def sync(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def adam(module: nn.Module, *, capturable: bool = False) -> torch.optim.Optimizer:
    """The paper's optimiser, over what can be trained."""
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3, capturable=capturable)


def correctness(device: str, tiny: bool) -> list[Row]:
    """Loss and gradients of every stage of the paper's pair beside float64 on the CPU."""
    rows = []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    teacher, student = paper()
    x = torch.randn(8 if tiny else 64, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    for number in range(len(plan.pairs)):
        found = []
        for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
            own = copy.deepcopy(student).to(where, dtype).train()
            stages = ifx.compile_stages(
                copy.deepcopy(teacher).to(where, dtype), own, plan, main=None, example_inputs=x[:2].to(where, dtype),
                target=Target(where, dtype),
            )  # fmt: skip
            loss = stages[number].train()(x.to(where, dtype))
            loss.backward()
            found.append((loss.item(), [p.grad.double().cpu() for p in own.parameters() if p.grad is not None]))
        (exact, grads), (got, others) = found
        whole, other = (torch.cat([grad.flatten() for grad in one]) for one in (grads, others))
        difference = float((whole - other).norm() / whole.norm())
        rows.append(
            {"stage": plan.pairs[number].student, "loss": abs(got - exact) / abs(exact), "gradients": difference}
        )
    torch.backends.cudnn.allow_tf32 = True  # torch's own defaults again
    return rows


def recording(device: str, steps: int = 50) -> Row:
    """Losses of so many steps on new data, eager and recorded, from the same weights; the largest relative difference of each stage.

    Where there is no CUDA a second eager run takes the recorded one's place, so that the comparison itself is tried.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    teacher, student = paper()
    batches = [torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(steps)]
    plan = ifx.align(teacher, student, example_inputs=batches[0][:2])
    found = {}
    for number, pair in enumerate(plan.pairs):
        losses: list[list[float]] = []
        for record in (False, True):
            own, x = copy.deepcopy(student).to(device).train(), batches[0].to(device, copy=True)
            stages = ifx.compile_stages(
                copy.deepcopy(teacher).to(device), own, plan, main=None, example_inputs=x[:2], target=Target(device)
            )
            seen = torch.zeros((), device=device)
            make = recorded if record and device.startswith("cuda") else stepper
            step = make(stages[number].train(), x, torch.float32, seen)
            losses.append([])
            for batch in batches:
                x.copy_(batch)
                step()
                losses[-1].append(seen.item())
        found[pair.student] = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    torch.backends.cudnn.allow_tf32 = True  # torch's own defaults again
    return found


def stepper(loss_of: nn.Module, x: Tensor, dtype: torch.dtype, seen: Tensor | None = None) -> Callable[[], None]:
    """One eager training step, which leaves the loss in `seen`."""
    optimizer = adam(loss_of)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(x)
        loss.backward()
        optimizer.step()
        if seen is not None:
            seen.copy_(loss.detach())

    return step


def recorded(stage: ifx.Stage, x: Tensor, dtype: torch.dtype, seen: Tensor | None = None) -> Callable[[], None]:
    """The same step, captured once and replayed. What the steps before the capture trained is undone."""
    optimizer = adam(stage, capturable=True)
    before = {name: tensor.to("cpu", copy=True) for name, tensor in stage.student.state_dict().items()}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
            loss = stage(x)
        loss.backward()
        optimizer.step()
        if seen is not None:
            seen.copy_(loss.detach())

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    stage.student.load_state_dict(before)  # in place: the graph knows the tensors by their addresses
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    return graph.replay


def timed(steps: dict[str, Callable[[], None]], device: str, count: int) -> dict[str, float]:
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


def measure(name: str, number: int, device: str, tiny: bool, count: int) -> Row:
    """All ways of training one stage of one pair."""
    build, size, batch, dtype, _ = PAIRS[name]
    dtype = dtype if device.startswith("cuda") else torch.float32
    if tiny:
        size, batch = (3, 32, 32) if name == "paper" else (3, 64, 64), 2
    torch.manual_seed(0)
    teacher, student = (model.to(device) for model in build())
    x = torch.randn(batch, *size, device=device)
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    if dtype != torch.float32 and "vit" not in name:  # as their users train them
        teacher, student, x = (value.to(memory_format=torch.channels_last) for value in (teacher, student, x))
    pair = plan.pairs[number - 1]

    def ours(*, compiled: bool) -> ifx.Stage:
        target = Target(device, dtype, compiled)
        mine = copy.deepcopy(student).train()
        stages = ifx.compile_stages(teacher, mine, plan, main=None, example_inputs=x[:2], target=target)
        return stages[number - 1].train()

    def hooks() -> nn.Module:
        return HookBaseline(copy.deepcopy(teacher), copy.deepcopy(student).train(), pair)

    makers: dict[str, Callable[[], Callable[[], None]]] = {
        "hooks": lambda: stepper(hooks(), x, dtype),
        "ours": lambda: stepper(ours(compiled=False), x, dtype),
        "hooks compiled": lambda: stepper(torch.compile(hooks()), x, dtype),
        "ours compiled": lambda: stepper(torch.compile(ours(compiled=True), fullgraph=True), x, dtype),
    }
    if device.startswith("cuda"):
        makers["recorded"] = lambda: recorded(ours(compiled=False), x, dtype)
    row: Row = {
        "pair": name,
        "stage": pair.student,
        "number": number,
        "batch": batch,
        "dtype": str(dtype).partition(".")[2],
    }
    steps: dict[str, Callable[[], None]] = {}
    for key, make in makers.items():
        torch._dynamo.reset()
        try:
            if device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            steps[key] = make()
            for _ in range(2):
                steps[key]()
            sync(device)
            row[f"{key} seconds to the second step"] = time.perf_counter() - start
            if device.startswith("cuda"):
                row[f"{key} peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        except Exception as error:  # one way's failure must not cost the others
            steps.pop(key, None)
            row[f"{key} failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    try:
        row["ms"] = timed(steps, device, count)
    except RuntimeError:  # all together may not fit: then one after the other
        row["not interleaved"], row["ms"] = True, {}
        for key, step in steps.items():
            row["ms"] |= timed({key: step}, device, count)
    row["images a second"] = {key: 1e3 * batch / ms for key, ms in row["ms"].items()}
    row["speedup"] = {key: row["ms"]["hooks"] / ms for key, ms in row["ms"].items()} if "hooks" in row["ms"] else {}
    return row


def trainer(device: str, tiny: bool) -> Row:
    """Steps a second of `distill` itself, on data in memory; the bare stage's from the table."""
    torch.manual_seed(0)
    teacher, student = paper()
    count = 256 if tiny else 12_800
    batches = [(torch.randn(128, 3, 32, 32), torch.randint(10, (128,))) for _ in range(count // 128)]
    record = ifx.distill(
        teacher, student, batches, epochs=1, curriculum=ifx.Curriculum(lengths=1), progress=False,
        device="auto" if device.startswith("cuda") else "cpu",
    )  # fmt: skip
    return {stage.name: stage.steps / stage.seconds for stage in record.stages}


def about(device: str) -> Row:
    """Where and with what."""
    driver = ""
    if device.startswith("cuda"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine(),
        "driver": driver,
        "command": " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="no row is begun after so many")
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each way")
    parser.add_argument("--tiny", action="store_true", help="small images and batches, one stage a pair")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.monotonic()
    found: Row = {"about": about(device), "rows": [], "left out": []}

    def keep() -> None:
        if options.json:
            Path(options.json).write_text(json.dumps(found, indent=1) + "\n")

    def measured(key: str, measure_it: Callable[[], Any]) -> None:
        """One entry of the file, or why there is none: one failure must not cost the others."""
        try:
            found[key] = measure_it()
            print(key, json.dumps(found[key]), flush=True)
        except Exception as error:
            found["left out"].append(f"{key}: {type(error).__name__}: {str(error)[:200]}")
            print(found["left out"][-1], flush=True)
        keep()

    measured("correctness", lambda: correctness(device, options.tiny))
    measured("recorded beside eager, losses", lambda: recording(device, 3 if options.tiny else 50))
    work = [(name, number) for name in options.pairs for number in PAIRS[name][4][: 1 if options.tiny else None]]
    last_of_paper = next((entry for entry in reversed(work) if entry[0] == "paper"), None)
    for name, number in work:
        if time.monotonic() - start > 60 * options.minutes:
            found["left out"].append(f"{name}, stage {number}: no time left")
            continue
        try:
            found["rows"].append(measure(name, number, device, options.tiny, options.steps))
            print(json.dumps(found["rows"][-1]), flush=True)
        except Exception as error:  # one row's failure must not cost the others
            found["left out"].append(f"{name}, stage {number}: {type(error).__name__}: {str(error)[:200]}")
            print(found["left out"][-1], flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
        keep()
        if (name, number) == last_of_paper:
            measured("trainer, steps a second", lambda: trainer(device, options.tiny))
    keep()


if __name__ == "__main__":
    main()
