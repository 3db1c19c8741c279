"""The pairs of benchmarks/gpu.py, and one training step of each way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.warmup_ways import HookBaseline, vision
from benchmarks.warmup_ways import _vit as vit
from examples.paper_cifar10 import Cnn32
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings
from indistill_fx.target import Target
from indistill_fx.training.options.optimizers import make_optimizer
from indistill_fx.training.step.cuda_graph import CudaRecorder
from indistill_fx.training.step.proof import Snapshot, state_of
from indistill_fx.training.step.recorded import WARM_UP, RecordedStep, Recorder

Row = dict[str, Any]
Ways = Mapping[str, Callable[[], Callable[[], Any]]]
"""What makes a step of each way."""


def paper() -> tuple[nn.Module, nn.Module]:
    """The paper's pair."""
    return Cnn32(), Cnn32((8, 16, 32), 64)


@dataclass(frozen=True)
class Task:
    """What is measured of a pair.

    Attributes:
        build: makes teacher and student.
        size: of an image.
        batch: images in a batch.
        dtype: of the arithmetic on a GPU; float32 is what torch makes of it by default, convolutions in TF32.
        stages: their numbers, from 1.
    """

    build: Callable[[], tuple[nn.Module, nn.Module]]
    size: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    stages: tuple[int, ...]


_LARGE, _HALF = (3, 224, 224), torch.bfloat16

PAIRS: dict[str, Task] = {  # the most important ones first
    "paper": Task(paper, (3, 32, 32), 128, torch.float32, (1, 2, 3)),
    "resnet50-resnet18": Task(vision("resnet50", "resnet18"), _LARGE, 128, _HALF, (1, 2, 3, 4)),
    "vit_b-vit_ti": Task(vit, _LARGE, 128, _HALF, (1, 6, 12)),
    "resnet50-mobilenet_v3_large": Task(vision("resnet50", "mobilenet_v3_large"), _LARGE, 128, _HALF, (1, 3)),
    "resnet152-resnet50": Task(vision("resnet152", "resnet50"), _LARGE, 64, _HALF, (1, 4)),
    "resnet50-resnet18, float32": Task(vision("resnet50", "resnet18"), _LARGE, 128, torch.float32, (1, 4)),
}

COMPILED: tuple[tuple[str, int], ...] = (  # likewise; each takes a minute or so to compile
    *(("resnet50-resnet18", 1), ("resnet50-resnet18", 4), ("paper", 1), ("paper", 2), ("paper", 3)),
    *(("resnet50-mobilenet_v3_large", 3), ("vit_b-vit_ti", 12), ("resnet152-resnet50", 4)),
    *(("resnet50-resnet18", 2), ("resnet50-resnet18", 3), ("vit_b-vit_ti", 1), ("vit_b-vit_ti", 6)),
    *(("resnet50-mobilenet_v3_large", 1), ("resnet152-resnet50", 1)),
    *(("resnet50-resnet18, float32", 1), ("resnet50-resnet18, float32", 4)),
)


