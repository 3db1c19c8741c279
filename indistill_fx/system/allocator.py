"""Freed memory, kept for the next step instead of given back to the system.

glibc gives large blocks back as soon as they are freed, and requests them again, page by page, at every step of a training loop: on the
paper's pair some 4,000 page faults a step, which took half of its time. On a CPU a run keeps them; when it ends they go back.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # the constants M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_ALWAYS = {_MMAP_THRESHOLD: 2**30, _TRIM_THRESHOLD: -1}
_AFTER = {_MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}  # the largest values that glibc's dynamic thresholds reach
_OWN_WISHES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def freed_memory_kept(*, enabled: bool = True) -> Iterator[bool]:
    """Within the block freed memory stays with the process, but for single blocks of 1 GiB and more.

    Only with glibc, and only where none of its environment variables says something about it already.

    Yields:
        Whether it is so.
    """
    kept = enabled and platform.libc_ver()[0] == "glibc" and not any(os.environ.get(name) for name in _OWN_WISHES)
    if not kept:
        yield False
        return
    libc = ctypes.CDLL(None)
    try:
        yield all([libc.mallopt(key, value) == 1 for key, value in _ALWAYS.items()])
    finally:
        for key, value in _AFTER.items():
            libc.mallopt(key, value)
        libc.malloc_trim(0)
