"""Loaders of the user's own: checked, and made to give the same batches again in the same epoch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from indistill_fx.batch import inputs_and_labels, samples_of
from indistill_fx.data.dataset import Data, DataOptions
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.errors import ConfigError
from indistill_fx.system.random_state import OwnRandomness, seed_from
from indistill_fx.system.user_code import load_object


def open_user_loaders(spec: str, options: DataOptions) -> Data:
    """The loaders that a function of the user's own (`file.py:make_loaders`) returns."""
    function = load_object(spec)
    if not callable(function):
        raise ConfigError(f"{spec!r} is no function.", where=spec, got=type(function).__name__, expected="a function")
    offered = {key: getattr(options, key) for key in ("batch_size", "workers", "seed", "limit", "augment")}
    wanted = inspect.signature(function).parameters
    result = function(**{key: value for key, value in offered.items() if key in wanted})
    if isinstance(result, Data):
        return result
    if isinstance(result, (tuple, list)) and len(result) == 2:
        result = {"train": result[0], "test": result[1]}
    if not isinstance(result, Mapping) or not {"train", "test"} <= result.keys():
        raise ConfigError(
            f"{spec!r} returned a {type(result).__name__}.",
            where=spec,
            got=type(result).__name__,
            expected="(train, test), a dict with train and test, or Data",
        )
    loaders = {key: _checked(spec, key, result[key], options.seed) for key in ("train", "test")}
    plain = result.get("train_plain")
    loaders["train_plain"] = loaders["train"] if plain is None else _checked(spec, "train_plain", plain, options.seed)
    classes = tuple(result.get("classes", getattr(getattr(result["train"], "dataset", None), "classes", ())))
    size = _first_batch(spec, loaders["test"], classes)
    return Data(loaders["train"], loaders["train_plain"], loaders["test"], classes, size, None)


def _checked(spec: str, key: str, loader: Any, seed: int) -> EpochLoader:
    if isinstance(loader, EpochLoader):
        return loader
    if not hasattr(loader, "__iter__") or not hasattr(loader, "__len__") or hasattr(loader, "__next__"):
        raise ConfigError(
            f"{spec!r}: the {key} loader is a {type(loader).__name__}, which cannot be iterated once per epoch.",
            where=spec,
            got=type(loader).__name__,
            expected="an iterable with a length, such as torch.utils.data.DataLoader",
        )
    if len(loader) == 0:
        raise ConfigError(f"{spec!r}: the {key} loader has no batches.", where=spec, got=0, expected="at least 1")
    return ForeignLoader(loader, seed=seed)


def _first_batch(spec: str, loader: EpochLoader, classes: tuple[str, ...]) -> tuple[int, ...]:
    """The size of one input; a ConfigError where the batch is not inputs and labels."""
    batch = next(iter(loader))
    found, labels = inputs_and_labels(batch)
    inputs = next(iter(found.values()), None)
    if inputs is None or labels is None or labels.dtype != torch.int64 or labels.ndim != 1:
        raise ConfigError(
            f"{spec!r}: a batch of the test loader is a {type(batch).__name__} without inputs and int64 labels.",
            where=spec,
            got=type(batch).__name__,
            expected="(inputs, labels) or a dict with labels, of tensors; labels int64 (batch,)",
        )
    worst = int(labels.max()) if int(labels.min()) >= 0 else int(labels.min())
    if worst < 0 or (classes and worst >= len(classes)):
        raise ConfigError(
            f"{spec!r}: label {worst} is out of range.", where=spec, got=worst, expected=f"0 to {len(classes) - 1}"
        )
    return tuple(inputs.shape[1:])


def repeatable(loader: Iterable[Any], seed: int, what: str) -> EpochLoader:
    """The loader if its epochs can be repeated, else wrapped so that they can.

    Raises:
        ConfigError: it can be iterated only once, has no length, or no batches.
    """
    if isinstance(loader, EpochLoader):
        return loader
    if hasattr(loader, "__next__") or not hasattr(loader, "__iter__") or not hasattr(loader, "__len__"):
        raise ConfigError(
            f"The {what} is a {type(loader).__name__}, which cannot be gone through once per epoch.",
            where=what,
            got=type(loader).__name__,
            expected="an iterable with a length",
            hint="Give a torch.utils.data.DataLoader, a list of batches, or a loader of ifx.data.open_data.",
        )
    wrapped = ForeignLoader(loader, seed=seed)
    if not len(wrapped):
        raise ConfigError(f"The {what} has no batches.", where=what, got=0, expected="at least 1")
    return wrapped


class ForeignLoader(EpochLoader):
    """A user's own loader made repeatable: its randomness (torch, numpy, random) is seeded by (seed, epoch).

    Skipped batches are read and dropped; a shard is cut out of each whole batch.

    Args:
        loader: anything with a length that can be iterated again and again.
        seed: of its randomness.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int = 0):
        super().__init__(seed=seed)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def _batches(self, skipped: int) -> Iterator[Any]:
        parts = (self.loader, getattr(self.loader, "sampler", None), getattr(self.loader, "batch_sampler", None))
        for tell in (getattr(part, "set_epoch", None) for part in parts):
            if tell is not None:
                tell(self.epoch)
        for number, part in enumerate(parts):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed_from(self.seed, self.epoch, number))
        randomness = OwnRandomness(seed_from(self.seed, self.epoch))
        with randomness.lent():
            iterator = iter(self.loader)
        for number in range(len(self)):
            with randomness.lent():
                batch = next(iterator, _END)
            if batch is _END:
                raise ConfigError(
                    f"The loader says it has {len(self)} batches and ended after {number}.",
                    where="loader",
                    got=number,
                    expected=len(self),
                    hint="Let its __len__ say how many batches an epoch has.",
                )
            if number >= skipped:
                yield batch if self.world == 1 else samples_of(batch, slice(self.rank, None, self.world))


_END = object()
