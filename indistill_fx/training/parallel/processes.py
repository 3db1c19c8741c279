"""What Accelerate is asked for: device, precision, processes."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, DistributedType, broadcast_object_list
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.target import Target, chosen_device

_FSDP, _DEVICE = "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE"


def make_accelerator(*, device: str, precision: str | None) -> Accelerator:
    """Accelerate's view of devices and processes: one object a run, which everything in it is handed.

    Args:
        device: as torch writes it; `auto`: an accelerator if there is one.
        precision: `no`, `bf16` or `fp16`; None: whatever `accelerate launch` says.

    Raises:
        ConfigError: a launcher asks for a way of training in which a stage cannot share the student's parameters, the device does not
            compute in that precision, or one device is named for several processes.
    """
    wanted = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    place, launched = chosen_device(device), int(os.environ.get("LOCAL_RANK", -1)) != -1
    if launched and place.index is not None and place.type != "cpu":
        raise ConfigError(
            f"{device!r} is a single device, but every process of a launch needs its own.",
            where="device",
            got=device,
            expected=f"auto, {place.type} or cpu",
            hint=f"Give device={place.type!r} (--device {place.type}); CUDA_VISIBLE_DEVICES says which ones.",
        )
    named = None if launched or device == "auto" or place.type == "cpu" else str(place)
    if not launched:
        _forget_other_devices(place)
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()  # Accelerate allows one precision per process, and a process may train twice
    # A recorded step must not read a cast that was cached before the recording.
    autocast = AutocastKwargs(cache_enabled=place.type != "cuda")
    # otherwise Accelerate would wrap the student's layers permanently
    sharding = "false" if launched_for_sharding() else None
    with _in_environment(_FSDP, sharding), _in_environment(_DEVICE, named):
        accelerator = Accelerator(
            # Without a GPU, Accelerate forms a group of processes only if the CPU is requested.
            cpu=place.type == "cpu",
            mixed_precision=wanted,
            # Without synchronised batch norms each process has its own statistics; those of the first process are
            # saved.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), autocast],
        )
    if wanted == "fp16" and accelerator.device.type == "cpu":  # Accelerate would ignore it without an error
        raise ConfigError(
            "Training in fp16 is not possible on a CPU.",
            where="mixed_precision",
            got="fp16",
            expected="bf16 or no",
            hint="Use mixed_precision='bf16' (--mixed-precision bf16), or leave it out.",
        )
    refused = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if accelerator.distributed_type in refused:
        raise ConfigError(
            f"`distill` and `train` do not run under {accelerator.distributed_type.value}.",
            where="accelerate launch",
            hint="Launch with torchrun (DDP, or FSDP by shard=True, --shard), or train the stages of compile_stages yourself.",
        )
    if accelerator.num_processes > 1:
        atexit.unregister(let_threads_finish)  # registered once, even if a process trains several times
        atexit.register(let_threads_finish)
    return accelerator


def _forget_other_devices(place: torch.device) -> None:
    """Let Accelerate, which fixes one device per process, choose again if an earlier run used another device."""
    if not PartialState._shared_state or PartialState().num_processes > 1:
        return
    if _indexed(PartialState().device) != _indexed(place):
        AcceleratorState._reset_state(reset_partial_state=True)


def _indexed(device: torch.device) -> str:
    if device.type in ("cpu", "mps"):
        return device.type
    return f"{device.type}:{torch.accelerator.current_device_index() if device.index is None else device.index}"


def target_of(accelerator: Accelerator, student: nn.Module, *, compiled: bool) -> Target:
    """What a run's stages are lowered for.

    Raises:
        ConfigError: the device cannot compute in that precision.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, Target.of(student).dtype)
    return Target(str(accelerator.device), dtype, compiled)


def let_threads_finish() -> None:
    """Before Python ends: time for gloo's threads to let go of the last collective's tensors.

    A thread that does so while Python shuts down aborts the process, and torchrun calls a finished run failed
    (pytorch/pytorch#179291). The process group is not destroyed here: after an error that may wait for a peer that never comes.
    """
    time.sleep(0.1)


@contextmanager
def noticing_dead_peers(accelerator: Accelerator) -> Iterator[None]:
    """Within the block, the end of another process of the run is reported as such, not as a broken connection.

    Raises:
        TrainError: another process ended.
    """
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().partition("\n")[0]
        connection_lost = isinstance(error, torch.distributed.DistError) or any(
            sign in str(error) for sign in ("by peer", "gloo", "Broken pipe", "Socket Timeout")
        )
        if accelerator.num_processes == 1 or not connection_lost:
            raise
        raise TrainError(
            f"Another of the {accelerator.num_processes} processes of this run has ended: {first[:200]}",
            where=f"process {accelerator.process_index}",
            hint="Its last messages give the reason. The last checkpoint is intact: launch again with resume=True (--resume).",
        ) from error


def launched_for_sharding() -> bool:
    """Whether `accelerate launch --use_fsdp` asks that parameters be spread over processes."""
    return os.environ.get(_FSDP, "false").lower() == "true"


@contextmanager
def _in_environment(name: str, value: str | None) -> Iterator[None]:
    """Within the block, set an environment variable, the only way to configure this in Accelerate; None: leave it unchanged."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
        else:
            os.environ.pop(name, None)


def is_main_process() -> bool:
    """Whether this is the process that writes and speaks."""
    return bool(PartialState().is_main_process)


def weighted(accelerator: Accelerator, mean: Tensor, samples: int) -> Tensor:
    """A mean over this process's samples, so weighted that the mean over processes is that over all samples.

    All must call it alike, also those that have no samples.
    """
    if accelerator.num_processes == 1:
        return mean
    all_samples: Tensor = accelerator.reduce(torch.tensor(samples, device=accelerator.device), "sum")
    share: Tensor = samples * accelerator.num_processes / all_samples.clamp(min=1)
    return mean * share.to(mean.dtype)


def mean_over_processes(accelerator: Accelerator, value: float) -> float:
    """The mean of what the processes have; all must call it alike."""
    if accelerator.num_processes == 1:
        return value
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
    local = torch.tensor(value, dtype=wide, device=accelerator.device)
    return float(accelerator.reduce(local, "mean"))


def first_says(accelerator: Accelerator, value: bool) -> bool:
    """The first process's word, where all must do alike; all must call it alike."""
    if accelerator.num_processes == 1:
        return value
    values: list[bool] = broadcast_object_list([value])
    return values[0]
