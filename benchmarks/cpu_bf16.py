"""bfloat16 on a CPU: a step of every stage in float32 and under autocast, and which rewrites pay in bfloat16.

    python -m benchmarks.cpu_bf16 run --json benchmarks/results/cpu_bf16.json
    python -m benchmarks.cpu_bf16 table                 into docs/performance.md

Worth running only where the processor multiplies in bfloat16 (Linux shows `avx512_bf16` or `amx_bf16` among the flags in /proc/cpuinfo);
elsewhere bfloat16 is emulated, and slow. Steps of all ways are interleaved in one process; figures are medians, of the
process's CPU time with one thread. `hooks` is the warm-up with forward hooks (benchmarks/warmup.py). `float32` and `bfloat16` are our
stages as the trainer runs them; `plain bfloat16` is ours without any rewrite, and `with …` has that one alone. For `compiled` ways,
torch.compile follows, the seconds of which are not counted. The stage `main` is KD.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.page import put_between
from benchmarks.resnet_cifar import resnet20, resnet56
from benchmarks.warmup_ways import PAIRS as VISION
from benchmarks.warmup_ways import HookBaseline, adam, step
from indistill_fx.passes.lowering.layout import laid_out
from indistill_fx.passes.lowering.table import Lowerings
from indistill_fx.system.allocator import freed_memory_kept
from indistill_fx.target import Target

BF16 = torch.bfloat16
PAIRS = VISION | {"resnet56-resnet20": (lambda: (resnet56(), resnet20()), (3, 32, 32), 128)}
ALONE = {
    "plain bfloat16": Lowerings(dtype=BF16),
    "with stem_channels_last": Lowerings(student=("stem_channels_last",), dtype=BF16),
    "with cast_weights": Lowerings(teacher=("cast_weights",), dtype=BF16),
    "with channels_last in the teacher": Lowerings(teacher=("channels_last",), dtype=BF16),
    "with channels_last in the student": Lowerings(student=("channels_last",), dtype=BF16),
    "with channels_last in both": Lowerings(("channels_last",), ("channels_last",), BF16),
    "with channels_last in both, cast_weights": Lowerings(("channels_last", "cast_weights"), ("channels_last",), BF16),
}
"""Ways to lower for bfloat16; what pays stands in `passes.lowering.table` under `cpu reduced`."""


class Autocast(nn.Module):
    """A module whose forward runs in bfloat16 where autocast has it so, as in the trainer."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Tensor:
        """The loss, in float32."""
        with torch.autocast("cpu", BF16):
            loss: Tensor = self.module(batch)
        return loss.float()


def ways(
    teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, number: int, x: Tensor, *, compiled: bool
) -> dict[str, nn.Module]:
    """Everything that is measured of one stage (the last number: the main stage)."""

    def stage(**options: Any) -> ifx.Stage:
        mine = copy.deepcopy(student).train()
        return ifx.compile_stages(teacher, mine, plan, example_inputs=x[:2], **options)[number].train()

    def hooks() -> nn.Module:
        return HookBaseline(copy.deepcopy(teacher), copy.deepcopy(student).train(), plan.pairs[number])

    found: dict[str, nn.Module] = {}
    if number < len(plan.pairs):
        found |= {"hooks": hooks(), "hooks bfloat16": Autocast(hooks())}
    found |= {"float32": stage(), "bfloat16": Autocast(stage(target=Target(dtype=BF16)))}
    found |= {name: Autocast(stage(lowerings=chosen)) for name, chosen in ALONE.items()}
    if compiled:
        torch._dynamo.reset()
        found["compiled float32"] = torch.compile(stage(target=Target(compiled=True)))
        found["compiled bfloat16"] = torch.compile(Autocast(stage(target=Target(dtype=BF16, compiled=True))))
    return found


def student_of(way: nn.Module) -> nn.Module | None:
    """The student of a stage that runs it channels last, which the trainer lays out so."""
    stage = way.module if isinstance(way, Autocast) else way
    if not isinstance(stage, ifx.Stage):
        return None
    done = any(record.name == "channels_last" and record.done for record in stage.report.student)
    return stage.student if done else None


