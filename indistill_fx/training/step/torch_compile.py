"""torch.compile for a stage, where it goes through."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from indistill_fx.stages.stage import Stage
from indistill_fx.training.options.settings import CompileMode

# All stages share one `forward`, and torch.compile counts compilations per function: it would give up at the ninth
# stage.
_OWN_COUNT = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}

_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}


def compiled(stage: nn.Module, trial: Callable[[Any], Any], mode: CompileMode = "default") -> tuple[nn.Module, str]:
    """The stage compiled, if a trial on one batch goes through; else as it is. Buffers and gradients are as before.

    Args:
        stage: batch → loss.
        trial: calls the compiled stage on a batch, and returns the loss.
        mode: how hard the compiler tries. In none does it record CUDA graphs: that is the run's own business (`recorded`).

    Returns:
        The module to train, and a note on how it went.
    """
    if not _OWN_COUNT:
        torch._dynamo.reset()  # this resets the count as well; earlier stages no longer need their compiled code
    options: dict[str, Any] = {"fullgraph": isinstance(stage, Stage), "mode": _MODES[mode], **_OWN_COUNT}
    found: Any = torch.compile(stage, **options)
    buffers = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    began = time.monotonic()
    try:
        trial(found).backward()
        return found, f"compiled in {time.monotonic() - began:.0f} s"
    except Exception as error:  # the compiler may raise anything; the stage still runs without it
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return stage, f"not compiled: {first}"
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        stage.zero_grad()
