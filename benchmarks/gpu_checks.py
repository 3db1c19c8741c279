"""What is checked before anything is timed: that the fast ways compute what the plain ones do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from benchmarks.gpu_ways import Row, paper, recorder, stage_of, work_of
from benchmarks.warmup_ways import HookBaseline, vision
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.held import HeldImages
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.system.exact_arithmetic import exact_arithmetic
from indistill_fx.target import Target
from indistill_fx.training.step.recorded import RecordedStep

Found = tuple[float, Tensor]
"""A loss, and the gradients of the student one after the other."""


def learnt(loss_of: nn.Module, student: nn.Module, x: Tensor, dtype: torch.dtype) -> Found:
    """The loss of a batch, and its gradients; float64 stays as it is, lower precisions are autocast's."""
    student.zero_grad()
    reduced = dtype in (torch.bfloat16, torch.float16)
    with exact_arithmetic():
        with torch.autocast(x.device.type, dtype if reduced else torch.bfloat16, enabled=reduced):
            loss = loss_of(x)
        loss.backward()
    return loss.item(), torch.cat([p.grad.double().cpu().flatten() for p in student.parameters() if p.grad is not None])


def beside(found: Found, reference: Found) -> Row:
    """How far a loss and its gradients are from others, relative."""
    loss = abs(found[0] - reference[0]) / abs(reference[0])
    return {"loss": loss, "gradients": float((found[1] - reference[1]).norm() / reference[1].norm())}


def correctness(device: str, tiny: bool) -> list[Row]:
    """Every stage of the paper's pair, and of hooks, in float32 with TF32 off, beside hooks in float64 on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(8 if tiny else 64, 3, 32, 32)
    return compared(*paper(), x, (1, 2, 3), device, torch.float32)


def reduced(device: str, tiny: bool) -> list[Row]:
    """resnet50 → resnet18 in bfloat16, lowered as the target's table says, beside the same float64."""
    torch.manual_seed(0)
    x = torch.randn(2 if tiny else 16, 3, 64, 64)
    numbers = (1,) if tiny else (1, 4)
    return compared(*vision("resnet50", "resnet18")(), x, numbers, device, torch.bfloat16)


def compared(
    teacher: nn.Module, student: nn.Module, x: Tensor, numbers: tuple[int, ...], device: str, dtype: torch.dtype
) -> list[Row]:
    """For every stage, how far hooks and ours are from hooks in float64 on the CPU."""
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    rows = []
    for number in numbers:
        pair = plan.pairs[number - 1]

        def hooks(where: str, weights: torch.dtype, computed: torch.dtype, pair: ifx.Pair = pair) -> Found:
            models = [copy.deepcopy(model).to(where, weights) for model in (teacher, student)]
            return learnt(HookBaseline(models[0], models[1].train(), pair), models[1], x.to(where, weights), computed)

        reference = hooks("cpu", torch.float64, torch.float64)
        row: Row = {"stage": pair.student, "hooks": beside(hooks(device, torch.float32, dtype), reference)}
        theirs, mine = (copy.deepcopy(model).to(device) for model in (teacher, student))
        example, target = x[:2].to(device), Target(device, dtype)
        stage = stage_of(theirs, mine.train(), plan, number, example, target=target)
        row["ours"] = beside(learnt(stage, mine, x.to(device), dtype), reference)
        rows.append(row)
    return rows


def graphs_on_and_off(device: str, steps: int) -> Row:
    """The largest relative difference of the losses of so many steps on new data, recorded and not, by stage; TF32 off.

    Raises:
        RuntimeError: a step is not recorded; says why.
    """
    torch.manual_seed(0)
    teacher, student = paper()
    batches = [torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(steps)]
    plan = ifx.align(teacher, student, example_inputs=batches[0][:2])
    found: Row = {}
    for number, pair in enumerate(plan.pairs, start=1):
        losses: list[list[float]] = []
        for record in (False, True):
            theirs, mine = (copy.deepcopy(model).to(device) for model in (teacher, student))
            example = batches[0][:2].to(device)
            stage = stage_of(theirs, mine.train(), plan, number, example, target=Target(device))
            work, snapshot = work_of(stage, torch.float32, recordable=record)
            step = RecordedStep(work, recorder(device), stage, snapshot=snapshot) if record else work
            with exact_arithmetic():
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
