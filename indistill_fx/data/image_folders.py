"""Folders of images: listed, checked, decoded once into memory (optionally kept in a cache), or read one by one."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from indistill_fx.errors import ConfigError
from indistill_fx.system.files import require_regular
from indistill_fx.system.terminal import followed

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What an image file may be, whatever its name says. Not EPS, for example: Pillow has Ghostscript run that."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Image files of one split, with labels that count the class folders in alphabetical order."""

    folder: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def limited(self, count: int | None) -> Listing:
        """Only so many, as evenly over the classes as they come, the same ones every time."""
        kept = spread(self.labels, count)
        return Listing(self.folder, tuple(self.files[i] for i in kept.tolist()), self.labels[kept], self.classes)


class ImageFiles(Dataset[Any]):
    """Index -> (transformed image, label); the ConfigError that names the file where it cannot be read.

    Args:
        listing: the files.
        transform: of a PIL image.
        randomness: what the transform draws at random; None: nothing.
    """

    def __init__(self, listing: Listing, transform: Callable[[Any], Tensor], *, randomness: str | None = None):
        self.listing, self.transform, self.randomness = listing, transform, randomness

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and times, and of the transform."""
        total = hashlib.sha256(repr(self.transform).encode())
        for file in self.listing.files:
            found = os.stat(file)
            total.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | ConfigError:
        try:
            image = read_image(self.listing.files[index])
        except ConfigError as error:
            return error
        return self.transform(image), int(self.listing.labels[index])


def list_images(folder: Path) -> Listing:
    """The images under `folder`/<class>/, sorted by class and name.

    Args:
        folder: one split.

    Returns:
        Its listing.

    Raises:
        ConfigError: there are no class folders, or one has no images.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ConfigError(
            f"{str(folder)!r} has no class folders.",
            where=str(folder),
            expected="folder/<class>/<image>",
            hint="Put the images of each class in a folder of its own.",
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in map(str, (folder / name).rglob("*")) if file.lower().endswith(IMG_EXTENSIONS))
        if not found:
            raise ConfigError(
                f"Class folder {str(folder / name)!r} has no images.",
                where=str(folder / name),
                expected=f"files ending in {', '.join(IMG_EXTENSIONS)}",
                hint="Add images or remove the folder.",
            )
        files += found
        labels += [label] * len(found)
    return Listing(folder, tuple(files), torch.tensor(labels), tuple(classes))


def read_image(path: str) -> Any:
    """The file as an RGB PIL image.

    Raises:
        ConfigError: it is no image, broken, or of more pixels than Pillow takes for harmless (89 million); the message
            names the file.
    """
    from PIL import Image

    try:
        require_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                return image.convert("RGB")
    except Exception as error:  # any bytes at all may come here
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"Image {path!r} cannot be read: {reason}.",
            where=path,
            got=reason,
            hint="Replace or remove it.",
        ) from error


def decode(
    listing: Listing, size: tuple[int, int], *, resize: bool, cache: Path | None = None, progress: bool = False
) -> Tensor:
    """All images as one uint8 tensor (count, 3, height, width).

    Args:
        listing: the files.
        size: height and width.
        resize: bring images of another size to it; else they are refused.
        cache: a folder that keeps the result for the next time; it is found again as long as no file changed.
        progress: show a bar where standard error is a terminal.

    Returns:
        The images, in the listing's order.

    Raises:
        ConfigError: an image is broken, or of another size.
    """
    if cache is None:
        return _decoded(listing, size, resize=resize, progress=progress)
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    place = cache / f"{_digest(listing, size)}.safetensors"
    if place.is_file():
        try:
            return _fitting(load_file(place)["images"], len(listing.files), size)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise ConfigError(
                f"Cache {str(place)!r} is broken: {error}.", where=str(place), hint="Remove it."
            ) from error
    images = _decoded(listing, size, resize=resize, progress=progress)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # renamed only when whole
            save_file({"images": images}, Path(folder, "images"))
            Path(folder, "images").replace(place)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Cache {str(place)!r} cannot be written: {error}.", where=str(cache), hint="Give another folder, or none."
        ) from error
    return images


def spread(labels: Tensor, count: int | None) -> Tensor:
    """Indices of `count` samples (all for None), as evenly over the classes as they come; no randomness."""
    if count is None or count >= len(labels):
        return torch.arange(len(labels))
    if count < 1:
        raise ConfigError(f"limit is {count}.", where="limit", got=count, expected="at least 1")
    return torch.argsort(rank_in_class(labels), stable=True)[:count].sort().values


def rank_in_class(labels: Tensor) -> Tensor:
    """For each sample, how many of its class stand before it."""
    order = torch.argsort(labels, stable=True)
    counts = torch.bincount(labels)
    starts = (counts.cumsum(0) - counts)[labels[order]]
    ranks = torch.empty_like(labels)
    ranks[order] = torch.arange(len(labels)) - starts
    return ranks


def _decoded(listing: Listing, size: tuple[int, int], *, resize: bool, progress: bool) -> Tensor:
    from PIL import Image

    images = np.empty((len(listing.files), *size, 3), np.uint8)
    for i, path in enumerate(followed(listing.files, f"Decoding {listing.folder}", shown=progress)):
        image = read_image(path)
        if image.size != size[::-1]:
            if not resize:
                raise ConfigError(
                    f"Image {path!r} is {image.height}x{image.width}, but the first one is {size[0]}x{size[1]}.",
                    where=path,
                    got=(image.height, image.width),
                    expected=size,
                    hint="Give a size to bring all images to it.",
                )
            image = image.resize(size[::-1], Image.Resampling.BILINEAR)
        images[i] = image
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _fitting(images: Tensor, count: int, size: tuple[int, int]) -> Tensor:
    if images.dtype != torch.uint8 or images.shape != (count, 3, *size):
        raise ValueError("it holds other images")
    return images


def _digest(listing: Listing, size: tuple[int, int]) -> str:
    digest = hashlib.sha256(repr((size, str(listing.folder.resolve()))).encode())
    for path in listing.files:
        status = os.stat(path)
        digest.update(f"{path.removeprefix(str(listing.folder))}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]
