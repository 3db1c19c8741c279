"""What is kept of a model beside its weights, in run.json and in the student.json beside a student.py: how to feed it and read it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from indistill_fx.errors import ConfigError
from indistill_fx.loading.input_facts import InputFacts, remember
from indistill_fx.loading.inputs import describe_inputs, example_inputs, parse_input
from indistill_fx.loading.load import Source
from indistill_fx.loading.spec import LARGEST_IN_A_FILE, is_input_size, parse_spec
from indistill_fx.runs.directory import MOST_BYTES
from indistill_fx.system.files import read_json, save_json

FACTS = "student.json"
TRAINED = "student"
"""The kind of a source whose student.json says what data it was trained on."""
LONGEST_TEXT = 200
"""Characters of a key, or of an input's description, in a file."""
_MOST_OUTPUTS = 1024
_MOST_INPUTS = 64
_INSTEAD = "Remove it, and give what it would say: --input, --mean, --std, --logits, --task."


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model.

    Attributes:
        classes: their names by label.
        normalisation: mean and standard deviation per channel.
        logits: key or index of the logits among several outputs.
        task: what its labels mean, as plain values (`evaluation.kept_task`).
    """

    classes: tuple[str, ...]
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None
    logits: str | int | None
    task: Mapping[str, Any] | None


def facts_in(kept: Mapping[str, Any], size: tuple[int, ...]) -> ModelFacts:
    """What a file says of a model whose samples have a size.

    Raises:
        ValueError, TypeError, AttributeError, OverflowError: that is impossible.
    """
    channels = size[0] if len(size) == 3 else None
    return ModelFacts(
        classes=tuple(str(name) for name in kept.get("classes") or ()),
        normalisation=_figures(kept.get("normalisation"), channels),
        logits=_entry(kept.get("logits")),
        task=as_object(kept.get("labels")) or None,
    )


def facts_of(
    classes: Sequence[str] = (),
    normalisation: Any = None,
    *,
    example: Any,
    wanted_size: Sequence[int] | None = None,
    logits: str | int | None = None,
    task: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What student.json holds: example inputs, what is known of the model (see `ModelFacts`), and the height and width that it wants."""
    size = list(wanted_size) if wanted_size else None
    known = {"classes": list(classes), "normalisation": normalisation, "wanted_size": size}
    read = {"logits": logits, "labels": task, "inputs": describe_inputs(example)}
    return (known if classes or normalisation is not None else {}) | {
        name: value for name, value in read.items() if value is not None and value not in ({}, [])
    }


def keep_facts(folder: str | os.PathLike[str], known: Mapping[str, Any]) -> None:
    """Leave them in the student.json beside a student.py; one of an earlier student is replaced, or removed if nothing is known now."""
    if known:
        save_json(Path(folder) / FACTS, known)
    else:
        (Path(folder) / FACTS).unlink(missing_ok=True)


def with_facts(source: Source) -> Source:
    """A source, and what student.json says of it if it is a student.py beside one.

    Raises:
        ConfigError: student.json is damaged.
    """
    place = Path(parse_spec(source.spec).place)
    file = place.with_name(FACTS)
    if place.name != "student.py" or not file.exists():
        return source
    try:
        kept = as_object(read_json(file, MOST_BYTES))
        inputs = inputs_in(kept, file, hint=_INSTEAD)
        size, wanted = _sizes_in(kept)
        facts = facts_in(kept, size or ())
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError, KeyError) as error:
        raise ConfigError(
            f"{file}, which says how the student is fed and read, is damaged: {str(error)[:200]}.",
            where=str(file),
            hint=_INSTEAD,
        ) from error
    found = replace(source, logits=facts.logits, task=facts.task, example_inputs=inputs)
    if not facts.classes and facts.normalisation is None:
        return found
    remember(source.module, InputFacts(size, facts.normalisation, wanted, facts.normalisation, facts.classes))
    return replace(
        found,
        kind=TRAINED,
        input_size=size,
        normalisation=facts.normalisation,
        wanted_size=wanted,
        wanted_normalisation=facts.normalisation,
        classes=facts.classes,
    )


def inputs_in(kept: Mapping[str, Any], file: Path, *, hint: str) -> Any:
    """Example inputs as a file describes them; None where it does not.

    Raises:
        ConfigError: that is impossible, or too large; `hint` says what to do instead.
    """
    texts = kept.get("inputs")
    if texts is None:
        return None
    reason = f"they are not one to {_MOST_INPUTS} short texts, or too large"
    try:
        listed = isinstance(texts, list) and 0 < len(texts) <= _MOST_INPUTS and all(map(is_short, texts))
        if listed and sum(math.prod(parse_input(text).shape) for text in texts) <= LARGEST_IN_A_FILE:
            return example_inputs(texts)
    except ConfigError as error:
        reason = error.message.rstrip(".")
    raise ConfigError(f"{file} describes impossible inputs: {reason}.", where=str(file), hint=hint)


def as_object(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def is_short(text: object) -> bool:
    """Whether it is a text that may be a key."""
    return isinstance(text, str) and len(text) <= LONGEST_TEXT


def _figures(value: object, channels: int | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation per channel.

    Raises:
        ValueError: the figures are impossible.
    """
    if value is None:
        return None
    mean, std = (tuple(float(number) for number in part) for part in cast("Any", value))
    if len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or not all(number > 0 for number in std):
        raise ValueError(f"a mean {str(mean)[:60]} and a standard deviation {str(std)[:60]}")
    if mean and channels is not None and len(mean) != channels:
        raise ValueError(f"a mean of {len(mean)} channels for images of {channels}")
    return (mean, std) if mean else None


def _entry(value: Any) -> str | int | None:
    """Key or index of the logits among several outputs.

    Raises:
        ValueError: it is neither.
    """
    if value is None or is_short(value) or (type(value) is int and 0 <= value < _MOST_OUTPUTS):
        return cast("str | int | None", value)
    raise ValueError(f"logits at {str(value)[:60]}")


def _sizes_in(kept: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, tuple[int, int] | None]:
    """The size of a sample, and the height and width that the model wants, as far as they are known; raises any of several errors.

    Earlier files have one entry for both, `input_size`.
    """
    texts: Any = kept.get("inputs")
    size: Any = kept.get("input_size") or (parse_input(texts[0]).shape if texts else None)
    wanted: Any = kept.get("wanted_size") or (kept.get("input_size") or ())[1:]
    for sides in filter(None, (size, wanted)):
        if not is_input_size(tuple(sides), most=LARGEST_IN_A_FILE):
            raise ValueError(f"an input of size {str(sides)[:60]}")
    height_and_width = (int(wanted[0]), int(wanted[1])) if len(wanted) == 2 else None
    return tuple(size) if size else None, height_and_width