def measure(name: str, *, steps: int, compiled: bool, only: list[int] | None, batch: int | None) -> dict[str, Any]:
    """Milliseconds a step of every way, for every stage of a pair."""
    build, size, usual = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build()
    x, labels = torch.randn(batch or usual, *size), torch.randint(0, 10, (batch or usual,))
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    row: dict[str, Any] = {"pair": name, "batch": len(x), "stages": []}
    for number in range(len(plan.pairs) + 1):
        main = number == len(plan.pairs)
        if only and number + 1 not in only and not main:
            continue
        tap = "main" if main else plan.pairs[number].student
        runners = ways(teacher, student, plan, number, x, compiled=compiled)
        given: Any = (x, labels) if main else x
        times: dict[str, list[float]] = {key: [] for key in runners}
        optimizers = {key: adam(runner) for key, runner in runners.items()}
        with ExitStack() as stack:
            for runner in runners.values():
                if (half := student_of(runner)) is not None:
                    stack.enter_context(laid_out(half))
            for k in range(steps + 2):
                for key, runner in runners.items():
                    seconds = step(runner, optimizers[key], given)
                    if k >= 2:
                        times[key].append(seconds)
        row["stages"].append({"tap": tap, **{key: 1e3 * statistics.median(found) for key, found in times.items()}})
        print(name, json.dumps(row["stages"][-1]), flush=True)
    return row


def run(options: argparse.Namespace) -> None:
    """Measure, and write after every pair."""
    torch.set_num_threads(options.threads)
    path = Path(options.json)
    told: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"rows": []}
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    for name in options.pairs:
        with freed_memory_kept():
            row = measure(name, steps=options.steps, compiled=options.compile, only=options.stages, batch=options.batch)
        row |= {"threads": options.threads, "steps": options.steps, "command": " ".join(sys.argv[1:])}
        row |= {"torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds"), "native": native}
        told["rows"] = [old for old in told["rows"] if (old["pair"], old["threads"]) != (name, options.threads)] + [row]
        path.write_text(json.dumps(told, indent=1) + "\n")


def table(options: argparse.Namespace) -> None:
    """Two tables: how many times as fast as float32 everything is, and as plain bfloat16 each rewrite alone."""
    rows = json.loads(Path(options.json).read_text())["rows"]
    about = rows[0]
    lines = [
        f"torch {about['torch']}, {', '.join(about['native']) or 'emulated'}, {about['threads']} thread, {about['date']}.",
        "",
    ]
    lines += rated(
        rows,
        "float32",
        ["bfloat16", "plain bfloat16", "hooks", "hooks bfloat16", "compiled float32", "compiled bfloat16"],
    )
    lines += ["", "Each rewrite alone, beside bfloat16 without any:", ""]
    lines += rated(
        rows, "plain bfloat16", [way for way in ALONE if way in rows[0]["stages"][0] and way != "plain bfloat16"]
    )
    marks = "<!-- cpu_bf16: made by benchmarks/cpu_bf16.py table -->", "<!-- cpu_bf16: end -->"
    put_between(Path("docs/performance.md"), *marks, "\n".join(lines) + "\n")


def rated(rows: list[dict[str, Any]], base: str, ways: list[str]) -> list[str]:
    """A line a stage: milliseconds of one way, and how many times as fast the others are."""
    lines = [
        f"| pair, batch | stage | {base}, ms | {' | '.join(f'{way}, ×' for way in ways)} |",
        "|---" * (len(ways) + 3) + "|",
    ]
    for row in rows:
        for stage in row["stages"]:
            cells = [f"{stage[base] / stage[way]:.2f}" if way in stage else "–" for way in ways]
            lines.append(
                f"| {row['pair']}, {row['batch']} | {stage['tap']} | {stage[base]:.0f} | {' | '.join(cells)} |"
            )
    return lines


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("table", table)):
        one = commands.add_parser(name)
        one.set_defaults(call=function)
        one.add_argument("--json", default="benchmarks/results/cpu_bf16.json")
        if name == "run":
            one.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=list(PAIRS))
            one.add_argument("--steps", type=int, default=8)
            one.add_argument(
                "--stages", nargs="+", type=int, help="only these stages, counted from 1, and the main one"
            )
            one.add_argument("--batch", type=int, help="instead of the pair's own")
            one.add_argument("--threads", type=int, default=1)
            one.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
