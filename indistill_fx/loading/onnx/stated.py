"""What an ONNX file that this package exported states of its own data: normalisation and class names."""

from __future__ import annotations

import json
import math
from typing import Any

import onnx

from indistill_fx.errors import ConfigError
from indistill_fx.graph.preprocess import Preprocess

Figures = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per channel."""


def stated_in(model: onnx.ModelProto, channels: int | None, where: str) -> tuple[Figures | None, tuple[str, ...]]:
    """Mean and deviation per channel of pixels from 0 to 1, and class names; nothing of files that others wrote.

    Args:
        model: the file's.
        channels: of its images, without `preprocess_in`; None: it takes none.
        where: its name, for messages.

    Raises:
        ConfigError: what it states cannot be.
    """
    entries = _entries(model)
    try:
        classes = tuple(str(name) for name in json.loads(entries.get("classes", "[]")))
        if built_in := preprocess_in(model):
            return (built_in.mean, built_in.std), classes
        if "mean" not in entries:
            return None, classes
        return (_numbers(entries["mean"], channels), _numbers(entries["std"], channels, least=0.0)), classes
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"`{where}` states an impossible normalisation or impossible class names in its metadata.",
            where=where,
            got=str(error)[:100],
            hint="Export it again.",
        ) from error


def preprocess_in(model: onnx.ModelProto) -> Preprocess | None:
    """What a file of this package's does first with the pixels that it takes (`export --preprocess`); None: it takes none.

    Raises:
        ConfigError: what it states cannot be.
    """
    return Preprocess.from_metadata(_entries(model))


def _entries(model: onnx.ModelProto) -> dict[str, str]:
    """The metadata of a file that this package exported; of another, nothing."""
    entries = {entry.key: entry.value for entry in model.metadata_props}
    return entries if "indistill_fx" in entries else {}


def _numbers(text: str, channels: int | None, *, least: float = -math.inf) -> tuple[float, ...]:
    """One number for each channel."""
    given: Any = json.loads(text)
    numbers = tuple(float(number) for number in given)
    if len(numbers) not in (1, channels) or not all(math.isfinite(number) and number > least for number in numbers):
        raise ValueError(text)
    return numbers
