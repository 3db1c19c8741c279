"""One image from a file: upright, with the requested number of channels, and with all its bits."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, first_lines
from indistill_fx.system.files import require_regular
from indistill_fx.system.shortage import advice

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What an image file may be, whatever its name says. Not EPS, for example: Pillow has Ghostscript run that."""

_MOST_BYTES = 512 << 20
"""Of an image's file: 89 million pixels of four bytes, and their metadata. Pillow reads metadata whole; compressed text of a PNG to 1 MiB
a piece, 64 MiB in all."""

_MOST_SCANS = 100
"""Of a JPEG, as libtiff has it; a progressive one has about ten. Each goes over the whole image, and an empty one takes 130 bytes."""

_ORIENTATION, _SIDEWAYS = 0x0112, 5
"""EXIF's tag, and its first value that exchanges height and width."""

DEEP_PEAK = 65535.0
"""White in images of 16 bits a channel."""


@dataclass(frozen=True, slots=True)
class Head:
    """What an image's file says of it before it is decoded.

    Attributes:
        height: of the upright image, in pixels.
        width: likewise.
        deep: whether it has 16 bits a channel.
    """

    height: int
    width: int
    deep: bool


def read_head(path: str) -> Head:
    """Size and depth of an image.

    Raises:
        ConfigError: see `read_picture`.
    """
    with _opened(path) as image:
        height, width = image.height, image.width
        if _orientation(image) >= _SIDEWAYS:
            height, width = width, height
        return Head(height, width, _is_deep(image))


def read_picture(path: str, *, channels: int = 3, deep: bool = False) -> Any:
    """The image, turned upright by its EXIF tag. Palettes, CMYK and others become plain channels; transparency is left out.

    Args:
        path: of the file.
        channels: 3 for RGB; 1 for grey.
        deep: whether it belongs to a set with 16 bits a channel.

    Returns:
        A PIL image; of a deep set a float32 tensor (channels, height, width) of values from 0 to 65535 (8-bit images times 257).

    Raises:
        ConfigError: it is not an image, broken, of more pixels than Pillow takes for harmless (89 million), of values whose range
            cannot be known, of 16-bit colours, or of 16 bits in a set that is not deep; the message names the file.
    """
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            _require_few_scans(path)
        if not _is_deep(image):
            plain = _upright(image).convert("RGB" if channels == 3 else "L")
            return _as_tensor(np.asarray(plain)) * 257.0 if deep else plain
        if deep:
            return _as_tensor(np.asarray(_upright(image))).expand(channels, -1, -1)
    raise ConfigError(
        f"Image {path!r} has 16 bits a channel, but the others have 8.",
        where=path,
        got="16 bits",
        expected="8 bits",
        hint="Convert it, or the others, so that all have the same depth.",
    )


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    from PIL import Image

    try:
        require_regular(path)
        _require_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                yield image
    except ConfigError:
        raise
    except Exception as error:  # the file may hold any bytes, so Pillow may raise anything
        reason = first_lines(error)
        raise ConfigError(
            f"Image {path!r} cannot be read: {reason}",
            where=path,
            got=reason,
            hint=f"{advice(error) or 'Replace or remove it'}.",
        ) from error


def _require_size(path: str) -> None:
    if (size := os.path.getsize(path)) > _MOST_BYTES:
        raise ValueError(f"the file has {size:,} bytes, more than any image of 89 million pixels needs")


def _require_few_scans(path: str) -> None:
    with open(path, "rb") as file:
        scans = file.read(_MOST_BYTES).count(b"\xff\xda")  # among coded pixels there is no such pair
    if scans > _MOST_SCANS:
        raise ValueError(f"it goes over its pixels {scans:,} times; at most {_MOST_SCANS} are read")


def _is_deep(image: Any) -> bool:
    """Whether it is grey of 16 bits, which Pillow gives as I;16, or as I where the format says that white is 65535.

    Raises:
        ValueError: its values have no known range, or Pillow would read half of their bits.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return True
    if image.mode in ("I", "F"):
        raise ValueError(
            f"it has {'floating-point' if image.mode == 'F' else '32-bit'} values, and which of them is white is not known; "
            "save it with 8 or 16 bits a channel"
        )
    for _, _, _, stored in getattr(image, "tile", ()):
        for argument in stored if isinstance(stored, tuple) else (stored,):
            deep = (
                ";16" in argument if isinstance(argument, str) else image.format == "PPM" and int(argument or 0) > 255
            )
            if deep:
                raise ValueError(
                    "it has colours of 16 bits, of which only 8 could be read; save it with 8 bits a channel, or as grey of 16"
                )
    return False


def _as_tensor(pixels: Any) -> Tensor:
    values = torch.from_numpy(pixels.astype(np.float32))
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1)


def _orientation(image: Any) -> int:
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        # Looking for a tag behind the pixels would make Pillow decode the whole image.
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a damaged tag is ignored
        return 1


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    image.load()  # in a PNG, the tag may follow the pixels
    return ImageOps.exif_transpose(image) if 1 < _orientation(image) <= 8 else image
