"""Loaders whose batches follow from (seed, epoch) alone: a resumed run sees exactly what the first would have.

All iterate batches (images, labels) or (images, labels, indices) and leave the global random state as they found it.
"""

from __future__ import annotations

import copy
import hashlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.system.random_state import generator_from, seed_from

_UNTIL_TOLD = 1.0
"""Seconds for the news of a process's end to arrive."""


@contextmanager
def noticing_dead_readers() -> Iterator[None]:
    """Within the block, the end of a process that reads data is told as such.

    Torch tells it by an exception out of a signal's handler, at whatever place the program is then: reading a batch, but also
    in the middle of a step or of writing a checkpoint.

    Raises:
        TrainError: a reading process ended.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        told = str(_of_a_worker(error)).strip()
        if not re.search(r"DataLoader worker \(pid", told):
            raise
        raise TrainError(
            f"A process that reads the data has died: {told.splitlines()[0]}",
            where="data",
            hint="Often memory ran out: take fewer workers or smaller batches. The last checkpoint is good: go on with "
            "resume=True (--resume).",
        ) from error


def _of_a_worker(error: Exception) -> Exception:
    """What torch says of a process that has died, where the first thing seen of it was its connection that ended.

    Better said here than while a run's end is being written.
    """
    if isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(_UNTIL_TOLD)
    except RuntimeError as later:
        return later
    return error


Loader = TypeVar("Loader", bound="EpochLoader")
Indexed = TypeVar("Indexed", bound="_IndexedLoader")


class EpochLoader(ABC):
    """An epoch's batches. The next iteration is that of `epoch`, without its first `skipped` batches.

    Attributes:
        seed: of order and augmentation.
        epoch: which epoch the next iteration is.
    """

    def __init__(self, *, seed: int):
        if seed < 0:
            raise ConfigError(f"seed is {seed}.", where="seed", got=seed, expected="an integer >= 0")
        self.seed, self.epoch, self.rank, self.world, self._skipped = seed, 0, 0, 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch, from its start."""
        self.epoch, self._skipped = epoch, 0

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next iteration (only of that one)."""
        self._skipped = batches

    def shard(self: Loader, rank: int, world: int) -> Loader:
        """A loader of every `world`-th sample of each of these batches: together the processes see the same batches."""
        part = copy.copy(self)
        part.rank, part.world = rank, world
        return part

    @property
    def randomness(self) -> str | None:
        """Why a sample may look different from epoch to epoch; None: it never does."""
        return f"nobody can tell whether a {type(self).__name__} draws at random"

    @property
    def numbered(self) -> bool:
        """Whether it knows its samples by number: `samples` and `indexed` say."""
        return False

    @property
    def samples(self) -> int:
        """How many samples there are."""
        raise self._unknown()

    def indexed(self: Loader, *, in_order: bool = False) -> Loader:
        """The same loader with sample indices; `in_order`: every sample once, for one process. Only where `randomness` is None."""
        raise self._unknown()

    def fingerprint(self) -> str:
        """Digest of the samples as they are delivered; only where `randomness` is None."""
        raise self._unknown()

    def _unknown(self) -> ConfigError:
        return ConfigError(f"A {type(self).__name__} does not know its samples by number.", where="loader")

    @abstractmethod
    def __len__(self) -> int:
        """Batches in a whole epoch."""

    @abstractmethod
    def _batches(self, skipped: int) -> Iterator[Any]: ...

    def __iter__(self) -> Iterator[Any]:
        skipped, self._skipped = self._skipped, 0
        with noticing_dead_readers():
            yield from self._batches(skipped)


@dataclass(frozen=True, slots=True)
class FlipAndCrop:
    """Each image shifted by up to `padding` pixels (zeros come in), and half of them mirrored.

    The transforms of torchvision.transforms.v2 draw once for a whole batch of tensors; this draws for every image.
    """

    padding: int = 4
    flip: bool = True

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Row shift, column shift, mirror: (count, 3)."""
        shifts = torch.randint(2 * self.padding + 1, (count, 2), generator=generator)
        mirrored = torch.randint(2, (count, 1), generator=generator) * int(self.flip)
        return torch.cat((shifts, mirrored), 1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The augmented images (batch, channels, height, width)."""
        count, channels, height, width = images.shape
        padded = F.pad(images, [self.padding] * 4)
        columns = torch.arange(width).expand(count, -1)
        columns = torch.where(draws[:, 2:] == 1, width - 1 - columns, columns) + draws[:, 1:2]
        rows = torch.arange(height) + draws[:, :1]
        places = rows[:, :, None] * padded.shape[3] + columns[:, None, :]
        places = places.flatten(1)[:, None].expand(-1, channels, -1)
        return padded.flatten(2).gather(2, places).view_as(images)


class _IndexedLoader(EpochLoader):
    """A loader that knows its samples by number, and so can skip and shard before it reads them."""

    def __init__(
        self, count: int, *, batch_size: int, seed: int = 0, shuffle: bool = False, with_indices: bool = False
    ):
        super().__init__(seed=seed)
        if batch_size < 1:
            raise ConfigError(f"batch size is {batch_size}.", where="batch_size", got=batch_size, expected="at least 1")
        self.count, self.batch_size, self.shuffle, self.with_indices = count, batch_size, shuffle, with_indices
        self.drop_last = shuffle and count >= batch_size

    @property
    def numbered(self) -> bool:
        """By number, yes."""
        return True

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.count

    def indexed(self: Indexed, *, in_order: bool = False) -> Indexed:
        """The same loader with sample indices in its batches; `in_order`: every sample once, for one process."""
        part = copy.copy(self)
        part.with_indices = True
        if in_order:
            part.shuffle, part.drop_last, part.rank, part.world, part._skipped = False, False, 0, 1, 0
        return part

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def _plan(self, skipped: int) -> Iterator[tuple[int, Tensor]]:
        """Number and sample indices of every batch still to come."""
        order = torch.arange(self.count)
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator_from(self.seed, self.epoch))
        for number in range(skipped, len(self)):
            yield number, order[number * self.batch_size : (number + 1) * self.batch_size]


class MemoryLoader(_IndexedLoader):
    """Batches out of one tensor of images; no workers, because on small images they cost more than they give.

    Training loaders (`shuffle`) leave out the incomplete last batch, a different one in every epoch.

    Args:
        images: uint8 (count, channels, height, width).
        labels: int64 (count,).
        mean: per channel, of values in [0, 1].
        std: likewise.
        peak: the pixel value that stands for 1.
        batch_size: samples per batch.
        seed: of order and augmentation.
        shuffle: a new order in every epoch.
        augment: applied to uint8 batches; None for none.
        with_indices: batches carry the sample indices too.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        peak: float = 255.0,
        batch_size: int = 128,
        seed: int = 0,
        shuffle: bool = False,
        augment: FlipAndCrop | None = None,
        with_indices: bool = False,
    ):
        super().__init__(len(images), batch_size=batch_size, seed=seed, shuffle=shuffle, with_indices=with_indices)
        self.images, self.labels, self.peak, self.augment = images, labels, peak, augment
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    @property
    def randomness(self) -> str | None:
        """The augmentation, if there is one."""
        return f"training images are augmented by {self.augment}" if self.augment is not None else None

    def fingerprint(self) -> str:
        """Digest of images and normalisation."""
        told = f"{self.images.dtype} {tuple(self.images.shape)} {self.peak} {self._mean.tolist()} {self._std.tolist()}"
        total = hashlib.sha256(told.encode())
        total.update(self.images.contiguous().numpy().data)
        return total.hexdigest()

    def _batches(self, skipped: int) -> Iterator[tuple[Tensor, ...]]:
        for number, whole in self._plan(skipped):
            part = slice(self.rank, None, self.world)
            indices = whole[part]
            images = self.images[indices]
            if self.augment is not None:
                draws = self.augment.draw(len(whole), generator_from(self.seed, self.epoch, number))
                images = self.augment.apply(images, draws[part])
            images = images.float().div_(self.peak).sub_(self._mean).div_(self._std)
            batch = images, self.labels[indices]
            yield (*batch, indices) if self.with_indices else batch


