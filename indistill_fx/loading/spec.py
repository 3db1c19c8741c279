"""A model spec: the text that names a model, taken apart.

    model.pt, model.pth                       a module saved whole by torch.save
    model.pt2                                 a program saved by torch.export.save
    models.py:make, package.module:make       a factory or a class in the user's own code
    torchvision:resnet18, timm:resnet10t      a constructor by name
    …?num_classes=10&width=16                 arguments, for the last two rows
    …@weights.safetensors, …@weights.pt       weights to load into it

Nothing of a model file is run, unless it names a package that the user trusts; the user's own code is run, of course.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    pass


MODEL_FORMS = (
    "model.pt, model.pt2, models.py:make_model, package.module:make_model, torchvision:resnet18 or timm:resnet10t"
)
_MODEL_SUFFIXES = (".pt", ".pth", ".pt2", ".bin", ".ckpt")
LARGEST_INPUT = 1 << 28
"""Elements of one input: 1 GiB in float32."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec string, taken apart. Without `name`, `place` is a file."""

    text: str
    place: str
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""


def parse_spec(text: str) -> Spec:
    """Take a spec string apart.

    Raises:
        ConfigError: it has none of the legal forms.

    >>> parse_spec("torchvision:resnet18?num_classes=10@w.pt").arguments
    {'num_classes': 10}
    """
    if not text.strip():
        raise ConfigError(
            "The model spec is empty.", where="model", got=text, expected=MODEL_FORMS, hint=f"Write {MODEL_FORMS}."
        )
    if exists(Path(text)):
        return Spec(text, text)
    left, at, weights = text.rpartition("@")
    if at and (":" in left or left.endswith(_MODEL_SUFFIXES)):
        if not weights:
            raise ConfigError(f"{text!r} names no weights after '@'.", where=text, hint=f"Write {left}@weights.pt.")
    else:
        left, weights = text, ""
    constructor, mark, query = left.partition("?")
    by_library = constructor.startswith(("torchvision:", "timm:"))
    place, colon, name = constructor.partition(":") if by_library else constructor.rpartition(":")
    if not colon:
        if mark:
            hint = f"Arguments are for constructors: {MODEL_FORMS}."
            raise ConfigError(f"{text!r} gives arguments to a file.", where=text, got=query, hint=hint)
        return Spec(text, left, weights=weights)
    if not place or not name:
        raise ConfigError(f"{text!r} names no model.", where=text, expected=MODEL_FORMS, hint=f"Write {MODEL_FORMS}.")
    return Spec(text, place, name, _parse_arguments(query, text) if mark else {}, weights)


def _parse_arguments(query: str, text: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ConfigError(
                f"{text!r}: {part!r} is no argument{' of its own' if key in arguments else ''}.",
                where=text,
                got=part,
                hint="Write name=value, several joined by '&', as in ?num_classes=10&width=16.",
            )
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments


def exists(path: Path) -> bool:
    """Whether the path is there; no name is too odd to be asked for."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero byte
        return False


def is_input_size(value: object) -> bool:
    """Whether a value, perhaps from a file, is the size of an input that fits in memory."""
    if not isinstance(value, (tuple, list)) or not 0 < len(value) <= 16:
        return False
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= LARGEST_INPUT for n in value)
    return whole and math.prod(value) <= LARGEST_INPUT
