"""Small text files that somebody else may have written: read whole, but only if they are files, and small."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path


class TooLargeError(OSError):
    """The file is larger than any of its kind can be."""


def read_bounded(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a file.

    Args:
        path: of a regular file; of pipes and devices nothing is read, and a pipe is not waited for.
        limit: bytes it may have. No more are read, whatever the file system says of its size.

    Raises:
        OSError: it cannot be read, is no file, or is larger than the limit.
        UnicodeDecodeError: it is not UTF-8.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # a name with a zero byte
        raise OSError(str(error)) from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(22, "it is no regular file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLargeError(27, f"it is larger than {limit >> 20} MiB", str(path))
    return content.decode("utf-8")


def read_lines(path: str | os.PathLike[str], limit: int = 1 << 20) -> Iterator[str]:
    """The lines of a file; one longer than the limit comes in pieces.

    Raises:
        OSError: it cannot be read, or is no file.
    """
    require_regular(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        while line := file.readline(limit):
            yield line


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what would be waited for, or has no end.

    Raises:
        OSError: it is not there, or no regular file.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(22, "it is no regular file", str(path))
