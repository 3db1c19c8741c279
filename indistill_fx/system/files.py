"""Files: written whole or not at all, and read within bounds."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from indistill_fx.errors import ConfigError, TrainError, instead_of
from indistill_fx.system.shortage import advice, lost_folder
from indistill_fx.system.signals import held_back

_DRAFT = ".draft"
MOST_VALUES = 1 << 20
"""Values that a JSON text of ours may hold. In memory each takes some hundred bytes, however short its text is."""
LONGEST_HEADER = 16 << 20
"""Bytes of a safetensors file's header, which has about a hundred for each tensor. The library reads 100 MB, which take gigabytes."""


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `path`, make sure that it is on the disk, then give it the name: all of it or nothing.

    Args:
        path: the name in the end.
        write: writes the draft it is given.

    Raises:
        TrainError: the disk is full, or the place cannot be written; what lay at `path` is still there.
    """
    try:
        with _drafted(path) as draft:
            write(draft)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> TrainError:
    """The error for a file of a run that cannot be written."""
    if (lost := lost_folder(path)) is not None:
        return TrainError(
            f"{path} cannot be written: the folder {lost} is gone.",
            where=str(path),
            hint="It was deleted, renamed or unmounted meanwhile. Put it back and go on with resume=True (--resume), or start again.",
        )
    remedy = advice(error) or "Free some space, or make the folder writable"
    return TrainError(
        f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.",
        where=str(path),
        hint=f"What was there before is unchanged. {remedy}, and try again; a run continues with resume=True (--resume).",
    )


@contextmanager
def _drafted(target: Path) -> Iterator[Path]:
    """A place for the draft, in a folder of its own beside the target; all that is in it gets its name there if the block succeeds.

    The folder has a name that nobody can foresee, and what other programs leave in it when they are killed goes with it.

    Raises:
        OSError: the place cannot be written.
    """
    clear_drafts(target.parent, target.name)
    prefix = f".{target.name[:100]}."
    with (
        tempfile.TemporaryDirectory(
            prefix=prefix, suffix=_DRAFT, dir=target.parent, ignore_cleanup_errors=True
        ) as name,
        _being_written(folder := Path(name)),
    ):
        draft = folder / target.name
        draft.touch(exist_ok=False)
        permissions = stat.S_IMODE(draft.stat().st_mode)
        yield draft
        # In the order in which they were written, but the model file last, because other programs wait for it.
        parts = sorted(folder.iterdir(), key=lambda part: (part == draft, part.stat().st_mtime_ns))
        for part in parts:
            if stat.S_IMODE(part.stat().st_mode) != permissions:
                part.chmod(permissions)  # safetensors makes files that only their owner may read
            _sync(part)
        with held_back():
            for part in parts:
                os.replace(part, target.parent / part.name)
    _sync(target.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, which is made if it is not there; a link is not followed.

    Raises:
        OSError: the place cannot be written, or the path is a link.
    """
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def _being_written(draft: Path) -> Iterator[None]:
    """Within the block, other processes see that the draft, a file or folder, is being written. The mark ends with the process."""
    descriptor = os.open(draft, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        _mark(descriptor)
        yield
    finally:
        os.close(descriptor)


def _mark(descriptor: int) -> bool:
    """Mark the draft; False if another process has marked it, or if the file system does not support locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, ImportError):
        return False
    return True


def clear_drafts(folder: Path, name: str = "") -> None:
    """Remove what killed processes left of their drafts: of one file, or of all in a folder. Those with a living writer stay."""
    for entry in folder.glob(f".{glob.escape(name[:100])}*{_DRAFT}"):
        with suppress(OSError):
            if entry.is_symlink():
                entry.unlink()
                continue
            descriptor = os.open(entry, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if _mark(descriptor):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            finally:
                os.close(descriptor)


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file, all of it or nothing.

    Raises:
        TrainError: the place cannot be written.
    """
    replace_file(path, lambda draft: draft.write_text(json_text(value, indent=2) + "\n", encoding="utf-8"))


def json_text(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON of plain values; `default` makes plain what is none. What is not a finite number is null: JSON has no word for it.

    >>> json_text({"loss": float("nan")})
    '{"loss": null}'
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=default)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False, default=default)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a directory, and its rename needs no sync
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file at once or not at all.

    Args:
        path: of the file.
        content: text, or the bytes of an image.

    Raises:
        ConfigError: it cannot be written.
    """
    with staged(Path(path)) as draft:
        draft.write_bytes(content.encode("utf-8", errors="replace") if isinstance(content, str) else content)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A place for the draft beside the target; what is there moves to the target's name if the block succeeds."""
    require_replaceable(target)
    try:
        with _drafted(target) as draft:
            yield draft
    except OSError as error:
        raise ConfigError(
            f"Cannot write `{target}`: {error.strerror or error}.", where=str(target),
            hint=f"{advice(error) or 'Give another path, in a folder that exists and may be written'}; an existing file is unchanged.",
        ) from error  # fmt: skip


