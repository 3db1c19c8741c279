"""What an ONNX file that this package exported states of itself: normalisation, class names, the task, and the output that it is about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from indistill_fx.errors import ConfigError
from indistill_fx.graph.preprocess import Preprocess
from indistill_fx.system.files import parse_json

Figures = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation per channel."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What a file states; of files that others wrote, nothing.

    Attributes:
        normalisation: mean and deviation per channel of pixels from 0 to 1.
        classes: their names by label.
        logits: name of the output that holds the logits, where there are several.
        task: what its labels mean, as plain values (`evaluation.kept_task`).
    """

    normalisation: Figures | None = None
    classes: tuple[str, ...] = ()
    logits: str | None = None
    task: Mapping[str, Any] | None = None


def stated_in(model: onnx.ModelProto, channels: int | None, where: str) -> Stated:
    """What a file states.

    Args:
        model: the file's.
        channels: of its images, without `preprocess_in`; None: it takes none.
        where: its name, for messages.

    Raises:
        ConfigError: what it states cannot be.
    """
    entries = _entries(model)
    try:
        task = parse_json(entries.get("task", "{}"))
        if not isinstance(task, dict):
            raise TypeError("a task that is no object")  # noqa: TRY301
        return Stated(
            _figures(model, entries, channels),
            tuple(str(name) for name in parse_json(entries.get("classes", "[]"))),
            entries.get("logits"),
            task or None,
        )
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"`{where}` states an impossible normalisation, task or impossible class names in its metadata.",
            where=where,
            got=str(error)[:100],
            hint="Export it again.",
        ) from error


def _figures(model: onnx.ModelProto, entries: Mapping[str, str], channels: int | None) -> Figures | None:
    if built_in := preprocess_in(model):
        return built_in.mean, built_in.std
    if "mean" not in entries:
        return None
    return _numbers(entries["mean"], channels), _numbers(entries["std"], channels, least=0.0)


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
    given: Any = parse_json(text)
    numbers = tuple(float(number) for number in given)
    if len(numbers) not in (1, channels) or not all(math.isfinite(number) and number > least for number in numbers):
        raise ValueError(text)
    return numbers
