"""Data sets of small images that are held in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from indistill_fx.data.augment import Augmentation
from indistill_fx.data.dataset import Data, DataOptions
from indistill_fx.data.image_folders import spread
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.data.normalisation import Normalisation, choose, measured

_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Split:
    """Images (count, channels, height, width) of whole numbers, and their labels, int64 (count,) or None."""

    images: Tensor
    labels: Tensor | None

    def limited(self, count: int | None) -> Split:
        """At most `count` images, spread evenly over the classes."""
        labels = self.labels if self.labels is not None else torch.zeros(len(self.images), dtype=torch.int64)
        kept = spread(labels, count)
        if len(kept) == len(labels):
            return self
        return Split(self.images[kept], self.labels[kept] if self.labels is not None else None)

    def brought_to(self, size: tuple[int, int] | None, channels: int | None, *, peak: float) -> Split:
        """The images resized to `size` and converted to `channels` channels; real numbers where whole ones are too coarse."""
        from torchvision.transforms.v2.functional import resize, rgb_to_grayscale

        images = self.images
        if channels == 1 and images.shape[1] == 3:
            images = rgb_to_grayscale(images)
        elif channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1).contiguous()
        if size is not None and tuple(images.shape[2:]) != size:
            images = images if peak >= 255 else images.float()
            images = torch.cat([resize(part, list(size), antialias=True) for part in images.split(_AT_ONCE)])
        return Split(images, self.labels)


def hold(
    train: Split,
    test: Split,
    classes: tuple[str, ...],
    figures: Normalisation,
    options: DataOptions,
    *,
    peak: float = 255.0,
    augment: Augmentation | None,
    notes: tuple[str, ...] = (),
) -> Data:
    """A data set of two splits.

    Args:
        train: the training set.
        test: the test set.
        classes: their names.
        figures: to normalise by, where no others are asked for.
        options: what was asked for.
        peak: the pixel value that stands for 1.
        augment: of the training images.
        notes: what was decided on the way here.

    Raises:
        ConfigError: figures or limit cannot be.
    """
    train, test = (
        split.brought_to(options.size, options.channels, peak=peak).limited(options.limit) for split in (train, test)
    )
    channels = train.images.shape[1]
    figures, note = choose(
        options.mean,
        options.std,
        figures,
        channels,
        lambda: measured(iter(train.images.split(_AT_ONCE)), peak),
    )
    notes += (note,) if note else ()
    if options.workers:
        notes += ("These images are held in memory, so no processes read them: --workers has no effect.",)

    def loader(split: Split, training: bool) -> MemoryLoader:
        return MemoryLoader(
            split.images,
            split.labels,
            mean=figures[0],
            std=figures[1],
            peak=peak,
            batch_size=options.batch_size,
            seed=options.seed,
            shuffle=training,
            augment=augment if training else None,
            with_indices=training and options.with_indices,
        )

    loaders = loader(train, True), loader(train, False).mixed(train.labels), loader(test, False)
    size = tuple(train.images.shape[1:])
    return Data(*loaders, classes, size, figures, labelled=test.labels is not None, notes=notes)
