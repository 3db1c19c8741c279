"""Data by a spec string: `digits`, `cifar10[:DIR]`, `cifar100[:DIR]`, `imagefolder:DIR`, `file.py:make_loaders`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from indistill_fx.data.augment import of_small_images, rand_augment
from indistill_fx.data.dataset import Data, DataOptions
from indistill_fx.data.foreign import repeatable
from indistill_fx.data.image_folders import rank_in_class
from indistill_fx.data.in_memory import Split, hold
from indistill_fx.data.normalisation import PUBLISHED, Figures, Normalisation
from indistill_fx.data.open_folder import open_folder
from indistill_fx.data.user_loaders import open_user_loaders
from indistill_fx.errors import ConfigError, instead_of, unknown
from indistill_fx.system.shortage import home

_DIGITS: Normalisation = ((0.3053,), (0.3760,))


def open_data(
    spec: str,
    *,
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    limit: int | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Figures | None = None,
    std: Figures | None = None,
    model_size: tuple[int, int] | None = None,
    cache: str | Path | None = None,
    download: bool = True,
    augment: bool = True,
    randaugment: int | None = None,
    views: int | None = None,
    with_indices: bool = False,
    progress: bool = False,
) -> Data:
    """Open the data set that a spec names.

    Args:
        spec: `digits` (scikit-learn's 8x8 digits; every fifth of each class is a test sample), `cifar10`, `cifar100`
            (`cifar10:DIR` says which folder they are in), `imagefolder:DIR` (train/<class>/ and test/ or val/), or `file.py:name`
            of a function that returns (train, test), a dict with `train`, `test` and perhaps `train_plain`,
            `classes` and `normalisation` (mean and std), or `Data`; of batch_size, workers, seed, limit and
            augment it gets those that it has parameters for.
        batch_size: samples per batch.
        workers: number of processes that read images too large for memory.
        seed: of order and augmentation.
        limit: use only this many samples of each split, spread evenly over the classes, the same for every seed.
        size: resize images to this height and width in pixels (one number is both). None: for images up to 64 pixels
            their own size (if sizes differ, the most common one), for larger images the model's.
        channels: 3 for RGB, 1 for grey; None: 3 for folders, else what the set has.
        mean: of every channel, of values from 0 to 1: numbers, `auto` to measure mean and std on the training set, or `imagenet`,
            `cifar10`, `cifar100`, `half` (all 0.5). None: the set's own; for folders ImageNet's, unless the folder is CIFAR-10.
        std: likewise; not needed if `mean` is a word.
        model_size: what larger images are resized to if no size is given; None: 224x224.
        cache: a folder that keeps decoded small images for the next time.
        download: download the set if it is missing (cifar10, cifar100).
        augment: training images up to 64 pixels are shifted by up to 4 pixels and mirrored, larger ones cropped at random (8%
            to 100% of the area) and mirrored; digits are left as they are.
        randaugment: after that, two operations of RandAugment (torchvision.transforms.v2) of this magnitude, 0 to 30.
        views: draw this many augmented versions of every image and no more: epoch e shows version e modulo that. None: new ones in
            every epoch.
        with_indices: training batches also carry sample indices (the loss `crd` reads them).
        progress: show a bar while images are decoded, on a terminal.

    Returns:
        The loaders, and what is known of the data. Batches are images (batch, channels, height, width), normalised, and labels (batch,).

    Raises:
        ConfigError: the spec is unknown; there is no such folder; a split, class or image is missing, empty or broken; or RandAugment is
            asked for without augmentation, or for images that do not have 8 bits per channel.

    Examples:
        >>> import indistill_fx as ifx
        >>> data = ifx.open_data("digits", batch_size=32)
        >>> images, labels = next(iter(data.train))
        >>> images.shape, labels.shape, data.classes[:3]
        (torch.Size([32, 1, 8, 8]), torch.Size([32]), ('0', '1', '2'))
    """
    options = DataOptions(
        batch_size=batch_size,
        workers=workers,
        seed=seed,
        limit=limit,
        size=_edges(size),
        model_size=model_size,
        channels=_checked_channels(channels),
        mean=mean,
        std=std,
        cache=Path(cache) if cache else None,
        download=download,
        augment=augment,
        randaugment=randaugment,
        with_indices=with_indices,
        progress=progress,
    )
    kind, _, place = spec.partition(":")
    _check_randaugment(kind, options)
    if kind in _SPECS:
        return _in_views(_SPECS[kind](place, options), views)
    if not place:
        _require_kind(spec)
        legal = "digits, cifar10, cifar100, imagefolder:DIR, file.py:make_loaders"
        raise unknown("data", spec, "data set", _SPECS, legal=legal)
    return _in_views(open_user_loaders(spec, options), views)


def _in_views(data: Data, views: int | None) -> Data:
    return data if views is None else replace(data, train=repeatable(data.train, 0, "train loader").in_views(views))


def _require_kind(spec: str) -> None:
    """Refuse a path without the word before or after it that says how it is read."""
    if Path(spec).is_dir():
        instead, what = f"imagefolder:{spec}", "a folder, and how its data are read is not said"
        hint = f"If it has train/<class>/ and test/ or val/ with images, write {instead}. Other data: a function of your own, file.py:name."
    elif spec.endswith(".py"):
        instead, what = f"{spec}:make_loaders", "a file of code, and which function in it makes the loaders is not said"
        hint = f"Name the function that returns (train, test) after a colon: {instead}."
    else:
        return
    raise ConfigError(f"{spec} is {what}.", where="data", got=spec, expected=instead, hint=hint)


def _check_randaugment(kind: str, options: DataOptions) -> None:
    if options.randaugment is None:
        return
    rand_augment(options.randaugment)
    reasons = {
        "no image is to be augmented": not options.augment,
        "the digits are left as they are": kind == "digits",
        "your own loaders prepare images themselves": kind not in _SPECS,
    }
    for reason in (reason for reason, holds in reasons.items() if holds):
        raise ConfigError(
            f"RandAugment was requested, but {reason}.",
            where="randaugment",
            got=options.randaugment,
            hint="Leave --randaugment out, or take torchvision.transforms.v2.RandAugment in the loaders themselves.",
        )


def _edges(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    edges = (size, size) if isinstance(size, int) else tuple(size)
    if len(edges) != 2 or min(edges) < 1:
        raise ConfigError(f"size is {size}.", where="size", got=size, expected="height and width, at least 1")
    return edges


def _checked_channels(channels: int | None) -> int | None:
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels is {channels}.", where="channels", got=channels, expected="3 (RGB) or 1 (grey)")
    return channels


def _digits(place: str, options: DataOptions) -> Data:
    from sklearn.datasets import load_digits

    if place:
        raise ConfigError(
            f"`digits` ships with scikit-learn and takes no {place!r}.",
            where="data",
            got=place,
            hint="Write --data digits.",
        )
    bundled = load_digits()
    images = torch.from_numpy(bundled.images).to(torch.uint8)[:, None]
    labels = torch.from_numpy(bundled.target).long()
    test = rank_in_class(labels) % 5 == 4
    classes = tuple(str(digit) for digit in range(10))
    train_split, test_split = (Split(images[part], labels[part]) for part in (~test, test))
    notes = _without_cache(options)
    return hold(train_split, test_split, classes, _DIGITS, options, peak=16.0, augment=None, notes=notes)


def _without_cache(options: DataOptions) -> tuple[str, ...]:
    return (
        ("These images are not decoded, so there is nothing to keep: --cache has no effect.",) if options.cache else ()
    )


def _cifar(place: str, options: DataOptions, name: Literal["CIFAR10", "CIFAR100"], figures: Normalisation) -> Data:
    from torchvision import datasets

    own = home()
    if not place and own is None:
        raise ConfigError(
            f"{name} is looked for in the home folder, but there is none (HOME is not set).",
            where="data",
            hint=f"Give its folder: {name.lower()}:DIR.",
        )
    root = Path(place) if place or own is None else own / ".cache" / "indistill-fx"
    splits = []
    for train in (True, False):
        hint = f"Unpack the python version of {name} there, or give its folder as {name.lower()}:DIR."
        missing = f"{name} is not under {str(root)!r} and could not be downloaded"
        with instead_of((RuntimeError, OSError), ConfigError(missing, where=str(root), hint=hint)):
            dataset = getattr(datasets, name)(root, train=train, download=options.download)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(dataset.targets)))
    classes, notes = tuple(dataset.classes), _without_cache(options)
    augment = of_small_images(options.augment, options.randaugment)
    return hold(splits[0], splits[1], classes, figures, options, augment=augment, notes=notes)


def _cifar10(place: str, options: DataOptions) -> Data:
    return _cifar(place, options, "CIFAR10", PUBLISHED["cifar10"])


def _cifar100(place: str, options: DataOptions) -> Data:
    return _cifar(place, options, "CIFAR100", PUBLISHED["cifar100"])


_SPECS: dict[str, Callable[[str, DataOptions], Data]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "imagefolder": open_folder,
}
