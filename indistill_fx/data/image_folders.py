"""Folders of images: which files are samples, of which classes, and how one is read."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from torch import Tensor
from torch.utils.data import Dataset

from indistill_fx.data.pictures import read_head, read_picture
from indistill_fx.errors import ConfigError, instead_of
from indistill_fx.system.files import no_file

_LOOKED_AT = 20_000
"""Of how many images of a split the size and depth are looked at before anything is decoded: some seconds."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Image files of one split, with labels that count the class folders in alphabetical order.

    Attributes:
        folder: of the split.
        files: their paths.
        labels: int64 (files,); None where there are no class folders.
        classes: their names; empty where there are no class folders.
        passed_over: of how many files the name does not end as an image's, by how it ends.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Tensor | None
    classes: tuple[str, ...]
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def limited(self, count: int | None) -> Listing:
        """At most `count` images, spread evenly over the classes; always the same ones."""
        kept = spread(self.ranked_by, count)
        labels = self.labels[kept] if self.labels is not None else None
        return replace(self, files=tuple(self.files[i] for i in kept.tolist()), labels=labels)

    @property
    def note(self) -> str | None:
        """What is to be said of files that were passed over; None if there were none."""
        if not self.passed_over:
            return None
        count, ends = sum(self.passed_over.values()), ", ".join(sorted(self.passed_over)[:8])
        files, whose = ("1 file was", "its name") if count == 1 else (f"{count:,} files were", "their names")
        return f"{self.folder}: {files} not read, because of {whose} ({ends}); images end in {', '.join(_endings())}."

    @property
    def ranked_by(self) -> Tensor:
        """The labels; without labels, one class for all."""
        return self.labels if self.labels is not None else torch.zeros(len(self.files), dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class Form:
    """What the images of a set have in common.

    Attributes:
        height: of most of them, in pixels.
        width: likewise.
        mixed: whether there are others.
        deep: whether some have 16 bits a channel.
    """

    height: int
    width: int
    mixed: bool
    deep: bool

    @staticmethod
    def of(listings: Iterable[Listing]) -> Form:
        """Find it from the headers of at most 20,000 images per split, spread over the classes.

        Raises:
            ConfigError: one cannot be read.
        """
        files = [file for listing in listings for file in listing.limited(_LOOKED_AT).files]
        heads = [read_head(file) for file in files]
        sizes = Counter((head.height, head.width) for head in heads)
        (height, width), _ = max(sizes.items(), key=lambda item: (item[1], item[0]))
        return Form(height, width, len(sizes) > 1, any(head.deep for head in heads))


class ImageFiles(Dataset[Any]):
    """Index -> (transformed image, label); the ConfigError that names the file where it cannot be read.

    Args:
        listing: the files.
        transform: of what `read_picture` gives.
        channels: 3 or 1.
        deep: whether images have 16 bits a channel.
        randomness: what the transform draws at random; None: nothing.
    """

    def __init__(
        self,
        listing: Listing,
        transform: Callable[[Any], Tensor],
        *,
        channels: int = 3,
        deep: bool = False,
        randomness: str | None = None,
    ):
        self.listing, self.transform, self.channels, self.deep = listing, transform, channels, deep
        self.randomness = randomness

    def fingerprint(self) -> str:
        """Digest of the files' names, sizes and times, and of the transform."""
        total = hashlib.sha256(repr((self.transform, self.channels, self.deep)).encode())
        for file in self.listing.files:
            found = stat_of(file)
            total.update(f"{file}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.listing.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int | None] | ConfigError:
        try:
            image = read_picture(self.listing.files[index], channels=self.channels, deep=self.deep)
        except ConfigError as error:
            return error
        labels = self.listing.labels
        return self.transform(image), int(labels[index]) if labels is not None else None


def stat_of(file: str) -> os.stat_result:
    """Size and times of an image file.

    Raises:
        ConfigError: it is there no more.
    """
    hint = "Leave the data set as it is while it is used: open it anew, or put the image back."
    with instead_of(OSError, ConfigError(f"Image {file!r} cannot be read", where=file, hint=hint)):
        return os.stat(file)


def list_splits(folder: Path) -> tuple[Listing, Listing]:
    """The training and the test images of a folder: train/ and test/ (or val/), each with a folder for every class.

    A folder without class folders is an unlabelled set. Where there is no test/ beside it, or no train/ either, the test images are
    the training ones.

    Raises:
        ConfigError: no such folder, a split or class is absent or empty, or the splits differ in their classes.
    """
    if not os.path.isdir(folder):
        raise ConfigError(
            f"{str(folder)!r} is {no_file(folder) or 'a file'}, not a folder."
            if os.path.exists(folder)
            else f"There is no folder {str(folder)!r} (looked in {Path.cwd()}).",
            where=str(folder),
            hint="Check the path; it is taken from the working directory.",
        )
    folders = _visible_folders(folder)
    name = next((name for name in ("test", "val") if name in folders), None)
    if "train" not in folders:
        if name is None and not folders and _pictures_in(folder)[0]:
            alone = list_images(folder)
            return alone, alone
        raise _absent(folder, "train")
    train = list_images(folder / "train")
    if name is None:
        if train.labels is None:
            return train, train
        raise _absent(folder, "test")
    test = list_images(folder / name)
    if train.labels is not None and test.labels is not None and train.classes != test.classes:
        alone_in_one = sorted(set(train.classes) ^ set(test.classes))
        raise ConfigError(
            f"{str(folder)!r}: train/ and {name}/ differ in their classes; only one has {', '.join(alone_in_one[:8])}.",
            where=str(folder),
            got=alone_in_one,
            hint="Labels count the class folders in order, so both splits need the same ones.",
        )
    return train, test


def list_images(folder: Path) -> Listing:
    """The images under `folder`/<class>/, sorted by class and name; those in `folder` itself where there are no class folders.

    Hidden files and folders (`._x.jpg`, `.ipynb_checkpoints/`, `__MACOSX/`) are passed over.

    Args:
        folder: one split.

    Returns:
        Its listing.

    Raises:
        ConfigError: there is nothing, a class folder has no images, or there are images beside class folders.
    """
    classes, (unsorted_images, passed_over) = _visible_folders(folder), _pictures_in(folder)
    if not classes and not unsorted_images:
        raise ConfigError(
            f"{str(folder)!r} has no class folders.",
            where=str(folder),
            expected="folder/<class>/<image>",
            hint="Put the images of each class into a separate folder.",
        )
    if not classes:
        return Listing(folder, tuple(unsorted_images), None, (), passed_over)
    if unsorted_images:
        raise ConfigError(
            f"{str(folder)!r} has images outside of the class folders, such as {Path(unsorted_images[0]).name!r}.",
            where=str(folder),
            got=unsorted_images[0],
            expected="folder/<class>/<image>, or images only",
            hint="Put every image in the folder of its class.",
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found, others = _pictures_in(folder / name, below=True)
        passed_over += others
        if not found:
            raise ConfigError(
                f"Class folder {str(folder / name)!r} has no images.",
                where=str(folder / name),
                expected=f"files ending in {', '.join(_endings())}",
                hint="Add images or remove the folder.",
            )
        files += found
        labels += [label] * len(found)
    names = tuple(normalize("NFC", name) for name in classes)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{str(folder)!r} has two class folders called {twice[0]!r}, whose names differ only in how their accents are encoded.",
            where=str(folder),
            got=twice,
            hint="Move the images of one into the other.",
        )
    return Listing(folder, tuple(files), torch.tensor(labels), names, passed_over)


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


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What a folder holds, without what is hidden.

    Raises:
        ConfigError: a link leads nowhere that seems to be one to a folder, as of a disk that is not mounted: its images would be missing.
    """
    found = [entry for entry in os.scandir(folder) if not _is_hidden(entry.name)]
    for entry in found:
        if entry.is_symlink() and not Path(entry).suffix and not os.path.exists(entry):
            raise ConfigError(
                f"{entry.path!r} is a link to {os.readlink(entry)!r}, where nothing is.",
                where=entry.path,
                hint="Mount the disk that it leads to, mend the link, or remove it.",
            )
    return found


def _entries_below(folder: str | Path, inside: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
    """Likewise, in place of subfolders what they hold, through links too; a folder that links to one around it adds nothing."""
    here = os.path.realpath(folder)
    for entry in _entries(folder) if here not in inside else ():
        if entry.is_dir():
            yield from _entries_below(entry.path, (*inside, here))
        else:
            yield entry


def _visible_folders(folder: Path) -> list[str]:
    """Sorted as they read: macOS writes é as two characters, other systems as one."""
    found = [entry.name for entry in _entries(folder) if entry.is_dir()]
    return sorted(found, key=lambda name: normalize("NFC", name))


def _pictures_in(folder: Path, *, below: bool = False) -> tuple[list[str], Counter[str]]:
    """Image files of a folder, sorted by name, and how many other files there are, by how their names end.

    `below`: including those in its subfolders.
    """
    found, others, endings = list[str](), Counter[str](), _endings()
    for entry in _entries_below(folder, (os.path.realpath(folder.parent),)) if below else _entries(folder):
        if not entry.name.lower().endswith(endings):
            if entry.is_file():
                others[Path(entry).suffix.lower() or entry.name] += 1
        elif not entry.is_dir():
            found.append(entry.path)
    return sorted(found), others


def _endings() -> tuple[str, ...]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    return tuple(IMG_EXTENSIONS)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def _absent(folder: Path, name: str) -> ConfigError:
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    return ConfigError(
        f"{str(folder)!r} has no {name}/; it contains {found}.",
        where=str(folder),
        got=found,
        expected="train/<class>/ and test/<class>/ (or val/<class>/)",
        hint=f"Give the folder that holds both splits. If there is only one, move part of it: {name}/<class>/ for each class.",
    )
