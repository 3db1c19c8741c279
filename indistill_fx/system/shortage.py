"""What the machine lacks or refuses, told apart from faults of ours: memory, disk space, open files, permissions."""

from __future__ import annotations

import errno
import os

_SPACE = "Free some space"
_FILES = "Let a process open more files (ulimit -n 4096)"
_ACCESS = "Make the place readable and writable, or name another"
_DISK = "Check the disk or network drive"
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ACCESS),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), _DISK),
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a device's, or that of torch on a CPU, which raises a plain RuntimeError.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."))
    True
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    own = type(error).__name__ == "OutOfMemoryError"
    return own or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in ("allocate memory", "bad_alloc"))
    )


def advice(error: Exception) -> str:
    """What to do about an error of the machine; empty for every other error.

    >>> advice(PermissionError(13, "Permission denied", "x"))
    'Make the place readable and writable, or name another'
    """
    if is_out_of_memory(error):
        return "Take smaller batches (--batch-size), smaller images (--size) or fewer samples (--limit)"
    if not isinstance(error, OSError):
        return ""
    return _HINTS.get(error.errno or 0, "") or ("Go to a folder that exists" if _is_nowhere() else "")


def refusal(error: Exception) -> str:
    """What the machine refused, as a sentence without a full stop.

    >>> refusal(OSError(28, "No space left on device", "plan.json"))
    'The system refused: no space left on device: plan.json'
    """
    if is_out_of_memory(error):
        return "There is not enough memory"
    reason = (isinstance(error, OSError) and error.strerror) or str(error)
    place = f": {error.filename}" if isinstance(error, OSError) and error.filename is not None else ""
    return f"The system refused: {reason[:1].lower()}{reason[1:]}{place}"


def _is_nowhere() -> bool:
    """Whether the current folder was removed."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False
