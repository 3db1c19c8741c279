"""Processes that read data, and how one learns that such a process has died."""

from __future__ import annotations

import time

_UNTIL_TOLD = 1.0
"""Seconds for the news of a process's end to arrive."""


def of_a_worker(error: Exception) -> Exception:
    """What torch says of a process that has died, where the first thing seen of it was its connection that ended.

    Torch says it by an exception out of a signal's handler, at whatever place the program is then; better here than while a
    run's end is being written.
    """
    if isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(_UNTIL_TOLD)
    except RuntimeError as later:
        return later
    return error