class Models:
    """A pair on a device, aligned, and all ways of training its stages.

    Args:
        name: of the pair.
        device: where.
        tiny: small pictures and batches.
    """

    def __init__(self, name: str, device: str, *, tiny: bool):
        task = PAIRS[name]
        size, batch = task.size, task.batch
        if tiny:
            size, batch = size if name in ("paper", "vit_b-vit_ti") else (3, 64, 64), 2
        self.name, self.device = name, device
        self.dtype = task.dtype if device.startswith("cuda") else torch.float32
        torch.manual_seed(0)
        self.teacher, self.student = (model.to(device) for model in task.build())
        self.x = torch.randn(batch, *size, device=device)
        self.plan = ifx.align(self.teacher, self.student, example_inputs=self.x[:2])
        self.last = self.dtype != torch.float32 and "vit" not in name  # as their users train them
        self.batch = self.x.to(memory_format=torch.channels_last) if self.last else self.x

    def row(self, number: int) -> Row:
        """What is to be known of a stage."""
        tap = self.plan.pairs[number - 1].student
        dtype = str(self.dtype).partition(".")[2]
        return {"pair": self.name, "stage": tap, "number": number, "batch": len(self.x), "dtype": dtype}

    def ours(self, number: int, *, compiled: bool = False, lowerings: Lowerings | None = None) -> ifx.Stage:
        """Our stage; its student's weights lie as the trainer would lay them."""
        mine = copy.deepcopy(self.student).train()
        mine = mine.to(memory_format=torch.channels_last) if self.last else mine
        return stage_of(
            self.teacher,
            mine,
            self.plan,
            number,
            self.x[:2],
            target=Target(self.device, self.dtype, compiled),
            lowerings=lowerings,
        )

    def hooks(self, number: int) -> nn.Module:
        """The plain way: both networks whole."""
        models = copy.deepcopy(self.teacher), copy.deepcopy(self.student).train()
        if self.last:
            models = tuple(model.to(memory_format=torch.channels_last) for model in models)  # type: ignore[assignment]
        return HookBaseline(*models, self.plan.pairs[number - 1])

    def ways(self, number: int) -> Ways:
        """As they are."""
        x, dtype = self.batch, self.dtype
        return {
            "hooks": lambda: eager(self.hooks(number), x, dtype),
            "ours": lambda: eager(self.ours(number), x, dtype),
            "recorded": lambda: recorded(self.ours(number), x, dtype),
        }

    def compiled(self, number: int) -> Ways:
        """By torch.compile, and beside them two as they are."""
        x, dtype, kept = self.batch, self.dtype, list[Any]()

        def ours() -> Any:
            if not kept:
                kept.append(torch.compile(self.ours(number, compiled=True), fullgraph=True))
            return kept[0]

        ways = self.ways(number)
        return {
            "hooks": ways["hooks"],
            "recorded": ways["recorded"],
            "hooks compiled": lambda: eager(torch.compile(self.hooks(number)), x, dtype),
            "ours compiled": lambda: eager(ours(), x, dtype),
            "recorded compiled": lambda: recorded(ours(), x, dtype),
        }

    def lowered(self, number: int) -> Ways:
        """With each rewrite of the target's table off, all off, and those on that a GPU could have and that stand in no table."""
        own = LOWERINGS[Target(self.device, self.dtype).kind]
        tried = {f"without {name}": own.without(name) for name in dict.fromkeys((*own.teacher, *own.student))}
        tried |= {"without any": Lowerings(), "with fuse_cudnn": with_fuse_cudnn(own), "as it is": own}
        if "channels_last" not in own.student:
            both = replace(own, teacher=("channels_last", *own.teacher), student=("channels_last", *own.student))
            tried["with channels_last"] = both
        return {
            key: lambda lowerings=lowerings: eager(self.ours(number, lowerings=lowerings), self.batch, self.dtype)
            for key, lowerings in tried.items()
        }


def with_fuse_cudnn(own: Lowerings) -> Lowerings:
    """The same rewrites, and before them the one that no table has yet."""
    return replace(own, teacher=("fuse_cudnn", *own.teacher))


def stage_of(
    teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, number: int, example: Tensor, **options: Any
) -> ifx.Stage:
    """One warm-up stage of a pair, in train mode; the others are not compiled."""
    lengths = [int(k == number) for k in range(1, len(plan.pairs) + 1)]
    curriculum = ifx.Curriculum(lengths=lengths)
    (stage,) = ifx.compile_stages(
        teacher, student, plan, curriculum=curriculum, main=None, example_inputs=example, **options
    )
    return stage.train()


class RunAgain:
    """A recorder for a CPU, which has no graphs: what would be replayed runs again, on the batch that stays in its place."""

    def beside(self, run: Callable[[], Tensor]) -> Tensor:
        """Run it."""
        return run()

    @contextmanager
    def waiting(self) -> Iterator[list[str]]:
        """Nothing waits."""
        yield []

    def host_draws(self) -> object:
        """Nobody draws."""
        return None

    def device_draws(self) -> Tensor:
        """The CPU's."""
        return torch.get_rng_state()

    def draw_again(self, state: Tensor) -> None:
        """The CPU's."""
        torch.set_rng_state(state)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Itself."""
        return run


def recorder(device: str) -> Recorder:
    """CUDA's, where there is one."""
    return CudaRecorder(torch.device(device)) if device.startswith("cuda") else RunAgain()


def work_of(
    loss_of: nn.Module, dtype: torch.dtype, *, recordable: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[], Snapshot]]:
    """One training step as a function batch → loss, which leaves no gradients; and what copies the state that it changes."""
    optimizer = make_optimizer(
        "adam",
        [parameter for parameter in loss_of.parameters() if parameter.requires_grad],
        learning_rate=2.0**-10,  # a number of float32, in which a recorded optimiser has its rate
        weight_decay=0.0,
        momentum=0.0,
        recordable=recordable,
    )

    def work(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=not recordable):
            loss: Tensor = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return work, lambda: Snapshot(state_of(loss_of, optimizer))


def eager(loss_of: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """A step on one batch."""
    work, _ = work_of(loss_of, dtype, recordable=False)
    return lambda: work(x)


def recorded(loss_of: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The same, recorded by what the trainer records with.

    Raises:
        RuntimeError: it is not recorded; says why.
    """
    work, snapshot = work_of(loss_of, dtype, recordable=True)
    step = RecordedStep(work, recorder(str(x.device)), loss_of, snapshot=snapshot)
    for _ in range(WARM_UP + 1):  # in the last one it is recorded, and proves itself
        step(x)
    if step.reason:
        raise RuntimeError(step.reason)
    return lambda: step(x)