class DiskLoader(_IndexedLoader):
    """Batches read from disk by a torch DataLoader; each sample's augmentation follows from (seed, epoch, index).

    Args:
        dataset: index -> (image, label); drawn randomness comes from torch's global generator. A sample that cannot be
            read is returned as the ConfigError that says so.
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
        batch_size: int = 128,
        workers: int = 0,
        seed: int = 0,
        shuffle: bool = False,
        with_indices: bool = False,
    ):
        count: int = len(dataset)  # type: ignore[arg-type]
        super().__init__(count, batch_size=batch_size, seed=seed, shuffle=shuffle, with_indices=with_indices)
        self.dataset, self.workers = dataset, workers

    @property
    def randomness(self) -> str | None:
        """What the dataset says of itself; without a word of it, it may be random."""
        unknown = f"nobody can tell whether a {type(self.dataset).__name__} draws at random"
        told: str | None = getattr(self.dataset, "randomness", unknown)
        return told

    def fingerprint(self) -> str:
        """The dataset's own."""
        digest: str = self.dataset.fingerprint()  # type: ignore[attr-defined]
        return digest

    def _batches(self, skipped: int) -> Iterator[tuple[Tensor, ...]]:
        parts = [whole[self.rank :: self.world].tolist() for _, whole in self._plan(skipped)]
        loader = DataLoader(
            _Reseeded(self.dataset, self.seed, self.epoch),
            batch_sampler=parts,
            num_workers=self.workers,
            collate_fn=_collated,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        for part, batch in zip(parts, loader, strict=True):
            if isinstance(batch, ConfigError):
                raise batch
            yield (*batch, torch.tensor(part)) if self.with_indices else batch


class _Reseeded(Dataset[Any]):
    """A dataset whose sample i is read with a random state that follows from (seed, epoch, i)."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int):
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_from(self.seed, self.epoch, index))
            return self.dataset[index]


def _collated(samples: list[Any]) -> Any:
    failed = next((sample for sample in samples if isinstance(sample, ConfigError)), None)
    if failed is not None:
        return failed
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels)
