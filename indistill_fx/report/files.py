"""Writing a picture or page: all of it or nothing."""

from __future__ import annotations

import os
from pathlib import Path

from indistill_fx.staged import staged


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file at once or not at all.

    Args:
        path: of the file.
        content: text, or the bytes of a picture.

    Raises:
        ConfigError: it cannot be written.
    """
    with staged(Path(path)) as draft:
        draft.write_bytes(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)
