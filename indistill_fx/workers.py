"""Processes that read data, and how one learns that such a process has died."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

from indistill_fx.errors import TrainError

_UNTIL_TOLD = 1.0
"""Seconds for the news of a process's end to arrive."""


@contextmanager
def noticing_dead_readers() -> Iterator[None]:
    """Within the block, the end of a process that reads data is told as such.

    Torch tells it by an exception out of a signal's handler, at whatever place the program is then: reading a batch, but also
    in the middle of a step or of writing a checkpoint.

    Raises:
        TrainError: a reading process ended.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        told = str(_of_a_worker(error)).strip()
        if not re.search(r"DataLoader worker \(pid", told):
            raise
        raise TrainError(
            f"A process that reads the data has died: {told.splitlines()[0]}",
            where="data",
            hint="Often memory ran out: take fewer workers or smaller batches. The last checkpoint is good: go on with "
            "resume=True (--resume).",
        ) from error


def _of_a_worker(error: Exception) -> Exception:
    """What torch says of a process that has died, where the first thing seen of it was its connection that ended.

    Better said here than while a run's end is being written.
    """
    if isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(_UNTIL_TOLD)
    except RuntimeError as later:
        return later
    return error
