"""Loaders whose batches follow from (seed, epoch) alone: a resumed run sees exactly what the first would have.

All iterate batches (images, labels) or (images, labels, indices) and leave the global random state as they found it.
"""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor

from indistill_fx.data.augment import Augmentation, FlipAndCrop
from indistill_fx.data.held import HeldImages
from indistill_fx.data.image_folders import rank_in_class
from indistill_fx.data.normalisation import Normalisation, Normaliser
from indistill_fx.data.readers import noticing_dead_readers
from indistill_fx.errors import ConfigError
from indistill_fx.system.random_state import generator_from


class EpochLoader(ABC):
    """An epoch's batches. The next iteration is that of `epoch`, without its first `skipped` batches.

    Attributes:
        seed: of order and augmentation.
        epoch: which epoch the next iteration is.
        least: batches of fewer samples, counted over all processes, are left out.
        left_out: how many were, so far.
        longer: what to say of a loader that was seen to have more batches than it says.
        remarks: what a run should say of the loader, in sentences.
        figures: mean and std per channel of values in [0, 1] that images are normalised by; None if unknown.
    """

    def __init__(self, *, seed: int):
        if seed < 0:
            raise ConfigError(f"seed is {seed}.", where="seed", got=seed, expected="an integer >= 0")
        self.seed, self.epoch, self.rank, self.world, self._skipped = seed, 0, 0, 1, 0
        self.least, self.left_out, self.longer = 1, 0, ""
        self.remarks: tuple[str, ...] = ()
        self.figures: Normalisation | None = None

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be that of this epoch, from its start."""
        self.epoch, self._skipped = epoch, 0

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next iteration (only of that one)."""
        self._skipped = batches

    def shard(self, rank: int, world: int) -> Self:
        """A loader of every `world`-th sample of each of these batches: together the processes see the same batches."""
        part = copy.copy(self)
        part.rank, part.world = rank, world
        return part

    def at_least(self, samples: int) -> Self:
        """A loader without the batches that have fewer samples: a batch norm cannot train on one.

        Raises:
            ConfigError: no batch is left.
        """
        part = copy.copy(self)
        part.least = samples
        if part.length == 0:
            raise part.too_small()
        return part

    def too_small(self) -> ConfigError:
        """The error where all batches have fewer than `least` samples."""
        return ConfigError(
            f"No batch has {self.least} samples, and with fewer this model cannot be trained (batch norms, or processes that "
            "would get none).",
            where="batch_size",
            expected=f"batches of at least {self.least}",
            hint="Take larger batches, or more samples; or keep the batch norms in eval mode.",
        )

    def to(self, device: torch.device | str) -> Self:
        """A loader that prepares its batches on this device, if it can; their values are the same."""
        return self

    @property
    def randomness(self) -> str | None:
        """Why a sample may look different from epoch to epoch; None: it never does."""
        return f"it is not known whether a {type(self).__name__} draws at random"

    @property
    def normalisation(self) -> str | None:
        """What pixels are normalised by, in words; None where that is the dataset's own business."""
        return None

    @property
    def numbered(self) -> bool:
        """Whether it knows its samples by number: `samples` and `indexed` say."""
        return False

    @property
    def samples(self) -> int:
        """How many samples there are."""
        raise self._unknown()

    @property
    @abstractmethod
    def length(self) -> int | None:
        """Batches in a whole epoch; None: not known before its end."""

    def indexed(self, *, in_order: bool = False) -> Self:
        """The same loader with sample indices; `in_order`: every sample once, for one process. Only where `randomness` is None."""
        raise self._unknown()

    @property
    def views(self) -> int:
        """In how many fixed ways every sample is seen, one after the other, an epoch each; 0: anew in every epoch, or never changed."""
        return 0

    def in_views(self, views: int) -> Self:
        """A loader that draws what is random once for so many epochs, and shows the same images again after them.

        Raises:
            ConfigError: it draws nothing, or what it draws cannot be known.
        """
        raise ConfigError(
            f"Fixed views are for augmented images of `open_data`, not for a {type(self).__name__}.",
            where="views",
            got=views,
            hint="Leave --views out.",
        )

    def by_view(self) -> Self:
        """A loader whose indices count the samples of all views: sample `i` of view `v` is `v * samples + i`."""
        raise self._unknown()

    def fingerprint(self) -> str:
        """Digest of the samples as they are delivered; only where `randomness` is None, or there are fixed views."""
        raise self._unknown()

    def _unknown(self) -> ConfigError:
        return ConfigError(
            f"A {type(self).__name__} does not know its samples by number.",
            where="loader",
            hint="Use a loader of open_data, or one whose batches contain indices.",
        )

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError(f"nobody knows how many batches an epoch of this {type(self).__name__} has")
        return self.length

    @abstractmethod
    def _batches(self, skipped: int) -> Iterator[Any]: ...

    def __iter__(self) -> Iterator[Any]:
        skipped, self._skipped = self._skipped, 0
        with noticing_dead_readers():
            yield from self._batches(skipped)


