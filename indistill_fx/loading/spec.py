"""A model spec: the text that names a model, taken apart.

    model.pt, model.pth                       a module saved whole by torch.save
    model.pt2                                 a program saved by torch.export.save
    model.onnx, model.onnx?input=3x320x320    an ONNX file, converted; for this input size
    onnxruntime:model.onnx?taps=NAME,NAME     an ONNX file as a black box, with tensors of it that can be learned
    models.py:make, package.module:make       a factory or a class in the user's own code
    torchvision:resnet18, timm:resnet10t      a constructor by name
    folder                                    a model of transformers or timm, as save_pretrained or save_for_hf wrote it
    …?num_classes=10&width=16                 arguments, for the last three rows; of a folder, entries of its configuration
    …@weights.safetensors, …@weights.pt       weights to load into it
    checkpoint.pt?entry=ema, …@checkpoint.pt?entry=ema  what a checkpoint holds under this key, or under several: entry=callbacks/ema

Nothing of a model file is run, unless it names a package that the user trusts; the user's own code is run, of course.
"""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from indistill_fx.errors import ConfigError

MODEL_FORMS = (
    "model.pt, model.pt2, model.onnx, a model's folder, "
    "models.py:make_model, package.module:make_model, torchvision:resnet18 or timm:resnet10t"
)
_RUNTIME, _ENTRY = "onnxruntime:", "?entry="
_MODEL_SUFFIXES = (".pt", ".pth", ".pt2", ".onnx", ".bin", ".ckpt")
_IN_A_FILE = re.compile(r"(?P<place>.*?\.py):(?P<name>\w*)(?:(?P<mark>\?)(?P<query>.*))?", re.DOTALL)
LARGEST_INPUT = 1 << 28
"""Elements of one input: 1 GiB in float32."""
LARGEST_IN_A_FILE = 1 << 26
"""Where a file asks for them and not the user: 256 MiB."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec string, taken apart. Without `name`, `place` is a file or a folder. `entry` is a key in the checkpoint that is named last."""

    text: str
    place: str
    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""
    entry: str = ""


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
    if os.path.exists(text):  # unlike pathlib, this is False for a name that is too long or holds a zero byte
        return Spec(text, text)
    left, weights = _split_weights(text) if not text.startswith(_RUNTIME) else (text, "")
    weights, entry = _split_entry(weights)
    if os.path.exists(left):
        return Spec(text, left, weights=weights, entry=entry)
    place, colon, name, mark, query = _split_constructor(left)
    if not colon:
        if mark and (place.endswith(".onnx") or os.path.isdir(place)):
            return Spec(text, place, arguments=_parse_arguments(query, text), weights=weights, entry=entry)
        if (parts := _split_entry(left))[1] and not weights:
            return Spec(text, parts[0], entry=parts[1])
        if mark:
            there = os.path.exists(place)
            hint = f"Arguments are for constructors and folders: {MODEL_FORMS}." if there else "Check the path."
            message = f"{text!r} gives arguments to a file." if there else f"There is no file or folder `{place}`."
            raise ConfigError(message, where=text, got=query, hint=hint)
        return Spec(text, left, weights=weights, entry=entry)
    if not place or not name:
        raise ConfigError(f"{text!r} names no model.", where=text, expected=MODEL_FORMS, hint=f"Write {MODEL_FORMS}.")
    return Spec(text, place, name, _parse_arguments(query, text) if mark else {}, weights, entry)


def _split_weights(text: str) -> tuple[str, str]:
    """Split a spec into model and weights. Folder names may contain an `@`, so an existing file decides."""
    parts = [(text[:k], text[k + 1 :]) for k, character in enumerate(text) if character == "@"]
    parts = [(left, weights) for left, weights in parts if _may_be_model(left)]
    if not parts:
        return text, ""
    left, weights = next((part for part in parts if part[1] and os.path.exists(_split_entry(part[1])[0])), parts[-1])
    if not weights:
        raise ConfigError(f"{text!r} names no weights after '@'.", where=text, hint=f"Write {left}@weights.pt.")
    return left, weights


def _may_be_model(text: str) -> bool:
    return ":" in text or text.endswith(_MODEL_SUFFIXES) or os.path.isdir(text.partition("?")[0])


def _split_entry(text: str) -> tuple[str, str]:
    """Split the name of a checkpoint into file and entry; a file of this name decides."""
    file, mark, entry = text.rpartition(_ENTRY)
    if mark and not entry:
        raise ConfigError(f"{text!r} names no entry after '='.", where=text, hint=f"Write {file}{_ENTRY}ema.")
    return (file, entry) if mark and not os.path.exists(text) else (text, "")


def _split_constructor(text: str) -> tuple[str, str, str, str, str]:
    """Split a spec into place, name and arguments. Folder names may contain a `?`, so a `.py` before it decides."""
    found = None if text.startswith(("torchvision:", "timm:", _RUNTIME)) else _IN_A_FILE.fullmatch(text)
    if found is not None:
        return found["place"], ":", found["name"], found["mark"] or "", found["query"] or ""
    constructor, mark, query = text.partition("?")
    return *constructor.partition(":"), mark, query


def _parse_arguments(query: str, text: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in query.split("&"):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in arguments:
            raise ConfigError(
                f"{text!r}: {part!r} is not an argument{' of its own' if key in arguments else ''}.",
                where=text,
                got=part,
                hint="Write name=value, several joined by '&', as in ?num_classes=10&width=16.",
            )
        try:
            arguments[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            arguments[key] = value
    return arguments


def is_input_size(value: object, *, most: int = LARGEST_INPUT) -> bool:
    """Whether a value, perhaps from a file, is the size of an input that fits in memory."""
    if not isinstance(value, (tuple, list)) or not 0 < len(value) <= 16:
        return False
    valid = all(isinstance(n, int) and not isinstance(n, bool) and 0 < n <= most for n in value)
    return valid and math.prod(value) <= most
