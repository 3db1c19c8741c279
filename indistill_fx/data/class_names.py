"""Class names as users write them: in a list, or in a file."""

from __future__ import annotations

from pathlib import Path

from indistill_fx.errors import ConfigError
from indistill_fx.system.files import parse_json, read_bounded

_MOST_BYTES = 1 << 24


def read_classes(text: str) -> tuple[int, ...] | tuple[str, ...]:
    """Class names or numbers: `cat,dog`, `3,0`, or a file with one a line or with a list in JSON.

    Returns:
        Whole numbers, if all of them are; else names.

    Raises:
        ConfigError: the file cannot be read, or is no such list.
    """
    path = Path(text)
    in_file = bool(path.suffix) or "/" in text
    entries = _read(path) if in_file else [part.strip() for part in text.split(",")]
    if not entries or not all(entries):
        raise ConfigError(
            f"{text!r} names no classes.",
            where="classes",
            got=text,
            hint="Write cat,dog or 3,0, or give a file with one class per line.",
        )
    return tuple(map(int, entries)) if all(entry.isdecimal() for entry in entries) else tuple(entries)


def _read(path: Path) -> list[str]:
    try:
        content = read_bounded(path, _MOST_BYTES)
        if path.suffix != ".json":
            return [line.strip() for line in content.splitlines() if line.strip()]
        found = parse_json(content)
    except (OSError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"The classes in {str(path)!r} cannot be read: {reason}.",
            where=str(path),
            got=reason,
            hint="Give a text file with one class per line.",
        ) from error
    if not isinstance(found, list) or not all(isinstance(entry, (str, int)) for entry in found):
        raise ConfigError(f"{str(path)!r} is not a list of class names.", where=str(path), expected='["cat", "dog"]')
    return [str(entry).strip() for entry in found]
