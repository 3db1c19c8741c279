"""What the warm-up costs beside the plain way, and that it trains the same.

    python -m benchmarks.warmup                         all pairs, a table
    python -m benchmarks.warmup --pairs paper --json warmup.json --compile

The plain way (the hook baseline) is what hook frameworks do: both full networks run, forward hooks keep the features, the teacher's kept
channels are selected, the mean squared error is taken. Steps of both are interleaved in one run, so that a noisy machine hits both alike;
figures are medians. First 50 steps are trained by both from the same weights and compared loss by loss.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import indistill_fx as ifx
from examples.paper_cifar10 import Cnn32

Build = Callable[[], tuple[nn.Module, nn.Module]]


def _vision(teacher: str, student: str) -> Build:
    return lambda: (torchvision.models.get_model(teacher), torchvision.models.get_model(student))


def _vit() -> tuple[nn.Module, nn.Module]:
    teacher = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=12, hidden_dim=768, mlp_dim=3072
    )
    student = torchvision.models.VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768
    )
    return teacher, student


PAIRS: dict[str, tuple[Build, tuple[int, ...], int]] = {
    "paper": (lambda: (Cnn32(), Cnn32((8, 16, 32), 64)), (3, 32, 32), 128),
    "resnet50-resnet18": (_vision("resnet50", "resnet18"), (3, 224, 224), 16),
    "vgg16_bn-vgg11_bn": (_vision("vgg16_bn", "vgg11_bn"), (3, 224, 224), 4),
    "vit_b-vit_ti": (_vit, (3, 224, 224), 4),
}


class HookBaseline(nn.Module):
    """The plain way, as one module: batch in, loss out."""

    def __init__(self, teacher: nn.Module, student: nn.Module, pair: ifx.Pair):
        super().__init__()
        self.teacher, self.student, self.pair = teacher.eval(), student, pair
        self.register_buffer("kept", torch.tensor(pair.kept) if pair.kept is not None else None)
        self.seen: dict[str, list[Tensor]] = {}
        for role, model in (("teacher", teacher), ("student", student)):
            path, _, call = getattr(pair, role).partition("@")
            model.get_submodule(path).register_forward_hook(self._note(role))
            setattr(self, f"{role}_call", int(call or 1) - 1)

    def _note(self, role: str) -> Callable[..., None]:
        return lambda _module, _args, output: self.seen[role].append(output)

    def forward(self, x: Tensor) -> Tensor:
        """The pair's loss."""
        self.seen = {"teacher": [], "student": []}
        with torch.no_grad():
            self.teacher(x)
        self.student(x)
        wanted = self.seen["teacher"][self.teacher_call]
        if self.kept is not None:
            wanted = wanted.index_select(1 if wanted.dim() == 4 else wanted.dim() - 1, self.kept)
        return F.mse_loss(self.seen["student"][self.student_call], wanted)


def step(loss_of: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> float:
    """One training step; seconds."""
    start = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(x)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - start


def adam(module: nn.Module) -> torch.optim.Optimizer:
    """The paper's optimiser, over what can be trained."""
    return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=1e-3)


def same_training(
    teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, number: int, batches: list[Tensor]
) -> dict[str, float]:
    """Largest relative differences of losses and of trained parameters over the batches."""
    ours, plain = copy.deepcopy(student).train(), copy.deepcopy(student).train()
    stage = ifx.compile_stages(teacher, ours, plan, main=None, example_inputs=batches[0]).pop(number).train()
    baseline = HookBaseline(copy.deepcopy(teacher), plain, plan.pairs[number])
    optimizers = adam(stage.student), adam(plain)
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
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True)
    )
    return {"loss": worst, "parameters": parameters}


