"""`imagefolder:DIR`: small images are decoded into memory, larger ones are read from disk as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from indistill_fx.data.augment import of_small_images, rand_augment
from indistill_fx.data.dataset import Data, DataOptions
from indistill_fx.data.decoding import decode
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.data.image_folders import Form, ImageFiles, Listing, list_splits
from indistill_fx.data.in_memory import Split, hold
from indistill_fx.data.normalisation import PUBLISHED, Normalisation, Normaliser, choose, measured
from indistill_fx.data.pictures import DEEP_PEAK
from indistill_fx.errors import ConfigError

SMALL = 64
"""Images up to this many pixels a side are held in memory and augmented by shifts; larger ones by random resized
crops."""

MEMORY = 2 << 30
"""Bytes of decoded images up to which a set of small images is held in memory."""

LARGE = (224, 224)
"""What larger images are brought to where neither the user nor the model says another size."""

_MEASURED = 2000
"""Of how many images on disk mean and std are measured, spread over the classes."""

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def open_folder(place: str, options: DataOptions) -> Data:
    """The data set of a folder of images.

    Raises:
        ConfigError: no such folder; a split, class or image is absent, empty or broken; figures that cannot be.
    """
    if not place:
        raise ConfigError("`imagefolder` needs a folder.", where="data", expected="imagefolder:DIR")
    train, test = (listing.limited(options.limit) for listing in list_splits(Path(place)))
    form = Form.of((train, test))
    if form.deep and options.randaugment is not None:
        raise ConfigError(
            f"RandAugment was requested, but images in {place!r} have 16 bits a channel; it supports only 8.",
            where="randaugment",
            got="16 bits",
            expected="8 bits",
            hint="Leave --randaugment out, or convert the images.",
        )
    own_size, channels, peak = (form.height, form.width), options.channels or 3, DEEP_PEAK if form.deep else 255.0
    small = max(options.size or own_size) <= SMALL
    size = options.size or (own_size if small else options.model_size or LARGE)
    default = _known_figures(train.classes, own_size)
    notes: tuple[str, ...] = (
        () if train.labels is not None else (f"{train.folder} has no class folders: its images have no labels.",)
    )
    notes += tuple(dict.fromkeys(listing.note for listing in (train, test) if listing.note))
    count = len(train.files) + len(test.files)
    if small and count * channels * size[0] * size[1] * (2 if form.deep else 1) <= MEMORY:
        decoded = [
            decode(split, size, channels=channels, deep=form.deep, cache=options.cache, progress=options.progress)
            for split in (train, test)
        ]
        resized = sum(pictures.resized for pictures in decoded)
        notes += tuple(pictures.note for pictures in decoded if pictures.note)
        if resized and options.size is None:
            notes += (
                f"{resized:,} of {count:,} images were not {size[0]}x{size[1]} as most are, and were resized to it.",
            )
        held = Split(decoded[0].values, train.labels), Split(decoded[1].values, test.labels)
        augment = of_small_images(options.augment, options.randaugment)
        return hold(*held, train.classes or test.classes, default, options, peak=peak, augment=augment, notes=notes)
    if options.size is None and size != own_size:
        notes += (
            f"Images ({own_size[0]}x{own_size[1]}{' and others' * form.mixed}) are resized and cropped to {size[0]}x{size[1]}.",
        )
    if options.cache is not None:
        notes += ("These images are read from disk as they are needed: --cache has no effect.",)
    return _on_disk((train, test), size, channels, form.deep, default, options, notes)


def _known_figures(classes: tuple[str, ...], size: tuple[int, int]) -> Normalisation:
    """CIFAR-10's own for what has its classes and size, else ImageNet's."""
    return PUBLISHED["cifar10" if size == (32, 32) and list(classes) == _CIFAR10 else "imagenet"]


def _on_disk(
    splits: tuple[Listing, Listing],
    size: tuple[int, int],
    channels: int,
    deep: bool,
    default: Normalisation,
    options: DataOptions,
    notes: tuple[str, ...],
) -> Data:
    train, test = splits
    small = max(size) <= SMALL
    varied, plain = _transforms(size, small, options.randaugment)
    peak = DEEP_PEAK if deep else 255.0

    def files(listing: Listing, transform: Callable[[Any], Tensor], drawn: str | None = None) -> ImageFiles:
        return ImageFiles(listing, transform, channels=channels, deep=deep, randomness=drawn)

    def samples() -> Iterator[Tensor]:
        for image, _ in DiskLoader(files(train.limited(_MEASURED), plain), batch_size=16, workers=options.workers):
            yield image

    figures, note = choose(options.mean, options.std, default, channels, lambda: measured(samples(), peak))
    notes += (note,) if note else ()

    def loader(dataset: ImageFiles, shuffle: bool) -> DiskLoader:
        return DiskLoader(
            dataset,
            normalise=Normaliser(figures, peak),
            batch_size=options.batch_size,
            workers=options.workers,
            seed=options.seed,
            shuffle=shuffle,
            with_indices=options.with_indices and shuffle,
        )

    drawn = f"training images are {'shifted' if small else 'cropped'} and mirrored at random"
    drawn += f", then RandAugment of magnitude {options.randaugment}" if options.randaugment is not None else ""
    training = files(train, varied, drawn) if options.augment else files(train, plain)
    in_turn = loader(files(train, plain), False).mixed(train.labels)
    loaders = loader(training, True), in_turn, loader(files(test, plain), False)
    classes, labelled = train.classes or test.classes, test.labels is not None
    return Data(*loaders, classes, (channels, *size), figures, labelled=labelled, notes=notes)


def _transforms(
    size: tuple[int, int], small: bool, magnitude: int | None
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Training and test transforms of images read one by one, to tensors of pixels."""
    from torchvision.transforms import v2

    pixels = v2.PILToTensor()  # images of more than 8 bits are tensors already
    strong = [] if magnitude is None else [rand_augment(magnitude)]
    if small:
        fit = v2.Resize(size)
        return (
            v2.Compose([fit, v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip(), *strong, pixels]),
            v2.Compose([fit, pixels]),
        )
    edge = round(max(size) * 256 / 224)
    return (
        v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *strong, pixels]),
        v2.Compose([v2.Resize(edge), v2.CenterCrop(size), pixels]),
    )
