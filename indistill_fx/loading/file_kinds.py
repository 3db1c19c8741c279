"""What kind of file is this? Decided by its content, never by its name; zip archives that mean one thing only; folders of models."""

from __future__ import annotations

import codecs
import os
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, Literal

from indistill_fx.errors import ConfigError, nearest
from indistill_fx.system.files import LONGEST_HEADER, no_file, parse_json, read_json

FileKind = Literal["torch", "torch-legacy", "export", "safetensors", "onnx"]

CONFIGURATION = "config.json"
PREPROCESSING = "preprocessor_config.json"
_MAGIC_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_HEAD = 4096
_UNREADABLE = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error)

# The first bytes of a file -> its kind, and what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "Fetch it with `git lfs pull`."),
    (b"\x89HDF", "an HDF5 file (Keras?)", "Only PyTorch models can be read."),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
    (b"\x93NUMPY", "a numpy array", "Save the model by torch.save(model, path)."),
    (b"\x80", "a plain pickle, not written by torch.save", "Save the model by torch.save(model, path)."),
)
SAVE_AGAIN = "Save it again with a current PyTorch: torch.save(model, path)."


def recognise(path: Path) -> FileKind:
    """The kind of a model or weights file.

    Args:
        path: what the user named.

    Returns:
        `torch` (a zip of torch.save), `torch-legacy` (torch.save before 1.6), `export` (a `.pt2`), `safetensors` or `onnx`.

    Raises:
        ConfigError: there is no such file, or it is of a kind that cannot be read; says which and what to do.
    """
    try:
        _require_file(path)
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"`{path}` cannot be read: {error}.",
            where=str(path),
            got=str(error),
            hint="Check that it is there and that you may read it.",
        ) from error
    if head.startswith(b"PK"):
        return _recognise_zip(path)
    if head.startswith(_MAGIC_LEGACY):
        return "torch-legacy"
    if _is_safetensors(head, path.stat().st_size):
        return "safetensors"
    if head.startswith(b"\x08"):  # the version field, which comes first in an ONNX file
        return "onnx"
    if head[257:262] == b"ustar":
        raise _refuse(path, "a tar archive (PyTorch before 0.1.10, or .tar of files)", SAVE_AGAIN)
    for signature, description, hint in _SIGNATURES:
        if head.startswith(signature):
            raise _refuse(path, description, hint)
    if (text := _as_text(head)) is not None:
        first = text.strip().splitlines()[0][:60] if text.strip() else ""
        raise _refuse(path, f"a text file that begins with {first!r}", "For Python code write file.py:make_model.")
    raise _refuse(
        path,
        "not a model file, or its beginning is damaged",
        "Supported files are .pt, .pth, .pt2, .onnx and .safetensors.",
    )


def _require_file(path: Path) -> None:
    if path.is_dir():
        suffixes = (".pt", ".pth", ".pt2", ".safetensors")
        files = sorted(entry.name for entry in path.iterdir() if entry.suffix in suffixes)
        hint = f"It holds {', '.join(files[:5])}." if files else "Name a file in it."
        raise ConfigError(f"`{path}` is a directory, not a model file.", where=str(path), hint=hint)
    if not path.exists():
        folder = path.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        hint = nearest(path.name, names) if folder.is_dir() else f"There is no directory `{folder}` either."
        raise ConfigError(f"There is no file `{path}` (looked in {Path.cwd()}).", where=str(path), hint=hint)
    if found := no_file(path):
        raise ConfigError(f"`{path}` is {found}, not a file.", where=str(path), hint="Give the path of a model file.")
    if path.stat().st_size == 0:
        raise ConfigError(f"`{path}` is empty.", where=str(path), got="0 bytes", hint="Copy or download it again.")


