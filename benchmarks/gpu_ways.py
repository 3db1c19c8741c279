"""The pairs of benchmarks/gpu.py, one training step of each way, and what is checked before anything is timed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.warmup_ways import _vit as vit
from benchmarks.warmup_ways import vision
from examples.paper_cifar10 import Cnn32
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.held import HeldImages
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.target import Target
from indistill_fx.training.options.optimizers import make_optimizer
from indistill_fx.training.step.cuda_graph import CudaRecorder
from indistill_fx.training.step.proof import Snapshot, state_of
from indistill_fx.training.step.recorded import WARM_UP, RecordedStep, Recorder

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
        learning_rate=1e-3,
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
    for _ in range(WARM_UP + 2):  # it is recorded in the last but one, and proves itself in the last
        step(x)
    if step.reason:
        raise RuntimeError(step.reason)
    return lambda: step(x)


@contextmanager
def exact() -> Iterator[None]:
    """Within the block float32 is computed as such."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def correctness(device: str, tiny: bool) -> list[Row]:
    """Loss and gradients of every stage of the paper's pair beside float64 on the CPU, TF32 off."""
    rows = []
    torch.manual_seed(0)
    teacher, student = paper()
    x = torch.randn(8 if tiny else 64, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    for number, pair in enumerate(plan.pairs):
        found = []
        for where, dtype in (("cpu", torch.float64), (device, torch.float32)):
            own = copy.deepcopy(student).to(where, dtype).train()
            stages = ifx.compile_stages(
                copy.deepcopy(teacher).to(where, dtype), own, plan, main=None, example_inputs=x[:2].to(where, dtype),
                target=Target(where, dtype),
            )  # fmt: skip
            with exact():
                loss = stages[number].train()(x.to(where, dtype))
                loss.backward()
            found.append((loss.item(), [p.grad.double().cpu() for p in own.parameters() if p.grad is not None]))
        (reference, grads), (got, others) = found
        whole, other = (torch.cat([grad.flatten() for grad in one]) for one in (grads, others))
        difference = float((whole - other).norm() / whole.norm())
        rows.append({"stage": pair.student, "loss": abs(got - reference) / abs(reference), "gradients": difference})
    return rows


def graphs_on_and_off(device: str, steps: int) -> Row:
    """The largest relative difference of the losses of so many steps on new data, recorded and not, by stage; TF32 off."""
    torch.manual_seed(0)
    teacher, student = paper()
    batches = [torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(steps)]
    plan = ifx.align(teacher, student, example_inputs=batches[0][:2])
    found = {}
    for number, pair in enumerate(plan.pairs):
        losses: list[list[float]] = []
        for record in (False, True):
            own = copy.deepcopy(student).to(device).train()
            stages = ifx.compile_stages(
                copy.deepcopy(teacher).to(device), own, plan, main=None, example_inputs=batches[0][:2].to(device),
                target=Target(device),
            )  # fmt: skip
            stage = stages[number].train()
            work, snapshot = work_of(stage, torch.float32, recordable=True)
            step = RecordedStep(work, recorder(device), stage, snapshot=snapshot) if record else work
            with exact():
                losses.append([float(step(batch.to(device))) for batch in batches])
            if isinstance(step, RecordedStep) and step.reason:
                raise RuntimeError(step.reason)
        found[pair.student] = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    return found


def data_on_and_off(device: str, tiny: bool) -> Row:
    """Whether augmented batches read on the device have the bits of those made on the CPU."""
    count = 500 if tiny else 10_000
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    own = MemoryLoader(
        images, torch.arange(count) % 10, mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, augment=FlipAndCrop()
    )
    there = own.to(device)
    held = HeldImages(images, own.labels, torch.device(device), FlipAndCrop())
    pairs = [(one, other) for one, other in zip(list(own), list(there._on_device(held, 0)), strict=True)]
    differing = sum(not torch.equal(a, b.cpu()) for one, other in pairs for a, b in zip(one, other, strict=True))
    return {"batches": len(pairs), "tensors that differ": differing}
