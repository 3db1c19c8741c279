"""Write beside the target, and give the result its name only when it is good."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from indistill_fx.errors import ConfigError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place for the draft beside the target; what lies there moves to the target's name if the block succeeds."""
    if target.is_dir() or not target.name:
        raise ConfigError(f"Cannot write `{target}`: it is a directory.", where=str(target), hint="Name a file in it.")
    try:
        holder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise ConfigError(
            f"Cannot write `{target}`: {error.strerror or error}: `{target.parent}`.", where=str(target),
            hint="Give a path in a directory that exists and may be written.",
        ) from error  # fmt: skip
    try:
        with holder as directory:
            draft = Path(directory) / target.name
            yield draft
            # Weights first: the model's own file is what others look for, so it comes last.
            for part in sorted(Path(directory).iterdir(), key=lambda part: part == draft):
                os.replace(part, target.parent / part.name)
    except OSError as error:
        raise ConfigError(
            f"Cannot write `{target}`: {error.strerror or error}.", where=str(target),
            hint="Free some space, or give another path; an older file there is as it was.",
        ) from error  # fmt: skip
