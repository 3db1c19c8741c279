"""Values from files of a run, which may hold anything."""

from __future__ import annotations

from math import isfinite
from typing import Any


def finite(value: object) -> float | None:
    """A finite number; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if isfinite(value) else None
    except OverflowError:
        return None


def listed(value: object) -> list[Any]:
    """A list; an empty one where it is none."""
    return value if isinstance(value, list) else []


def mapped(value: object) -> dict[str, Any]:
    """A dict; an empty one where it is none."""
    return value if isinstance(value, dict) else {}