_AT_ONCE = 64
"""Of so many batches the places and draws are sent together."""


class IndexedLoader(EpochLoader):
    """A loader that knows its samples by number, and so can skip and shard before it reads them."""

    def __init__(
        self, count: int, *, batch_size: int, seed: int = 0, shuffle: bool = False, with_indices: bool = False
    ):
        super().__init__(seed=seed)
        if batch_size < 1:
            raise ConfigError(f"batch size is {batch_size}.", where="batch_size", got=batch_size, expected="at least 1")
        self.count, self.batch_size, self.shuffle, self.with_indices = count, batch_size, shuffle, with_indices
        self.drop_last = shuffle and count >= batch_size
        self._views, self._by_view = 0, False
        self._order: Tensor | None = None
        self.device = torch.device("cpu")

    def mixed(self, labels: Tensor | None) -> Self:
        """The same loader in a fixed order in which the first samples, however many, stand for all.

        Args:
            labels: of all samples. Samples that stand class by class are taken from each class in turn; those without labels, whose
                names may stand in such an order, at random; others are left as they are.
        """
        part = copy.copy(self)
        if labels is None:
            part._order = torch.randperm(self.count, generator=generator_from(0, 0))
        elif bool((labels.diff() >= 0).all()):
            part._order = torch.argsort(rank_in_class(labels), stable=True)
        return part

    @property
    def numbered(self) -> bool:
        """By number, yes."""
        return True

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.count

    @property
    def length(self) -> int:
        """Batches in a whole epoch."""
        return self._planned - self._too_small

    def indexed(self, *, in_order: bool = False) -> Self:
        """The same loader with sample indices in its batches; `in_order`: every sample once, for one process."""
        part = copy.copy(self)
        part.with_indices = True
        if in_order:
            part.shuffle, part.drop_last, part.rank, part.world, part._skipped, part.least = False, False, 0, 1, 0, 1
        return part

    @property
    def views(self) -> int:
        """See `EpochLoader`."""
        return self._views

    def in_views(self, views: int) -> Self:
        """See `EpochLoader`."""
        if self.randomness is None or self.unknown or views < 1:
            why = self.unknown or "nothing is drawn at random here" if views > 0 else f"there cannot be {views} of them"
            hint = "Leave --views out, or --no-augment."
            raise ConfigError(f"Fixed views were requested, but {why}.", where="views", got=views, hint=hint)
        part = copy.copy(self)
        part._views = views
        return part

    @property
    def unknown(self) -> str:
        """Why it is not known what is drawn; empty if it is known."""
        return ""

    def by_view(self) -> Self:
        """See `EpochLoader`."""
        part = copy.copy(self)
        part._by_view = True
        return part

    @property
    def _drawn_for(self) -> int:
        """The epoch that random draws are made for: the view's."""
        return self.epoch % self._views if self._views else self.epoch

    @property
    def _seen(self) -> str:
        return f" in {self._views} fixed views" if self._views else ""

    @property
    def _planned(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    @property
    def _too_small(self) -> int:
        """How many of the planned batches have fewer than `least` samples: the last one, or all."""
        if self.batch_size < self.least:
            return self._planned
        return int(not self.drop_last and 0 < self.count % self.batch_size < self.least)

    def _plan(self, skipped: int) -> Iterator[tuple[int, Tensor]]:
        """Number and sample indices of every batch still to come."""
        order = torch.arange(self.count) if self._order is None else self._order
        if self.shuffle:
            order = torch.randperm(self.count, generator=generator_from(self.seed, self.epoch))
        self.left_out += self._too_small
        for number in range(skipped, self.length):
            yield number, order[number * self.batch_size : (number + 1) * self.batch_size]

    def _batch(self, images: Tensor, labels: Tensor | None, indices: Tensor) -> tuple[Tensor | None, ...]:
        if not self.with_indices:
            return images, labels
        return images, labels, indices + self._drawn_for * self.count if self._by_view and self._views else indices


class MemoryLoader(IndexedLoader):
    """Batches out of one tensor of images; no workers, because on small images they cost more than they give.

    Training loaders (`shuffle`) leave out the incomplete last batch, a different one in every epoch. On a GPU the images are kept there as
    they are, a byte a value; what is drawn on the CPU goes there for many batches at once, so that none of them waits for the last. Where
    they do not fit, or more is done to them than to be shifted and mirrored, batches are made on the CPU.

    Args:
        images: uint8, or uint16 of deep images (count, channels, height, width).
        labels: int64 (count,), or None.
        mean: per channel, of values in [0, 1].
        std: likewise.
        peak: the pixel value that stands for 1.
        batch_size: samples per batch.
        seed: of order and augmentation.
        shuffle: a new order in every epoch.
        augment: applied to batches before they are normalised; None for none.
        with_indices: batches carry the sample indices too.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        peak: float = 255.0,
        batch_size: int = 128,
        seed: int = 0,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        with_indices: bool = False,
    ):
        super().__init__(len(images), batch_size=batch_size, seed=seed, shuffle=shuffle, with_indices=with_indices)
        self.images, self.labels, self.augment = images, labels, augment
        self._normalise = Normaliser((mean, std), peak)
        self.figures = mean, std
        self._held: dict[torch.device, HeldImages] = {}

    def to(self, device: torch.device | str) -> Self:
        """Images are kept on the device if they take no more than half of its free memory; batches end there in any case."""
        device = torch.device(device)
        if device == self.device:
            return self
        part = copy.copy(self)
        part.device, part._normalise = device, self._normalise.to(device)
        shiftable = self.augment is None or isinstance(self.augment, FlipAndCrop)
        if device.type != "cpu" and device not in self._held and shiftable:
            shift = self.augment if isinstance(self.augment, FlipAndCrop) else None
            if HeldImages.fit(device, self.images, shift):
                self._held[device] = HeldImages(self.images, self.labels, device, shift)
        return part

    @property
    def randomness(self) -> str | None:
        """The augmentation, if there is one."""
        return f"training images are augmented by {self.augment}{self._seen}" if self.augment is not None else None

    @property
    def normalisation(self) -> str:
        """Mean, std and peak."""
        return str(self._normalise)

    def fingerprint(self) -> str:
        """Digest of images and normalisation."""
        total = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)} {self._normalise}".encode())
        total.update(self.images.cpu().contiguous().numpy().data)
        if self._views:
            total.update(f"{self.augment} {self._views} {self.seed}".encode())
        return total.hexdigest()

    def _batches(self, skipped: int) -> Iterator[tuple[Tensor | None, ...]]:
        held = self._held.get(self.device)
        yield from self._on_host(skipped) if held is None else self._on_device(held, skipped)

    def _on_host(self, skipped: int) -> Iterator[tuple[Tensor | None, ...]]:
        for number, batch_indices in self._plan(skipped):
            indices = batch_indices[self.rank :: self.world]
            images = self.images[indices]
            if self.augment is not None:
                images = self.augment.apply(images, self._draws(number, batch_indices))
            labels = _sent(self.labels[indices], self.device) if self.labels is not None else None
            yield self._batch(self._normalise(_sent(images, self.device)), labels, indices)

    def _on_device(self, held: HeldImages, skipped: int) -> Iterator[tuple[Tensor | None, ...]]:
        planned = self._plan(skipped)
        while block := list(islice(planned, _AT_ONCE)):
            shares = [batch_indices[self.rank :: self.world] for _, batch_indices in block]
            counts = [len(share) for share in shares]
            places = _sent(torch.cat(shares), self.device).split(counts)
            draws: Sequence[Tensor | None] = [None] * len(block)
            if self.augment is not None:
                draws = _sent(torch.cat([self._draws(*entry) for entry in block]), self.device).split(counts)
            for indices, samples, draw in zip(shares, places, draws, strict=True):
                labels = held.labels[samples] if held.labels is not None else None
                yield self._batch(self._normalise(held.pictures(samples, draw)), labels, indices)

    def _draws(self, number: int, batch_indices: Tensor) -> Tensor:
        """What this process's share of a batch is augmented by, drawn for all of it."""
        assert self.augment is not None
        # Drawn for every sample by its index: two epochs of one view have different batches.
        if self._views:
            draws = self.augment.draw(self.count, generator_from(self.seed, self._drawn_for))[batch_indices]
        else:
            draws = self.augment.draw(len(batch_indices), generator_from(self.seed, self.epoch, number))
        return draws[self.rank :: self.world]


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device; to a GPU from page-locked memory, which it reads when it comes to it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)
