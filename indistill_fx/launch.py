"""What Accelerate is asked for: device, precision, processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.settings import Settings


def make_accelerator(settings: Settings) -> Accelerator:
    """Accelerate's view of devices and processes.

    Raises:
        ConfigError: a launcher asks for a way of training in which a stage cannot share the student's parameters.
    """
    wanted = settings.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # one precision per process otherwise, and a process may train twice
    accelerator = Accelerator(
        cpu=settings.device == "cpu",
        mixed_precision=wanted,
        # Each process keeps its own batch-norm statistics and memory banks; those of the first are saved.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    refused = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in refused:
        raise ConfigError(
            f"`distill` and `train` do not run under {accelerator.distributed_type.value}.",
            where="accelerate launch",
            hint="Launch with torchrun (DDP), or shard the stages of compile_stages in a loop of your own.",
        )
    return accelerator


@contextmanager
def noticing_dead_peers(accelerator: Accelerator) -> Iterator[None]:
    """Within the block, the end of another process of the run is told as such, not as a broken connection.

    Raises:
        TrainError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        lost = isinstance(error, torch.distributed.DistError) or any(
            sign in str(error) for sign in ("by peer", "gloo", "Broken pipe", "Socket Timeout")
        )
        if accelerator.num_processes == 1 or not lost:
            raise
        raise TrainError(
            f"Another of the {accelerator.num_processes} processes of this run has ended: {first[:200]}",
            where=f"process {accelerator.process_index}",
            hint="What it said last tells why. The last checkpoint is good: launch again with resume=True (--resume).",
        ) from error
