"""torch.compile for a stage, where it goes through."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from indistill_fx.stages.stage import Stage

# All stages share one `forward`, and the compiler counts by function: without this it gives up at the ninth stage of a process.
_OWN_COUNT = {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}


def compiled(stage: nn.Module, trial: Callable[[Any], Any]) -> tuple[nn.Module, str]:
    """The stage compiled, if a trial on one batch goes through; else as it is. Buffers and gradients are as before.

    Args:
        stage: batch → loss.
        trial: calls the compiled stage on a batch, and returns the loss.

    Returns:
        The module to train, and a note on how it went.
    """
    found: Any = torch.compile(stage, fullgraph=isinstance(stage, Stage), **_OWN_COUNT)  # type: ignore[call-overload]
    buffers = [(buffer, buffer.clone()) for buffer in stage.buffers()]
    began = time.monotonic()
    try:
        trial(found).backward()
        return found, f"compiled in {time.monotonic() - began:.0f} s"
    except Exception as error:  # whatever the compiler dislikes, the stage itself still runs
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return stage, f"not compiled: {first}"
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        stage.zero_grad()
