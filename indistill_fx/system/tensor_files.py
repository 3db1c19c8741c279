"""Tensors on disk: safetensors files, written whole or not at all, that carry a digest of every tensor and of their header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from indistill_fx.system.files import LONGEST_HEADER, parse_json, replace_file, require_regular

_DIGESTS = "sha256"
"""Entry of a file's header: the digest of each tensor by name, and under the empty name that of the header's other entries."""


_TRIES = 5
"""How often a file that is replaced while it is read is read again."""


class DamagedFileError(ValueError):
    """A file was changed since it was written, or is none of its kind."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, all of it or nothing. Tensors that share memory are written one by one.

    Raises:
        TrainError: the place cannot be written.
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    entries = dict(header or {})
    digests = {"": text_digest(entries)} | {name: _digest(tensor) for name, tensor in copies.items()}
    replace_file(path, lambda draft: save_file(copies, draft, metadata=entries | {_DIGESTS: json.dumps(digests)}))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file, and compare what it holds with its digests, if it has any: other programs' and those of 0.1.0 have none.

    A file that is replaced meanwhile, such as the checkpoint of a run that goes on, is read again: safetensors opens it twice.

    Returns:
        The tensors by name, on the CPU, and the header's other entries.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is no such file, or a tensor or its header was changed; names which.
    """
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            found = _read(path)
        except DamagedFileError:
            if _identity(path) == before:
                raise
        else:
            if _identity(path) == before:
                return found
    raise DamagedFileError("it was replaced again and again while it was read")


def _identity(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except ValueError:  # a name that no file can have
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        require_header(path)
        with safe_open(path, framework="pt") as file:
            entries = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise DamagedFileError(str(error) or type(error).__name__) from error
    digests = entries.pop(_DIGESTS, None)
    if digests is not None and (changed := list(_changed(tensors, entries, digests))):
        more = f" and {len(changed) - 1} more" if changed[1:] else ""
        raise DamagedFileError(f"{changed[0]}{more} was changed since it was written")
    return tensors, entries


def header_of(path: Path) -> dict[str, str]:
    """The entries of a safetensors file's header; none where it cannot be read."""
    try:
        require_header(path)
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return {}


def require_header(path: Path) -> None:
    """Refuse a header that takes gigabytes once it is read.

    Raises:
        OSError: it cannot be read, or is not a file.
        ValueError: its header is longer than that of 100,000 tensors.
    """
    require_regular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LONGEST_HEADER:
        raise ValueError(f"its header is said to have {length:,} bytes; at most {LONGEST_HEADER:,} are read")


def _changed(tensors: Mapping[str, Tensor], entries: Mapping[str, str], digests: str) -> Iterable[str]:
    try:
        known = parse_json(digests)
    except (OSError, ValueError, RecursionError):
        known = None
    if not isinstance(known, dict) or known.get("") != text_digest(entries) or len(known) != len(tensors) + 1:
        yield "its header"
        return
    yield from (f"`{name}`" for name, tensor in tensors.items() if known.get(name) != _digest(tensor))


def text_digest(entries: Mapping[str, Any]) -> str:
    """Digest of plain values, whatever their order."""
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    found = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