def make_folder(folder: Path) -> None:
    """Make a folder for outputs, before anything is computed.

    Raises:
        ConfigError: it cannot be made.
    """
    hint = "Name another folder, or make its parent writable."
    with instead_of(OSError, ConfigError(f"The folder `{folder}` cannot be made", where=str(folder), hint=hint)):
        folder.mkdir(parents=True, exist_ok=True)


def try_folder(folder: Path) -> None:
    """Make sure that a folder for outputs can be made and written, before anything is computed; nothing is left of it.

    Raises:
        ConfigError: it cannot be made, or nothing can be written in it.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    make_folder(folder)
    try:
        _try_writing(folder)
    finally:
        for place in missing:
            place.rmdir()


def try_file(target: Path) -> None:
    """Make sure that a file can be written, before anything is computed; nothing is left of it, and an existing file is unchanged.

    Raises:
        ConfigError: it cannot be written.
    """
    require_replaceable(target)
    _try_writing(target.parent)


def require_replaceable(target: Path) -> None:
    """Refuse what is there and no file: a directory, and devices, pipes and sockets, which the file would replace.

    Raises:
        ConfigError: it is one.
    """
    if found := no_file(target) or ("" if target.name else "a directory"):
        raise ConfigError(f"Cannot write `{target}`: it is {found}.", where=str(target), hint="Name a file.")


_KINDS: dict[str, Callable[[int], bool]] = {
    "a directory": stat.S_ISDIR,
    "a named pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def whole(path: str | os.PathLike[str] | None) -> Path | None:
    """The whole path of what is given, as long as the working directory is that of the caller: data of the user's own may change it."""
    return Path(path).absolute() if path is not None else None


def shown(path: Path) -> str:
    """A path for a message: from the working directory on if it lies there, else whole."""
    here = Path.cwd()
    return str(path.relative_to(here) if path != here and path.is_relative_to(here) else path)


def no_file(path: str | os.PathLike[str]) -> str:
    """What is at a path instead of a file, such as `a named pipe`; empty if a file is there, or nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return ""
    return next((kind for kind, is_it in _KINDS.items() if is_it(mode)), "")


def _try_writing(folder: Path) -> None:
    hint = "Free some space, or name another folder that exists and may be written."
    refusal = ConfigError(f"Nothing can be written in `{folder}`", where=str(folder), hint=hint)
    with instead_of(OSError, refusal), tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(4096))


class TooLargeError(OSError):
    """The file is larger than any of its kind can be."""


def read_bounded(path: str | os.PathLike[str], limit: int) -> str:
    """The text of a file.

    Args:
        path: of a regular file; of pipes and devices nothing is read, and a pipe is not waited for.
        limit: bytes it may have. No more are read, whatever the file system says of its size.

    Raises:
        OSError: it cannot be read, is not a file, or is larger than the limit.
        UnicodeDecodeError: it is not UTF-8.
    """
    try:
        _refuse_no_file(path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # raised for a name with a zero byte
        raise OSError(str(error)) from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it was replaced by what is no file", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise TooLargeError(27, f"it is larger than {limit >> 20} MiB", str(path))
    return content.decode("utf-8-sig")  # editors on Windows begin a file with a byte order mark


def read_json(path: str | os.PathLike[str], limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises:
        OSError: see `read_bounded` and `require_few_values`.
        ValueError: it is not JSON, or not UTF-8.
        RecursionError: it is nested too deeply.
    """
    return parse_json(read_bounded(path, limit))


def parse_json(text: str | bytes, most: int = MOST_VALUES) -> Any:
    """The value of a JSON text that holds at most so many values.

    Raises:
        TooLargeError: it holds more.
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    require_few_values(text, most)
    return json.loads(text)


def require_few_values(text: str | bytes, most: int = MOST_VALUES) -> None:
    """Refuse a JSON text that would take much more memory than its bytes. Every value but the first comes after a comma or a bracket.

    Raises:
        TooLargeError: it holds more values.
    """
    content = text.encode(errors="replace") if isinstance(text, str) else text
    if sum(map(content.count, (b",", b"[", b"{"))) > most:
        raise TooLargeError(27, f"it holds more than {most:,} values")


def read_lines(path: str | os.PathLike[str], limit: int = 1 << 20, *, most: int | None = None) -> Iterator[str]:
    """The lines of a file; one longer than the limit comes in pieces.

    Raises:
        OSError: it cannot be read, is not a file, or has more than `most` bytes.
    """
    require_regular(path)
    if most is not None and os.path.getsize(path) > most:
        raise TooLargeError(27, f"it is larger than {most >> 20} MiB", str(path))
    with open(path, encoding="utf-8", errors="replace") as file:
        while line := file.readline(limit):
            yield line


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        OSError: it cannot be read, or is not a file.
    """
    require_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what would be waited for, or has no end.

    Raises:
        OSError: it is not there, or no regular file.
    """
    os.stat(path)
    _refuse_no_file(path)


def _refuse_no_file(path: str | os.PathLike[str]) -> None:
    if found := no_file(path):
        raise OSError(errno.EINVAL, f"it is {found}, not a file", str(path))
