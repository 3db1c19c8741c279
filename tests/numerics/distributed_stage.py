"""Run under torchrun by test_stage_distributed.py: gradients of a wrapped stage against those of the plain one."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import indistill_fx as ifx
from indistill_fx.training.parallel.processes import let_threads_finish
from tests.nets import Cnn32, images, seeded


def stages(student: torch.nn.Module) -> list[ifx.Stage]:
    teacher = seeded(Cnn32)
    for module in (teacher, student):  # statistics of half a batch are others than those of the whole
        for child in module.modules():
            if isinstance(child, torch.nn.BatchNorm2d):
                child.eval()
    built = ifx.compile_stages(teacher, student, main="kd", example_inputs=images(2, 32))
    return [built[1], built[-1]]


def main(kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    x, labels = images(8, 32, seed=3), torch.arange(8) % 10
    for number in range(2):
        plain, wrapped = seeded(Cnn32, (8, 16, 32), 64, seed=1), seeded(Cnn32, (8, 16, 32), 64, seed=1)
        stages(plain)[number]((x, labels)).backward()
        stage = stages(wrapped)[number]
        module = DistributedDataParallel(stage) if kind == "ddp" else fully_shard(stage)
        half = slice(4 * rank, 4 * rank + 4)
        module((x[half], labels[half])).backward()
        named = dict(stage.named_parameters())
        compared = 0
        names = {id(parameter): name for name, parameter in plain.named_parameters()}
        twin = stages(plain)[number]
        for name, parameter in twin.named_parameters():
            if parameter.grad is None:
                continue
            grad = named[name].grad
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")
            compared += 1
        assert compared >= 8, (compared, names)
    if rank == 0:
        print(f"{kind} agrees")
    dist.destroy_process_group()
    let_threads_finish()


if __name__ == "__main__":
    main(sys.argv[1])
