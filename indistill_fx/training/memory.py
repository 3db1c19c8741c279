"""The errors for a device, or a machine, that has no memory left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from indistill_fx.errors import TrainError
from indistill_fx.system.nested import tensors_of
from indistill_fx.system.shortage import is_out_of_memory


@contextmanager
def noticing_full_memory(stage: str, batch: Any, *, accumulate: int, kept: bool) -> Iterator[None]:
    """Within the block, a device that runs out of memory is an error that says what would fit.

    Args:
        stage: the name of the stage that trains.
        batch: what it trains on.
        accumulate: batches per optimiser step, as the run has it.
        kept: whether there is a checkpoint to continue from.

    Raises:
        TrainError: the device is out of memory; names stage and batch size.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        size = next((len(value) for value in tensors_of(batch) if value.ndim), 0)
        smaller = f"Take smaller batches and more of them a step: of {size // 2}, with --accumulate {2 * accumulate}."
        again = " The last checkpoint is intact." if kept else ""
        raise TrainError(
            f"The device has no memory left for stage `{stage}` with batches of {size}.{again}",
            where=stage,
            got=size,
            hint=smaller if size > 1 else "Take a smaller student, smaller inputs, or --mixed-precision bf16.",
        ) from error


@contextmanager
def noticing_full_memory_elsewhere() -> Iterator[None]:
    """Within the block, a device that runs out of memory outside of a training step is an error too.

    Raises:
        TrainError: it did.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise TrainError(
            "The device has no memory left outside of a training step: for tracing, the teacher's features or validation.",
            where="device",
            hint="Take smaller batches (--batch-size), --mixed-precision bf16, or --no-graphs: a recorded step keeps the memory it ran in."
            " The last checkpoint, if there is one, is intact.",
        ) from error