def measure_pair(name: str, *, steps: int, compiled: bool, check: int) -> dict[str, Any]:
    """All stages of one pair: milliseconds a step of the baseline, of ours, and of ours compiled."""
    build, size, batch = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build()
    x = torch.randn(batch, *size)
    start = time.perf_counter()
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    seconds_align = time.perf_counter() - start
    start = time.perf_counter()
    ifx.compile_stages(teacher, copy.deepcopy(student), plan, main=None, example_inputs=x[:2])
    row: dict[str, Any] = {
        "pair": name,
        "batch": batch,
        "align_seconds": seconds_align,
        "setup_seconds": time.perf_counter() - start,
        "stages": [],
    }
    for number, pair in enumerate(plan.pairs):
        mine = copy.deepcopy(student).train()
        stage = ifx.compile_stages(teacher, mine, plan, main=None, example_inputs=x[:2])[number].train()
        runners: dict[str, nn.Module] = {
            "hooks": HookBaseline(copy.deepcopy(teacher), copy.deepcopy(student).train(), pair),
            "ours": stage,
        }
        entry: dict[str, Any] = {"tap": pair.student, "teacher": pair.teacher}
        if compiled:
            torch._dynamo.reset()
            again = ifx.compile_stages(teacher, copy.deepcopy(student).train(), plan, main=None, example_inputs=x[:2])[
                number
            ].train()
            runners["compiled"] = torch.compile(again, fullgraph=True)
            optimizer = adam(again.student)
            start = time.perf_counter()
            step(runners["compiled"], optimizer, x)
            entry["compile_seconds"] = time.perf_counter() - start
        optimizers = {key: adam(runner) for key, runner in runners.items()}
        times: dict[str, list[float]] = {key: [] for key in runners}
        for k in range(steps + 2):
            for key, runner in runners.items():
                seconds = step(runner, optimizers[key], x)
                if k >= 2:
                    times[key].append(seconds)
        entry |= {f"{key}_ms": 1e3 * statistics.median(values) for key, values in times.items()}
        if check:
            batches = [torch.randn(batch, *size, generator=torch.Generator().manual_seed(k)) for k in range(check)]
            entry["difference"] = same_training(teacher, student, plan, number, batches)
        row["stages"].append(entry)
    weights = [3 + k for k in range(len(row["stages"]))]
    for key in ("ours", "compiled") if compiled else ("ours",):
        total = [
            sum(w * s[f"{kind}_ms"] for w, s in zip(weights, row["stages"], strict=True)) for kind in ("hooks", key)
        ]
        row[f"speedup_{key}"] = total[0] / total[1]
    return row


def peak_memory(name: str, kind: str) -> float:
    """Peak resident memory of five steps of stage 1, in MiB above the process before them; in a process of its own."""
    code = f"from benchmarks.warmup import _peak; print(_peak({name!r}, {kind!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def _peak(name: str, kind: str) -> float:
    build, size, batch = PAIRS[name]
    torch.manual_seed(0)
    teacher, student = build()
    x = torch.randn(batch, *size)
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    if kind == "hooks":
        runner: nn.Module = HookBaseline(teacher, student.train(), plan.pairs[0])
    else:
        runner = ifx.compile_stages(teacher, student, plan, main=None, example_inputs=x[:2])[0].train()
        del teacher
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer = adam(runner)
    for _ in range(5):
        step(runner, optimizer, x)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table("pair", "stage", "hooks ms", "ours ms", "×", "compiled ms", "×", "compile s", "loss differs")
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
        "--memory", action="store_true", help="also peak memory of stage 1, each in a process of its own"
    )
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.pairs:
        rows.append(measure_pair(name, steps=options.steps, compiled=options.compile, check=options.check))
        if options.memory:
            rows[-1]["peak_mib"] = {kind: peak_memory(name, kind) for kind in ("hooks", "ours")}
            print(name, "peak memory of stage 1 (MiB):", rows[-1]["peak_mib"])
    show(rows)
    if options.json:
        about = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
        }
        about |= {
            "machine": platform.processor() or platform.machine(),
            "threads": options.threads,
            "command": " ".join(sys.argv),
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
