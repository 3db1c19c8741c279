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
    """The entry called `logits` or, without one, `out`; the outputs themselves if there is neither.

    Args:
        outputs: what a model returned, or the nodes of a graph in that structure.
    """
    named = entries(outputs) or {}
    return next((named[name] for name in MAIN_NAMES if named.get(name) is not None), outputs)
