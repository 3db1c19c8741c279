"""The device of a run: how exact it is, what is to be known of it, and how much memory it has taken."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from indistill_fx.system.allocator import freed_memory_kept
from indistill_fx.training.options.settings import Tf32


@contextmanager
def computing_on(device: torch.device, tf32: Tf32) -> Iterator[None]:
    """Within the block the device is torch's current one of its kind: a GPU computes float32 as asked, a CPU keeps freed memory.

    Args:
        device: of the run.
        tf32: what NVIDIA GPUs compute in TF32: nothing, convolutions (torch's default), or matrix products too.
    """
    if device.type != "cuda":
        with freed_memory_kept(enabled=device.type == "cpu"):
            yield
        return
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    with ExitStack() as stack, warnings.catch_warnings():
        # The new flags cannot be mixed with these, and other code, such as torch.compile, still reads these.
        warnings.filterwarnings("ignore", ".*TF32", UserWarning)
        before = convolutions.allow_tf32, products.allow_tf32
        stack.enter_context(torch.cuda.device(device))
        try:
            convolutions.allow_tf32, products.allow_tf32 = tf32 != "off", tf32 == "all"
            yield
        finally:
            convolutions.allow_tf32, products.allow_tf32 = before


def device_facts(device: torch.device, tf32: Tf32) -> dict[str, Any]:
    """What run.json says about a GPU: its name, torch's CUDA and cuDNN, and what is computed in TF32; of others nothing."""
    if device.type != "cuda":
        return {}
    cudnn = torch.backends.cudnn.version()
    return {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "cudnn": cudnn, "tf32": tf32}


def forget_peak(device: torch.device) -> None:
    """Let the next `peak_memory` be that of the time from now on, if the device can say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held; None if it cannot be known.

    Of a GPU by torch since `forget_peak`: its tensors, what a recorded step writes into, and what is kept for the next tensors. Of a CPU by
    the whole process since it began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type != "cpu" or sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
