"""Loaders of the user's own, by `file.py:make_loaders`: what the function is given, and what it must return."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from indistill_fx.batch import inputs_and_labels
from indistill_fx.data.dataset import Data, DataOptions
from indistill_fx.data.foreign import repeatable
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.normalisation import Normalisation
from indistill_fx.errors import ConfigError
from indistill_fx.system.nested import tensors_of
from indistill_fx.system.user_code import load_object, neighbours, staying

_ALWAYS = ("batch_size", "seed", "workers", "limit", "augment")
_IGNORED = -100
"""The label of a sample that does not count, as in `torch.nn.functional.cross_entropy`."""
_PICTURES = ("size", "channels", "mean", "std", "cache")


def open_user_loaders(spec: str, options: DataOptions) -> Data:
    """The loaders that a function of the user's own returns.

    Raises:
        ConfigError: it is not a function, has no parameter for something that was asked for, returns no loaders, or batches without
            inputs or with labels beyond the classes.
    """
    function = load_object(spec)
    if not callable(function):
        raise ConfigError(
            f"{spec!r} is not a function.", where=spec, got=type(function).__name__, expected="a function"
        )
    given, notes = _arguments(spec, inspect.signature(function).parameters, options)
    with neighbours(spec.rpartition(":")[0]), staying(spec):
        result = function(**given)
    if isinstance(result, Data):
        return result
    if isinstance(result, (tuple, list)) and len(result) == 2:
        result = {"train": result[0], "test": result[1]}
    if not isinstance(result, Mapping) or not {"train", "test"} <= result.keys():
        raise ConfigError(
            f"{spec!r} returned a value of type {type(result).__name__}, not loaders.",
            where=spec,
            got=type(result).__name__,
            expected="(train, test), a dict with train and test, or Data",
        )
    loaders = {
        key: repeatable(loader, options.seed, f"{key} loader of {spec!r}")
        for key in ("train", "test", "train_plain")
        if (loader := result.get(key)) is not None
    }
    classes = tuple(result.get("classes", getattr(getattr(result["train"], "dataset", None), "classes", ())))
    with staying(spec):
        _first_batch(spec, "train", loaders["train"], classes)
        size, labels = _first_batch(spec, "test", loaders["test"], classes)
    plain = loaders.get("train_plain", loaders["train"])
    figures = _figures(spec, result.get("normalisation"), size)
    for loader in loaders.values():
        loader.figures = figures
    return Data(
        loaders["train"], plain, loaders["test"], classes, size, figures, labelled=labels is not None, notes=notes
    )


def _figures(spec: str, given: Any, size: tuple[int, ...]) -> Normalisation | None:
    """What the function says that its images are normalised by."""
    if given is None:
        return None
    try:
        mean, std = (tuple(float(value) for value in part) for part in given)
    except (TypeError, ValueError):
        mean, std = (), ()
    if not mean or len(mean) != len(std) or min(std) <= 0 or (len(size) == 3 and len(mean) != size[0]):
        raise ConfigError(
            f"{spec!r} says that its images are normalised by {str(given)[:60]}.",
            where=spec,
            got=str(given)[:60],
            expected="`normalisation`: (mean, std), a number for every channel each, of values from 0 to 1",
        )
    return mean, std


def _arguments(
    spec: str, parameters: Mapping[str, inspect.Parameter], options: DataOptions
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the function is given; and what it has no parameter for, in words."""
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    asked = {name: value for name in _PICTURES if (value := getattr(options, name)) is not None}
    for name in asked:
        if name not in parameters and not anything:
            raise ConfigError(
                f"{spec!r} has no parameter `{name}`, so the option cannot change how its loaders prepare images.",
                where=name,
                got=asked[name],
                hint=f"Leave --{name} out, or give the function a parameter `{name}`.",
            )
    offered = {name: getattr(options, name) for name in _ALWAYS} | asked
    left_out = [
        f"{spec} has no parameter `{name}`, so the option has no effect: the function decides {meaning}."
        for name, wanted, meaning in (
            ("limit", options.limit is not None, "how many samples there are"),
            ("workers", options.workers > 0, "how many processes read"),
            ("augment", not options.augment, "what is drawn at random"),
        )
        if wanted and name not in parameters and not anything
    ]
    return {name: value for name, value in offered.items() if name in parameters or anything}, tuple(left_out)


def _first_batch(
    spec: str, key: str, loader: EpochLoader, classes: tuple[str, ...]
) -> tuple[tuple[int, ...], Tensor | None]:
    """The size of one input, and the labels of the first batch; a ConfigError where it cannot be right."""
    batch = next(iter(loader))
    found, labels = (
        ({}, None) if not tensors_of(batch) else inputs_and_labels(batch, where=f"The {key} loader of {spec!r}")
    )
    inputs = next((value for value in found.values() if value.ndim), None)
    if inputs is None:
        raise ConfigError(
            f"{spec!r}: a batch of the {key} loader is a {type(batch).__name__} without inputs that are tensors.",
            where=spec,
            got=type(batch).__name__,
            expected="(inputs, labels), or a dict of inputs by name with labels, of tensors",
        )
    _check_classes(spec, key, labels, classes)
    return tuple(inputs.shape[1:]), labels


def _check_classes(spec: str, key: str, labels: Tensor | None, classes: tuple[str, ...]) -> None:
    if labels is None or labels.is_floating_point() or labels.numel() != len(labels):
        return  # labels of another form are checked by the task
    known = labels[labels != _IGNORED].long()
    if not known.numel():
        return
    low, high = (int(value) for value in known.aminmax())
    if low < 0 or (classes and high >= len(classes)):
        wrong = low if low < 0 else high
        raise ConfigError(
            f"{spec!r}: label {wrong} is out of range, in the first batch of the {key} loader.",
            where=spec,
            got=wrong,
            expected=f"0 to {len(classes) - 1}" if classes else "0 or more",
            hint="Let labels count the classes from 0.",
        )
