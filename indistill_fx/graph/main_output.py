"""Which entry of a model's output holds the logits if nobody named it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

MAIN_NAMES = ("logits", "out")
"""Hugging Face's and torchvision's name of the main output."""


def entries(outputs: Any) -> Mapping[str, Any] | None:
    """Name → entry of a dict, a named tuple or a dataclass; None of anything else."""
    if isinstance(outputs, Mapping):
        return outputs
    if hasattr(outputs, "_fields"):
        return dict(zip(outputs._fields, outputs, strict=True))
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        return {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    return None


def main_output(outputs: Any) -> Any:
    """The entry called `logits` or, without one, `out`; else the only one; the outputs themselves if there are several.

    Args:
        outputs: what a model returned, or the nodes of a graph in that structure.
    """
    named = entries(outputs)
    if named is None:
        return outputs[0] if isinstance(outputs, (tuple, list)) and len(outputs) == 1 else outputs
    there = {name: entry for name, entry in named.items() if entry is not None}
    if len(there) == 1:
        return next(iter(there.values()))
    return next((there[name] for name in MAIN_NAMES if name in there), outputs)


def as_key(wanted: str | int, outputs: Any) -> str | int:
    """A key as the outputs have it: a text of digits may be a place, and a number a key of digits.

    >>> as_key("1", ("x", "y")), as_key(1, {"1": "x"}), as_key("1", {"1": "x"})
    (1, '1', '1')
    """
    named = entries(outputs) or {}
    other = int(wanted) if isinstance(wanted, str) and wanted.isdecimal() else str(wanted)
    return other if wanted not in named and (other in named or isinstance(other, int)) else wanted
