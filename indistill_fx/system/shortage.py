"""What the machine lacks or refuses, told apart from faults of ours: memory, disk space, open files, permissions."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from indistill_fx.errors import IndistillError, first_lines

_SPACE = "Free some space"
_FILES = "Let a process open more files (ulimit -n 4096)"
_ACCESS = "Make the place readable and writable, or name another"
_DISK = "Check the disk or network drive"
_HINTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _SPACE),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), _ACCESS),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO), _DISK),
    errno.EISDIR: "Move the folder of that name away",
}
_IN_TEXT = re.compile(r"os error (\d+)")
"""How libraries written in Rust (safetensors) tell the system's number."""
_FULL = 1 << 16
"""Bytes: with fewer left, a disk is full."""


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
    number = _number(error)
    return _HINTS.get(number, "") or ("Go to a folder that exists" if number and _is_nowhere() else "")


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


@contextmanager
def instead_of_any(replacement: IndistillError, *, filled: Path | None = None) -> Iterator[None]:
    """As `errors.instead_of` for every exception; where the machine is at fault, the hint says what to do about that.

    Args:
        replacement: our error, with the hint for all other faults.
        filled: a folder that the block writes files to. Libraries that cut their files short on a full disk fail later, for other reasons.
    """
    try:
        yield
    except IndistillError:
        raise
    except Exception as error:
        is_full = filled is not None and shutil.disk_usage(filled).free < _FULL
        reason = f"{os.strerror(errno.ENOSPC)}." if is_full else first_lines(error)
        remedy = _SPACE if is_full else advice(error)
        raise type(replacement)(
            f"{replacement.message}: {reason}",
            where=replacement.where,
            hint=f"{remedy}, and try again." if remedy else replacement.hint,
        ) from error


def lost_folder(path: Path) -> Path | None:
    """The outermost folder of a path that is not there; None if all are."""
    return next((folder for folder in reversed(path.parents) if not folder.exists()), None)


def home() -> Path | None:
    """The user's home folder; None where there is none (no HOME, and an unknown user, as in containers)."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def _number(error: BaseException) -> int:
    """The system's number of an error; 0 if it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = _IN_TEXT.search(str(error))
    return int(found[1]) if found else 0


def _is_nowhere() -> bool:
    """Whether the current folder was removed."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False