def _recognise_zip(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] or name for name in archive.namelist()}
    except _UNREADABLE as error:
        raise damaged(str(path), str(error)) from error
    if "constants.pkl" in names:
        description = "a TorchScript archive, whose graph cannot be read as a PyTorch module"
        raise _refuse(path, description, "Save the module it was made from: torch.save(model, path).")
    if "serialized_exported_program.json" in names:
        raise _refuse(path, "a torch.export archive of PyTorch 2.7 or older", SAVE_AGAIN)
    if any(name.startswith(".data/extern_modules") for name in names):
        raise _refuse(path, "a torch.package archive, which carries its own code", SAVE_AGAIN)
    if "archive_format" in names:
        return "export"
    if "data.pkl" in names:
        return "torch"
    description = (
        "a numpy archive (.npz)" if any(name.endswith(".npy") for name in names) else "a zip archive without a model"
    )
    raise _refuse(path, description, SAVE_AGAIN)


def open_zip(file: BinaryIO, label: str) -> zipfile.ZipFile:
    """Open a zip archive that every reader reads alike, and that holds no more than its size.

    Python's and PyTorch's readers disagree on archives with junk around them or one name twice, so that what was
    checked would not be what is loaded; a compressed entry can unpack to any size. torch.save writes neither.

    Raises:
        ConfigError: the archive is damaged, ambiguous or compressed.
    """
    try:
        archive = zipfile.ZipFile(file)
        entries = archive.infolist()
        file.seek(-22, 2)
        end = file.tell()
        signature, *_, directory_bytes, directory_start, comment = struct.unpack("<4s4H2LH", file.read(22))
        file.seek(0)
    except _UNREADABLE as error:
        raise damaged(label, str(error)) from error
    gap = end - directory_start - directory_bytes  # 0, or 76 for a zip64 record
    if signature != b"PK\x05\x06" or comment or (gap not in (0, 76) and directory_start != 0xFFFFFFFF):
        raise damaged(label, "the archive does not end where its directory says")
    if not entries or min(entry.header_offset for entry in entries) != 0:
        raise damaged(label, "the archive does not begin with its first entry")
    if len({entry.filename.lower() for entry in entries}) != len(entries):
        raise damaged(label, "the archive holds one name twice")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ConfigError(f"`{label}` has compressed entries; torch.save writes none.", where=label, hint=SAVE_AGAIN)
    if sum(entry.file_size for entry in entries) > end:
        raise damaged(label, "its entries are said to be larger than the file")
    return archive


def damaged(label: str, reason: str) -> ConfigError:
    """The error for a file that cannot be read to its end."""
    reason = " ".join(reason.split())[:300].rstrip(".")
    return ConfigError(f"`{label}` is damaged: {reason}.", where=label, got=reason, hint="Copy or download it again.")


def _refuse(path: Path, description: str, hint: str) -> ConfigError:
    return ConfigError(
        f"`{path}` is {description}.", where=str(path), got=description, expected="a PyTorch model file", hint=hint
    )


def _is_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and length <= size - 8


def count_safetensors(path: Path) -> int:
    """How many tensors a safetensors file holds; only its header is read.

    Raises:
        ConfigError: the header is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            return len(parse_json(file.read(min(length, LONGEST_HEADER))).keys() - {"__metadata__"})
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise damaged(str(path), str(error)) from error


def _as_text(head: bytes) -> str | None:
    if b"\0" in head:
        return None
    try:
        # the incremental decoder accepts a character that is cut off at the end
        return codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return None


def is_model_folder(path: Path) -> bool:
    """Whether a path is a folder with the configuration of a model of transformers, timm or another library of Hugging Face's."""
    return os.path.isfile(path / CONFIGURATION)  # False for a name that is too long or holds a zero byte


def read_configuration(folder: Path, name: str = CONFIGURATION) -> dict[str, Any]:
    """A JSON file in a model's folder; empty if there is none.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        held = read_json(folder / name, LONGEST_HEADER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(str(folder / name), str(error)) from error
    if not isinstance(held, dict):
        raise damaged(str(folder / name), "it holds no object")
    return held
