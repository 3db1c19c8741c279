"""Files of torch.save, opened without running anything of them.

The structure of a file is read once, into memory, as a description (`pickle_scan.py`); what is wanted of it is made from that
description (`pickle_make.py`), and the bytes of its tensors are read from the entries it names. No second reader sees the file.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import torch
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.allow_list import Named
from indistill_fx.loading.file_kinds import SAVE_AGAIN, damaged, open_zip
from indistill_fx.loading.module_check import find_fault
from indistill_fx.loading.pickle_make import GRAPH_HINT, MALICIOUS, Maker, UnfitError
from indistill_fx.loading.pickle_scan import Scan, Storage, go_through, walk

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Refused names that show how an honest file was made.
_HINTS = {
    "__main__.": "It was defined in a script: name that, as in script.py:make_model@weights.safetensors.",
    "torch.fx.": GRAPH_HINT,
    "torch._dynamo.": "A compiled model is not picklable as such: save the model that was compiled, model._orig_mod.",
    "torch.nn.utils.": "Remove what is attached to its layers before the model is saved: torch.nn.utils.remove_weight_norm and others.",
    "torch.nn.parameter.Uninitialized": "It was never run: run it once on an example, so that its lazy layers get their sizes.",
    "torch.jit.": "A scripted part cannot be read: save the module it was made from.",
}

Read = Callable[[Storage], torch.UntypedStorage]


class SavedFile:
    """What a file of torch.save describes, and the means to make it.

    Args:
        label: how to call the file in errors.
        scan: of its pickle.
        read: gives the bytes of a storage.
    """

    def __init__(self, label: str, scan: Scan, read: Read):
        self.label, self.scan, self._read = label, scan, read

    @property
    def root(self) -> Any:
        """The description of the file's top-level object."""
        return self.scan.root

    def make(self, wanted: Any) -> Any:
        """The value of a description; tensors are on the CPU, training flags as they were saved.

        Args:
            wanted: the root, or a part of it. Nothing else of the file is made.

        Raises:
            ConfigError: it names something that is on no list, does something that no file of torch.save does, or makes no sense.
        """
        named = self.require_names(wanted)
        try:
            made = Maker(self.scan, self._read).make(wanted)
        except ConfigError:
            raise
        except UnfitError as error:
            raise _refuse(self.label, str(error), error.hint) from error
        except Exception as error:  # the file may hold any bytes, so anything may be raised
            raise damaged(self.label, f"{type(error).__name__}: {error}") from error
        trusted = {part.value for part in named.values() if part.use == "trusted"}
        if isinstance(made, nn.Module) and (fault := find_fault(made, lambda kind: kind in trusted)):
            raise damaged(self.label, fault)
        return made

    def require_names(self, wanted: Any) -> dict[str, Named]:
        """The globals that a part of the file names, by path; refuses those that are not on a list.

        Raises:
            ConfigError: one of them is on no list, or the installed library does not have it.
        """
        named = {part.path: part for part in walk(wanted) if isinstance(part, Named)}
        _refuse_names(named, self.label)
        return named

    def describe_trusted(self, wanted: Any) -> tuple[str, ...]:
        """One note for each trusted package that a part of the file uses, with the names it uses."""
        used: dict[str, list[str]] = {}
        for part in walk(wanted):
            if isinstance(part, Named) and part.use == "trusted":
                used.setdefault(part.path.partition(".")[0], []).append(part.path)
        return tuple(f"trusted package {package}: {', '.join(sorted(set(paths)))}" for package, paths in used.items())


@contextmanager
def open_saved(file: BinaryIO, label: str, *, trust: Sequence[str] = ()) -> Iterator[SavedFile]:
    """Read what a file of torch.save describes.

    Args:
        file: the file, opened; it has to stay open as long as something is made.
        label: how to call it in errors.
        trust: packages whose classes and functions it may name.

    Raises:
        ConfigError: the file is damaged, declares more data than it has, or does what no file of torch.save does.
    """
    try:
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        saved = SavedFile(label, *(_scan_zip if is_zip else _scan_legacy)(file, label, trust))
    except ConfigError:
        raise
    except Exception as error:  # the file may hold any bytes, so anything may be raised
        raise damaged(label, f"its pickle makes no sense ({type(error).__name__}: {error})") from error
    if saved.scan.problems:
        raise _refuse(label, "; it ".join(saved.scan.problems[:3]), MALICIOUS)
    if saved.scan.is_legacy_module:
        message = f"`{label}` is a whole module in the format before PyTorch 1.6, which cannot be loaded safely."
        raise ConfigError(message, where=label, hint=SAVE_AGAIN)
    yield saved


