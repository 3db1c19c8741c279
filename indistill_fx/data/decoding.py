"""Small images, decoded once into memory, and kept on disk if a cache is given."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from indistill_fx.data.image_folders import Listing
from indistill_fx.data.pictures import read_picture
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.system.files import clear_drafts, try_folder
from indistill_fx.system.tensor_files import load_tensors, save_tensors
from indistill_fx.system.terminal import followed

_FORMAT = "pictures 3"


@dataclass(frozen=True, slots=True)
class Pictures:
    """Decoded images.

    Attributes:
        values: uint8, or uint16 of deep ones: (count, channels, height, width), in the listing's order.
        resized: how many had another size.
        note: what was found of a cache that was damaged; else empty.
    """

    values: Tensor
    resized: int
    note: str = ""


def decode(
    listing: Listing,
    size: tuple[int, int],
    *,
    channels: int = 3,
    deep: bool = False,
    cache: Path | None = None,
    progress: bool = False,
) -> Pictures:
    """All images in one tensor; those of another size are resized.

    Args:
        listing: the files.
        size: height and width.
        channels: 3 or 1.
        deep: keep 16 bits a channel.
        cache: a folder that keeps the result for the next time; it is found again as long as no file changed.
        progress: show a bar where standard error is a terminal.

    Raises:
        ConfigError: an image is broken, or the cache cannot be written. A damaged cache is reported and recreated.
    """
    if cache is None:
        return _decoded(listing, size, channels, deep, progress)
    place, note = cache / f"{_digest(listing, (size, channels, deep))}.safetensors", ""
    try:
        return _kept(place, (len(listing.files), channels, *size))
    except FileNotFoundError:
        pass
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        note = f"The decoded images in {place} were damaged ({error}) and were decoded anew."
    try_folder(cache)
    found = replace(_decoded(listing, size, channels, deep, progress), note=note)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / ".lock"):
            clear_drafts(cache)
            save_tensors(place, {"images": found.values, "resized": torch.tensor(found.resized)}, {"format": _FORMAT})
    except (OSError, TrainError) as error:
        reason = error.__cause__ or error
        if not any(cache.glob("*.safetensors")):
            with suppress(OSError):
                (cache / ".lock").unlink()  # no image was stored, so do not leave an empty cache behind
        raise ConfigError(
            f"Cache {str(place)!r} cannot be written: {getattr(reason, 'strerror', None) or reason}.",
            where=str(cache),
            hint="Give another folder, or leave cache (--cache) out.",
        ) from error
    return found


def _decoded(listing: Listing, size: tuple[int, int], channels: int, deep: bool, progress: bool) -> Pictures:
    from PIL import Image

    values = np.empty((len(listing.files), channels, *size), np.uint16 if deep else np.uint8)
    resized = 0
    for i, path in enumerate(followed(listing.files, f"Decoding {listing.folder}", shown=progress)):
        picture = read_picture(path, channels=channels, deep=deep)
        found = tuple(picture.shape[1:]) if isinstance(picture, Tensor) else picture.size[::-1]
        resized += found != size
        if isinstance(picture, Tensor):
            values[i] = (picture if found == size else _resized(picture, size)).numpy()
            continue
        if found != size:
            picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
        values[i] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return Pictures(torch.from_numpy(values), resized)


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2.functional import resize

    found: Tensor = resize(picture, list(size), antialias=True)
    return found.round().clamp(0, 65535)


def _kept(place: Path, shape: tuple[int, ...]) -> Pictures:
    """Read the decoded images from the cache.

    Raises:
        OSError: there are none, or they cannot be read.
        ValueError: they were changed since they were written, or are something else.
    """
    kept, header = load_tensors(place)
    images = kept["images"]
    if header != {"format": _FORMAT}:
        raise ValueError("its header was changed")
    if images.dtype not in (torch.uint8, torch.uint16) or images.shape != shape:
        raise ValueError("it holds other images")
    return Pictures(images, int(kept["resized"]))


def _digest(listing: Listing, form: object) -> str:
    digest = hashlib.sha256(repr((_FORMAT, form, str(listing.folder.resolve()))).encode())
    for path in listing.files:
        status = os.stat(path)
        digest.update(f"{path.removeprefix(str(listing.folder))}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:32]
