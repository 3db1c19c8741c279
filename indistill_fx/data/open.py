"""Data by a spec string: `digits`, `cifar10[:DIR]`, `cifar100[:DIR]`, `imagefolder:DIR`, `file.py:make_loaders`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from indistill_fx.data.dataset import Data, DataOptions, Normalisation
from indistill_fx.data.image_folders import ImageFiles, Listing, decode, list_images, rank_in_class, read_image, spread
from indistill_fx.data.loaders import DiskLoader, FlipAndCrop, MemoryLoader
from indistill_fx.data.user_loaders import open_user_loaders
from indistill_fx.errors import ConfigError, nearest

SMALL = 64
"""Images up to this many pixels a side are held in memory and augmented by shifts; larger ones by random resized
crops."""

MEMORY = 2 << 30
"""Bytes of decoded images up to which a set of small images is held in memory."""

_DIGITS: Normalisation = ((0.3053,), (0.3760,))
_CIFAR10: Normalisation = ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255))
_CIFAR100: Normalisation = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def open_data(
    spec: str,
    *,
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    limit: int | None = None,
    size: int | None = None,
    cache: str | Path | None = None,
    download: bool = True,
    augment: bool = True,
    with_indices: bool = False,
    progress: bool = False,
) -> Data:
    """The data set a spec names.

    Args:
        spec: `digits` (scikit-learn's 8x8 digits; every fifth of each class is a test sample), `cifar10`, `cifar100`
            (with `:DIR` to say where they lie), `imagefolder:DIR` (train/<class>/ and test/ or val/), or `file.py:name`
            of a function that returns (train, test), a dict with `train`, `test` and perhaps `train_plain` and
            `classes`, or `Data`; it is given those of batch_size, workers, seed, limit and augment that it has parameters for.
        batch_size: samples per batch.
        workers: processes that read images too large for memory.
        seed: of order and augmentation.
        limit: only so many samples of each split, spread evenly over the classes, the same whatever the seed.
        size: bring images to this height and width; the default is their own up to 64 pixels, above that 224.
        cache: a folder that keeps decoded small images for the next time.
        download: fetch what is absent (cifar10, cifar100).
        augment: training images up to 64 pixels are shifted by up to 4 and mirrored, larger ones cropped at random (8%
            to 100% of the area) and mirrored; digits are left as they are.
        with_indices: training batches carry sample indices (crd reads them).
        progress: show a bar while images are decoded, on a terminal.

    Returns:
        The loaders and what is known of the data.

    Raises:
        ConfigError: an unknown spec; no such folder; a split, class or image that is absent, empty or broken.
    """
    options = DataOptions(
        batch_size,
        workers,
        seed,
        limit,
        size,
        Path(cache) if cache else None,
        download,
        augment,
        with_indices,
        progress,
    )
    kind, _, place = spec.partition(":")
    if kind in _SPECS:
        return _SPECS[kind](place, options)
    if not place:
        raise ConfigError(
            f"{spec!r} is no data set.",
            where="data",
            got=spec,
            expected=sorted(_SPECS),
            hint=f"{nearest(spec, _SPECS)} Legal: digits, cifar10, cifar100, imagefolder:DIR, file.py:make_loaders.",
        )
    return open_user_loaders(spec, options)


def _digits(place: str, options: DataOptions) -> Data:
    from sklearn.datasets import load_digits

    if place:
        raise ConfigError(f"`digits` ships with scikit-learn and takes no {place!r}.", where="data", got=place)
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bundled.target).long()
    test = rank_in_class(labels) % 5 == 4
    classes = tuple(str(digit) for digit in range(10))
    splits = (images[~test], labels[~test]), (images[test], labels[test])
    return _in_memory(*splits, classes, _DIGITS, options, peak=16.0, augment=None)


def _cifar(place: str, options: DataOptions, name: Literal["CIFAR10", "CIFAR100"], figures: Normalisation) -> Data:
    from torchvision import datasets

    root = Path(place) if place else Path.home() / ".cache" / "indistill-fx"
    splits = []
    for train in (True, False):
        try:
            dataset = getattr(datasets, name)(root, train=train, download=options.download)
        except (RuntimeError, OSError) as error:
            raise ConfigError(
                f"{name} is not under {str(root)!r} and could not be downloaded: {error}.",
                where=str(root),
                got=str(error),
                hint=f"Unpack the python version of {name} there, or give its folder as {name.lower()}:DIR.",
            ) from error
        splits.append((torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)))
    return _in_memory(splits[0], splits[1], tuple(dataset.classes), figures, options, augment=FlipAndCrop())


def _cifar10(place: str, options: DataOptions) -> Data:
    return _cifar(place, options, "CIFAR10", _CIFAR10)


def _cifar100(place: str, options: DataOptions) -> Data:
    return _cifar(place, options, "CIFAR100", _CIFAR100)


def _imagefolder(place: str, options: DataOptions) -> Data:
    if not place:
        raise ConfigError("`imagefolder` needs its folder.", where="data", expected="imagefolder:DIR")
    train, test = (listing.limited(options.limit) for listing in _splits(Path(place)))
    first = read_image(train.files[0])
    size = (options.size, options.size) if options.size else (first.height, first.width)
    small = max(size) <= SMALL
    if not small and not options.size:
        size = (224, 224)
    figures = _CIFAR10 if size == (32, 32) else _IMAGENET
    if small and (len(train.files) + len(test.files)) * 3 * size[0] * size[1] <= MEMORY:
        resize = options.size is not None
        decoded = [
            decode(split, size, resize=resize, cache=options.cache, progress=options.progress)
            for split in (train, test)
        ]
        splits = (decoded[0], train.labels), (decoded[1], test.labels)
        return _in_memory(*splits, train.classes, figures, options, augment=FlipAndCrop())
    varied, plain = _transforms(size, small, figures)
    drawn = f"training images are {'shifted' if small else 'cropped'} and mirrored at random"

    def loader(listing: Listing, transform: Callable[[Any], Tensor], shuffle: bool) -> DiskLoader:
        return DiskLoader(
            ImageFiles(listing, transform, randomness=drawn if transform is varied and options.augment else None),
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            shuffle=shuffle,
            with_indices=options.with_indices and shuffle,
        )

    loaders = (
        loader(train, varied if options.augment else plain, True),
        loader(train, plain, False),
        loader(test, plain, False),
    )
    return Data(*loaders, train.classes, (3, *size), figures)


def _splits(folder: Path) -> tuple[Listing, Listing]:
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {str(folder)!r} (looked in {Path.cwd()}).", where=str(folder))
    names = ("train", next((name for name in ("test", "val") if (folder / name).is_dir()), "test"))
    absent = [name for name in names if not (folder / name).is_dir()]
    if absent:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"{str(folder)!r} has no {absent[0]}/; there is {found}.",
            where=str(folder),
            got=found,
            expected="train/<class>/ and test/<class>/ (or val/<class>/)",
            hint="Give the folder that holds both splits.",
        )
    train, test = (list_images(folder / name) for name in names)
    if train.classes != test.classes:
        alone = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"{str(folder)!r}: train/ and {names[1]}/ differ in their classes; only one has {', '.join(alone[:8])}.",
            where=str(folder),
            got=alone,
            hint="Labels count the class folders in order, so both splits need the same ones.",
        )
    return train, test


def _transforms(
    size: tuple[int, int], small: bool, figures: Normalisation
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Training and test transforms of PIL images read one by one."""
    from torchvision.transforms import v2

    end = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*figures)]
    if small:
        fit = [v2.Resize(size)]
        return v2.Compose([*fit, v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *end]), v2.Compose(
            [*fit, *end]
        )
    shrink = [v2.Resize(round(size[0] * 256 / 224)), v2.CenterCrop(size)]
    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *end]), v2.Compose([*shrink, *end])


def _in_memory(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
    figures: Normalisation,
    options: DataOptions,
    *,
    peak: float = 255.0,
    augment: FlipAndCrop | None,
) -> Data:
    def loader(split: tuple[Tensor, Tensor], training: bool) -> MemoryLoader:
        kept = spread(split[1], options.limit)
        whole = len(kept) == len(split[1])
        return MemoryLoader(
            *(split if whole else (values[kept] for values in split)),
            mean=figures[0],
            std=figures[1],
            peak=peak,
            batch_size=options.batch_size,
            seed=options.seed,
            shuffle=training,
            augment=augment if training and options.augment else None,
            with_indices=training and options.with_indices,
        )

    loaders = loader(train, True), loader(train, False), loader(test, False)
    return Data(*loaders, classes, tuple(train[0].shape[1:]), figures)


_SPECS: dict[str, Callable[[str, DataOptions], Data]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagefolder": _imagefolder,
}