def _scan_zip(file: BinaryIO, label: str, trust: Sequence[str]) -> tuple[Scan, Read]:
    archive, scan = open_zip(file, label), Scan()
    found = {entry.filename: entry for entry in archive.infolist()}
    folder = archive.namelist()[0].partition("/")[0]
    scan.root = go_through(io.BytesIO(archive.read(f"{folder}/data.pkl")), scan, trust=trust)
    for key, storage in scan.storages.items():
        entry = found.get(f"{folder}/data/{key}")
        actual_size = entry.file_size if entry is not None else 0
        if actual_size != storage.declared:
            raise damaged(label, f"it declares {storage.declared:,} bytes for storage {key} and has {actual_size:,}")
    order = f"{folder}/byteorder"
    foreign = order in found and archive.read(order).decode() != sys.byteorder

    def read(storage: Storage) -> torch.UntypedStorage:
        if not storage.declared:
            return torch.UntypedStorage(0)
        with archive.open(f"{folder}/data/{storage.key}") as stream:
            return _read_storage(stream, storage, swap=foreign)

    return scan, read


def _scan_legacy(file: BinaryIO, label: str, trust: Sequence[str]) -> tuple[Scan, Read]:
    """Scan the format before PyTorch 1.6: five pickles in a row, then each storage's number of elements and bytes."""
    scan, content = Scan(), io.BytesIO(file.read())
    magic, protocol, system = (go_through(content, Scan()) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise damaged(label, "its first numbers are not those of torch.save")
    scan.root = go_through(content, scan, trust=trust)
    keys = go_through(content, Scan())
    if {*keys} != {*scan.storages}:
        raise damaged(label, "the storages it lists are not those it uses")
    declared, start = sum(storage.declared for storage in scan.storages.values()) + 8 * len(keys), content.tell()
    actual_size = content.seek(0, 2) - start
    if actual_size < declared:
        raise damaged(label, f"it declares {declared:,} bytes of data and has {actual_size:,}")
    places: dict[str, int] = {}
    for key in keys:
        places[key] = start + 8
        start += 8 + scan.storages[key].declared
    foreign = system.get("little_endian", True) != (sys.byteorder == "little")

    def read(storage: Storage) -> torch.UntypedStorage:
        content.seek(places[storage.key])
        return _read_storage(content, storage, swap=foreign)

    return scan, read


def _read_storage(stream: Any, storage: Storage, *, swap: bool) -> torch.UntypedStorage:
    target = torch.empty(storage.declared, dtype=torch.uint8)
    view, at = memoryview(target.numpy().data), 0
    while at < len(view):
        count = stream.readinto(view[at:])
        if not count:
            raise EOFError(f"storage {storage.key} ends early")
        at += count
    untyped = target.untyped_storage()
    if swap:
        untyped.byteswap(storage.dtype)
    return untyped


def _refuse(label: str, problem: str, hint: str) -> ConfigError:
    message = f"`{label}` was refused, and nothing in it was run: it {problem}."
    return ConfigError(message, where=label, got=problem, hint=hint)


def _refuse_names(names: Mapping[str, Named], label: str) -> None:
    foreign = sorted(path for path, named in names.items() if named.use == "foreign")
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"`{label}` names things outside of torch.nn, torchvision and timm: {', '.join(foreign[:5])}{more}. "
            "It was refused, and nothing in it was run.",
            where=label,
            got=foreign,
            expected="modules of torch.nn, torchvision and timm",
            hint=_hint_foreign(foreign),
        )
    missing = sorted(path for path, named in names.items() if named.use == "missing")
    if missing:
        package = missing[0].partition(".")[0]
        raise ConfigError(
            f"`{label}` needs {', '.join(missing[:5])}, which the installed {package} does not have.",
            where=label,
            got=missing,
            hint=f"Install the {package} it was saved with, or load its weights: torchvision:NAME@weights.safetensors.",
        )


def _hint_foreign(foreign: Sequence[str]) -> str:
    for prefix, hint in _HINTS.items():
        if any(path.startswith(prefix) for path in foreign):
            return hint
    packages = {path.partition(".")[0] for path in foreign}
    if packages & {"torch", "numpy", *sys.stdlib_module_names}:
        return "Models and weights need none of this; if it is a training checkpoint, ask for its weights alone."
    asked = " ".join(f"--trust {package}" for package in sorted(packages))
    return (
        f"If you trust its origin, add {asked}. Or save only the weights, torch.save(model.state_dict(), 'weights.pt'), and name the "
        "code: models.py:Net@weights.pt."
    )
