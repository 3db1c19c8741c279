"""A loader of samples on disk, read by processes of their own."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from indistill_fx.data.loaders import IndexedLoader
from indistill_fx.data.normalisation import Normaliser
from indistill_fx.data.readers import Readers
from indistill_fx.errors import ConfigError


class DiskLoader(IndexedLoader):
    """Batches read from disk by processes of torch; each sample's augmentation follows from (seed, epoch, index).

    Pixels travel as they are, a byte a value: out of the reading processes, and to a GPU, where they are normalised.

    Args:
        dataset: index -> (image, label); drawn randomness comes from torch's global generator. A sample that cannot be
            read is returned as the ConfigError that says so.
        normalise: of a batch's images; None: the dataset has done it.
        batch_size: samples per batch.
        workers: processes that read; 0 reads in this one.
        seed: of order and augmentation.
        shuffle: a new order in every epoch.
        with_indices: batches carry the sample indices too.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        normalise: Normaliser | None = None,
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        with_indices: bool = False,
    ):
        count: int = len(dataset)  # type: ignore[arg-type]
        super().__init__(count, batch_size=batch_size, seed=seed, shuffle=shuffle, with_indices=with_indices)
        self.dataset, self._normalise = dataset, normalise
        self.figures = normalise.figures if normalise is not None else None
        self._readers = Readers(dataset, workers=workers, seed=seed)

    def to(self, device: torch.device | str) -> Self:
        """Batches go to the device from page-locked memory, and are normalised there."""
        device = torch.device(device)
        if device == self.device:
            return self
        part = copy.copy(self)
        part.device = device
        part._normalise = self._normalise.to(device) if self._normalise is not None else None
        return part

    @property
    def randomness(self) -> str | None:
        """The dataset's own statement; a dataset that makes none may be random."""
        known: str | None = getattr(self.dataset, "randomness", self.unknown)
        return f"{known}{self._seen}" if known is not None else None

    @property
    def unknown(self) -> str:
        """The reason why its random draws are unknown: the dataset does not state them."""
        known = hasattr(self.dataset, "randomness")
        return "" if known else f"it is not known whether a {type(self.dataset).__name__} draws at random"

    @property
    def normalisation(self) -> str | None:
        """Mean, std and peak, if the dataset does not normalise its images itself."""
        return str(self._normalise) if self._normalise is not None else None

    def fingerprint(self) -> str:
        """Digest of the dataset's own fingerprint and the normalisation."""
        digest: str = self.dataset.fingerprint()  # type: ignore[attr-defined]
        views = f" {self._views} {self.seed}" if self._views else ""
        return hashlib.sha256(f"{digest} {self._normalise}{views}".encode()).hexdigest()

    def _batches(self, skipped: int) -> Iterator[tuple[Tensor | None, ...]]:
        parts = [batch_indices[self.rank :: self.world] for _, batch_indices in self._plan(skipped)]
        plan = [[(self._drawn_for, index) for index in part.tolist()] for part in parts]
        read = self._readers.read(plan, pinned=self.device.type == "cuda")
        for indices, batch in zip(parts, read, strict=True):
            if isinstance(batch, ConfigError):
                raise batch
            images, labels = (
                part.to(self.device, non_blocking=True) if isinstance(part, Tensor) else part for part in batch
            )
            yield self._batch(self._normalise(images) if self._normalise else images, labels, indices)
