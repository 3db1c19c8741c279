"""What the warm-up costs beside the plain way, and that it trains the same.

    python -m benchmarks.warmup                         all pairs, a table
    python -m benchmarks.warmup --pairs paper --json warmup.json --compile
    python -m benchmarks.warmup --lowerings             every rewrite of the target's table off, one by one; and compiled with and without
    python -m benchmarks.warmup --before FOLDER         beside an earlier commit, checked out there
    python -m benchmarks.warmup --setup                 seconds to set all stages up, and how they grow with the graph

The plain way (the hook baseline) is what hook frameworks do: both full networks run, forward hooks keep the features, the teacher's kept
channels are selected, the mean squared error is taken. Steps of both are interleaved in one run, so that a noisy machine hits both alike;
figures are medians, of the process's CPU time with one thread (which other processes disturb least), of the clock with more. With --check
50 steps are trained by both from the same weights and compared loss by loss, by Adam and SGD in float32 and by Adam in float64 (at 64
pixels where the pair takes them). `compiled hooks` is the hook baseline by torch.compile. `cached` is our stage with the
teacher's features given, `bf16` (with --bf16) that with the teacher in
bfloat16. The floor is the work that must be done, forward of the teacher's half and three times the student's, at the speed of one large
convolution on this machine. Compiling is timed without torch's cache of earlier compilations. All ways run with freed memory kept by the
process, as `train` and `distill` do on a CPU; --default-memory measures them as glibc would have it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.warmup_before import Before
from benchmarks.warmup_memory import peak_memory
from benchmarks.warmup_ways import PAIRS, Cached, HalfTeacher, HookBaseline, adam, each_left_out, sgd, step, vision
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.system.allocator import freed_memory_kept
from indistill_fx.target import Target


def speed() -> float:
    """Multiply-accumulates a second of one large convolution, channels last."""
    x = torch.randn(16, 128, 28, 28).to(memory_format=torch.channels_last)
    layer = nn.Conv2d(128, 128, 3, padding=1)
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    with torch.no_grad():
        for _ in range(8):
            start = clock()
            layer(x)
            best = min(best, clock() - start)
    return 16 * 128 * 128 * 9 * 28 * 28 / best


def same_training(
    teacher: nn.Module,
    student: nn.Module,
    plan: ifx.AlignmentPlan,
    number: int,
    batches: list[Tensor],
    optimiser: Callable[[nn.Module], torch.optim.Optimizer] = adam,
) -> dict[str, float]:
    """Largest relative differences of losses and of trained parameters over the batches."""
    ours, plain = copy.deepcopy(student).train(), copy.deepcopy(student).train()
    stage = ifx.compile_stages(teacher, ours, plan, main=None, example_inputs=batches[0]).pop(number).train()
    baseline = HookBaseline(copy.deepcopy(teacher), plain, plan.pairs[number])
    optimizers = optimiser(stage.student), optimiser(plain)
    worst = 0.0
    for x in batches:
        losses = []
        for module, optimizer in zip((stage, baseline), optimizers, strict=True):
            optimizer.zero_grad(set_to_none=True)
            loss = module(x)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        worst = max(worst, abs(losses[0] - losses[1]) / abs(losses[1]))
    parameters = max(
        float(((a - b).abs().max() / b.abs().max().clamp_min(1e-12)).detach())
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    return {"loss": worst, "parameters": parameters}


def measure_pair(
    name: str,
    *,
    steps: int,
    compiled: bool,
    bf16: bool,
    lowerings: bool,
    before: str | None,
    kept: bool,
    check: int,
    only: list[int] | None,
) -> dict[str, Any]:
    """All stages of one pair: milliseconds a step of the baseline, of ours, and of ours compiled."""
    build, size, batch = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build()
    x = torch.randn(batch, *size)
    start = time.perf_counter()
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    aligned = time.perf_counter()
    ifx.compile_stages(teacher, copy.deepcopy(student), plan, main=None, example_inputs=x[:2])
    row: dict[str, Any] = {
        "pair": name,
        "batch": batch,
        "align_seconds": aligned - start,
        "setup_seconds": time.perf_counter() - aligned,
        "gmacs_per_second": speed() / 1e9,
        "stages": [],
    }
    for number, pair in enumerate(plan.pairs):
        if only and number + 1 not in only:
            continue
        stage = own_stage(teacher, student, plan, number, x)
        work = batch * (stage.macs[0] + 3 * stage.macs[1])
        entry: dict[str, Any] = {"tap": pair.student, "teacher": pair.teacher, "number": number + 1, "macs": stage.macs}
        entry["floor_ms"] = work / row["gmacs_per_second"] / 1e6
        runners: dict[str, nn.Module] = {
            "hooks": HookBaseline(copy.deepcopy(teacher), copy.deepcopy(student).train(), pair),
            "ours": stage,
            "cached": Cached(stage, x),
        }
        if lowerings:
            for key, chosen in (each_left_out("cpu") | {"without any": Lowerings()}).items():
                runners[key] = own_stage(teacher, student, plan, number, x, lowerings=chosen)
        if bf16:
            runners["bf16"] = copy.copy(stage)
            runners["bf16"]._modules = dict(stage._modules) | {"teacher": HalfTeacher(stage.teacher)}
        if compiled:
            runners |= compiled_ways(teacher, student, plan, number, x, entry, lowerings=lowerings)
        threads = torch.get_num_threads()
        other = Before(before, name, number, threads, compiled=compiled, kept=kept) if before else None
        if other is not None:
            entry["loss_before"], entry["loss"] = other.loss, own_stage(teacher, student, plan, number, x)(x).item()
        entry |= timed(runners, x, steps, other)
        if other is not None:
            other.close()
        del runners, stage
        if check:
            entry |= compared(name, teacher, student, plan, number, check)
        row["stages"].append(entry)
    weigh(row)
    return row


def compiled_ways(
    teacher: nn.Module,
    student: nn.Module,
    plan: ifx.AlignmentPlan,
    number: int,
    x: Tensor,
    entry: dict[str, Any],
    *,
    lowerings: bool,
) -> dict[str, nn.Module]:
    """Ours and the hook baseline by torch.compile, and ours with other rewrites; seconds of compiling go into `entry`."""
    hooks = HookBaseline(copy.deepcopy(teacher), copy.deepcopy(student).train(), plan.pairs[number])
    ours, entry["compile_seconds"] = compiled_stage(
        own_stage(teacher, student, plan, number, x, target=Target(compiled=True)), x
    )
    rival, entry["compile_hooks_seconds"] = compiled_stage(hooks, x)
    others = {"with all": LOWERINGS["cpu"], **each_left_out("cpu compiled")} if lowerings else {}
    found = {"compiled": ours, "compiled hooks": rival}
    for key, chosen in others.items():
        found[f"compiled {key}"], _ = compiled_stage(own_stage(teacher, student, plan, number, x, lowerings=chosen), x)
    return found


def own_stage(
    teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, number: int, x: Tensor, **options: Any
) -> ifx.Stage:
    """One stage over a copy of the student."""
    mine = copy.deepcopy(student).train()
    return ifx.compile_stages(teacher, mine, plan, main=None, example_inputs=x[:2], **options)[number].train()


def compiled_stage(stage: nn.Module, x: Tensor) -> tuple[nn.Module, float]:
    """The same by torch.compile, which has seen nothing of the kind before; and the seconds of its first step."""
    torch._dynamo.reset()
    torch._inductor.config.force_disable_caches = True
    # The hook baseline breaks into graphs at its hooks, as hook frameworks do.
    runner = torch.compile(stage, fullgraph=isinstance(stage, ifx.Stage))
    optimizer = adam(stage)
    start = time.perf_counter()
    step(runner, optimizer, x)
    return runner, time.perf_counter() - start


def timed(runners: dict[str, nn.Module], x: Tensor, steps: int, before: Before | None) -> dict[str, float]:
    """Milliseconds of a step, each way in its turn; the first two steps are not counted."""
    optimizers = {key: adam(runner) for key, runner in runners.items()}
    times: dict[str, list[float]] = {key: [] for key in runners}
    if before is not None:
        times |= {way: [] for way in before.ways}
    for k in range(steps + 2):
        for key in times:
            seconds = before.step(key) if before and key in before.ways else step(runners[key], optimizers[key], x)
            if k >= 2:
                times[key].append(seconds)
    return {f"{key}_ms": 1e3 * statistics.median(values) for key, values in times.items()}


def compared(
    name: str, teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, number: int, steps: int
) -> dict[str, Any]:
    """How far both ways of training are apart after so many steps, in float32 and float64; at 64 pixels where the pair takes them."""
    _, size, batch = PAIRS[name]
    shape = (batch, *size) if name in ("paper", "vit_b-vit_ti") else (8, 3, 64, 64)
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(steps)]
    if shape[1:] != size:
        plan = ifx.align(teacher, student, example_inputs=batches[0][:2])
    double = [module.double() for module in copy.deepcopy((teacher, student))]
    return {
        "difference": same_training(teacher, student, plan, number, batches),
        "difference_sgd": same_training(teacher, student, plan, number, batches, sgd),
        "difference64": same_training(*double, plan, number, [x.double() for x in batches]),
    }


def weigh(row: dict[str, Any]) -> None:
    """Speed-ups over the curriculum: 3, 4, 5, … epochs of the stages."""
    stages = row["stages"]
    for key in [
        key.removesuffix("_ms") for key in stages[0] if key.endswith("_ms") and key not in ("hooks_ms", "floor_ms")
    ]:
        if all(f"{key}_ms" in stage for stage in stages):
            total = [sum((2 + s["number"]) * s[f"{kind}_ms"] for s in stages) for kind in ("hooks", key)]
            row[f"speedup_{key}"] = total[0] / total[1]
    if all("compiled_ms" in stage for stage in stages):
        saved = sum((2 + s["number"]) * (s["ours_ms"] - s["compiled_ms"]) for s in stages) / sum(
            2 + s["number"] for s in stages
        )
        seconds = sum(stage["compile_seconds"] for stage in stages)
        row["break_even_steps"] = 1e3 * seconds / saved if saved > 0 else None


class Deep(nn.Sequential):
    """So many small blocks of convolution, norm and ReLU: three nodes each."""

    def __init__(self, blocks: int, width: int):
        layers: list[nn.Module] = []
        for k in range(blocks):
            layers += [nn.Conv2d(width if k else 3, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def setup() -> dict[str, Any]:
    """Seconds that compile_stages takes on traced models: resnet152 → resnet50, and chains of 1,250 to 10,000 nodes."""

    def seconds(teacher: nn.Module, student: nn.Module, x: Tensor, **options: Any) -> tuple[float, int, int]:
        traced = ifx.trace(teacher, x, role="teacher"), ifx.trace(student, x, role="student")
        plan = ifx.align(*traced, **options)
        start = time.process_time()
        stages = ifx.compile_stages(*traced, plan, main=None)
        return time.process_time() - start, len(stages), len(traced[0].graph_module.graph.nodes)

    pair = vision("resnet152", "resnet50")()
    found = seconds(*pair, torch.randn(2, 3, 64, 64))
    result: dict[str, Any] = {"resnet152-resnet50": {"seconds": found[0], "stages": found[1], "nodes": found[2]}}
    chains = []
    for nodes in (1250, 2500, 5000, 10000):
        taps = {"fixed": [(str(3 * (nodes // 3 * part // 4) - 1),) * 2 for part in (1, 2, 3)]}
        found = seconds(Deep(nodes // 3, 4), Deep(nodes // 3, 2), torch.randn(2, 3, 4, 4), **taps)
        chains.append({"nodes": found[2], "seconds": found[0], "stages": found[1]})
        print(chains[-1], flush=True)
    return result | {"chains": chains}


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    names = "hooks ms|ours ms|×|compiled ms|×|compile s|cached ms|bf16 ms|floor ms|loss differs"
    table = Table("pair", "stage", *names.split("|"))
    for row in rows:
        for stage in row["stages"]:
            compiled = stage.get("compiled_ms")
            table.add_row(
                row["pair"],
                stage["tap"],
                f"{stage['hooks_ms']:.1f}",
                f"{stage['ours_ms']:.1f}",
                f"{stage['hooks_ms'] / stage['ours_ms']:.2f}",
                f"{compiled:.1f}" if compiled else "",
                f"{stage['hooks_ms'] / compiled:.2f}" if compiled else "",
                f"{stage['compile_seconds']:.0f}" if compiled else "",
                f"{stage['cached_ms']:.1f}",
                f"{stage['bf16_ms']:.1f}" if "bf16_ms" in stage else "",
                f"{stage['floor_ms']:.1f}",
                f"{stage['difference']['loss']:.1e}" if "difference" in stage else "",
            )
        compiled = row.get("speedup_compiled")
        table.add_row(
            row["pair"],
            "curriculum",
            "",
            "",
            f"{row['speedup_ours']:.2f}",
            "",
            f"{compiled:.2f}" if compiled else "",
            "",
            f"× {row['speedup_cached']:.2f}",
            f"× {row['speedup_bf16']:.2f}" if "speedup_bf16" in row else "",
            end_section=True,
        )
    Console(width=120).print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--steps", type=int, default=12, help="timed steps per stage and kind")
    parser.add_argument(
        "--check",
        type=int,
        default=0,
        metavar="STEPS",
        help="train this many steps both ways and compare (50 for the record)",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="also torch.compile(stage, fullgraph=True)")
    parser.add_argument(
        "--lowerings", action="store_true", help="also our stage without each of the target's rewrites, and without any"
    )
    parser.add_argument("--before", metavar="FOLDER", help="also an earlier commit's stage; a checkout of it")
    parser.add_argument("--bf16", action="store_true", help="also the teacher in bfloat16 (slow where it is emulated)")
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory of stage 1, each in a process of its own"
    )
    parser.add_argument("--stages", nargs="+", type=int, help="only these stages, counted from 1")
    parser.add_argument("--setup", action="store_true", help="instead: seconds to set stages up")
    parser.add_argument("--default-memory", action="store_true", help="let glibc give freed memory back at every step")
    parser.add_argument("--json", metavar="FILE", help="results are added to what is there, by pair, threads and stage")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.setup:
        found = setup()
        print(json.dumps(found, indent=1))
        if options.json:
            save(options, [], setup=found)
        return
    rows = []
    for name in options.pairs:
        with freed_memory_kept(enabled=not options.default_memory) as kept:
            row = measure_pair(
                name,
                steps=options.steps,
                compiled=options.compile,
                bf16=options.bf16,
                lowerings=options.lowerings,
                before=options.before,
                kept=kept,
                check=options.check,
                only=options.stages,
            )
        rows.append(row | {"threads": options.threads, "memory_kept": kept, "command": " ".join(sys.argv[1:])})
        if options.memory:
            for key, returned in (("peak_mib", True), ("peak_default_mib", False)):
                rows[-1][key] = {kind: peak_memory(name, kind, returned=returned) for kind in ("hooks", "ours")}
                print(name, key, rows[-1][key], flush=True)
        if options.json:
            save(options, rows[-1:])
    show(rows)


def save(options: argparse.Namespace, rows: list[dict[str, Any]], **more: Any) -> None:
    """Put results into the file, beside those of other pairs, threads and stages."""
    path = Path(options.json)
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    told["about"] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    for row in rows:
        same = [old for old in told["rows"] if all(old[key] == row[key] for key in ("pair", "threads", "memory_kept"))]
        if same:
            done = {stage["number"]: stage for stage in (*same[0]["stages"], *row["stages"])}
            told["rows"].remove(same[0])
            row = same[0] | row | {"stages": [done[number] for number in sorted(done)]}
            weigh(row)
        told["rows"].append(row)
    path.write_text(json.dumps(told | more, indent=1) + "\n")


if __name__ == "__main__":
    main()
