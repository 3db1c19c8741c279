"""Load what torch.save wrote without running anything of it.

Two guards, independent of one another: the pickle is gone through on stand-ins (`rehearse.py`), then it is loaded by
torch's own weights-only unpickler, which is told of exactly the names the rehearsal met and allowed.
"""

from __future__ import annotations

import functools
import io
import sys
import zipfile
from collections.abc import Sequence
from typing import Any, BinaryIO

from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.allow_list import get_attribute
from indistill_fx.loading.file_kinds import SAVE_AGAIN, damaged, open_zip
from indistill_fx.loading.module_check import find_fault
from indistill_fx.loading.pickle_scan import Rehearsal, go_through

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Names that say how an honest file came to be refused.
_HINTS = {
    "__main__.": "It was defined in a script: name that, as in script.py:make_model@weights.safetensors.",
    "torch.fx.": "A GraphModule is pickled as source code: save it by torch.export.save(program, 'model.pt2').",
    "torch._dynamo.": "A compiled model is not picklable as such: save the model that was compiled, model._orig_mod.",
}


def rehearse(file: BinaryIO, label: str, *, trust: Sequence[str] = ()) -> Rehearsal:
    """Go through a file of torch.save on stand-ins; refuse it if it would do anything but make modules and tensors.

    Args:
        file: the file, opened; read from its beginning and rewound.
        label: how to call it in errors.
        trust: packages whose classes and functions it may name.

    Returns:
        What the file would make.

    Raises:
        ConfigError: the file is damaged, declares more data than it has, or names what is not on the list.
    """
    try:
        is_zip = file.read(2) == b"PK"
        file.seek(0)
        rehearsal = _rehearse_zip(file, label, trust) if is_zip else _rehearse_legacy(file, label, trust)
    except ConfigError:
        raise
    except Exception as error:  # any bytes at all may come here
        raise damaged(label, f"its pickle makes no sense ({type(error).__name__}: {error})") from error
    finally:
        file.seek(0)
    _refuse_names(rehearsal, label)
    if rehearsal.problems:
        raise ConfigError(
            f"`{label}` was refused, and nothing in it was run: it {'; it '.join(rehearsal.problems[:3])}.",
            where=label,
            got=rehearsal.problems[0],
            hint="No file of torch.save(model, path) does this: it is damaged or malicious. Do not load it elsewhere.",
        )
    if rehearsal.is_legacy_module:
        what = f"`{label}` is a whole module in the format before PyTorch 1.6, which cannot be loaded safely."
        raise ConfigError(what, where=label, hint=SAVE_AGAIN)
    return rehearsal


def load_rehearsed(file: BinaryIO, label: str, rehearsal: Rehearsal) -> Any:
    """Load a file that passed `rehearse`, by torch's weights-only unpickler with that file's own names allowed.

    Args:
        file: the same file, at its beginning.
        label: how to call it in errors.
        rehearsal: what `rehearse` returned for it.

    Returns:
        The object in the file; tensors are on the CPU, training flags as they were saved.

    Raises:
        ConfigError: torch cannot load it all the same, or a module in it is no tree of modules and tensors.
    """
    import torch

    try:
        with torch.serialization.safe_globals(_allow(rehearsal)):
            loaded = torch.load(_checked_parts(file, label), map_location="cpu", weights_only=True)
    except Exception as error:
        said, _, _ = str(error).partition("\n\nCheck the documentation")  # its advice is to load without care
        reason = said.strip().rpartition("\n")[2]
        raise damaged(label, f"{type(error).__name__}: {reason}") from error
    if isinstance(loaded, nn.Module) and (fault := find_fault(loaded, functools.partial(_is_trusted, rehearsal))):
        raise damaged(label, fault)
    return loaded


def _checked_parts(file: BinaryIO, label: str) -> BinaryIO:
    """The file, in memory; an archive is written anew from its checked entries, so that torch reads those and no others."""
    if file.read(2) != b"PK":
        file.seek(0)
        return file
    file.seek(0)
    copied = io.BytesIO()
    with zipfile.ZipFile(copied, "w") as new, open_zip(file, label) as old:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    copied.seek(0)
    return copied


def _is_trusted(rehearsal: Rehearsal, kind: type) -> bool:
    return any(named.value is kind for named in rehearsal.named.values() if named.role == "trusted")


def _allow(rehearsal: Rehearsal) -> list[Any]:
    """The names of a rehearsal with the objects they stand for, as `safe_globals` wants them."""
    import torch

    objects: dict[str, Any] = {
        "builtins.getattr": get_attribute,
        "functools.partial": functools.partial,
        "torch._C._VariableFunctionsClass": torch._C._VariableFunctionsClass,  # type: ignore[attr-defined]
    }
    if "timm.layers.format.Format" in rehearsal.named:
        from timm.layers.format import Format

        objects["timm.layers.format.Format"] = Format
    roles = ("module", "plain", "function", "trusted")
    objects |= {path: named.value for path, named in rehearsal.named.items() if named.role in roles}
    return [(objects[path], path) for path in rehearsal.named if path in objects]


def _rehearse_zip(file: BinaryIO, label: str, trust: Sequence[str]) -> Rehearsal:
    archive, rehearsal = open_zip(file, label), Rehearsal()
    sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
    folder = archive.namelist()[0].partition("/")[0]  # torch goes by the first entry too
    with archive.open(f"{folder}/data.pkl") as stream:
        rehearsal.root = go_through(stream, rehearsal, trust=trust)
    for key, declared in rehearsal.storages.items():
        there = sizes.get(f"{folder}/data/{key}", 0)
        if there != declared:
            raise damaged(label, f"it declares {declared:,} bytes for storage {key} and has {there:,}")
    return rehearsal


def _rehearse_legacy(file: BinaryIO, label: str, trust: Sequence[str]) -> Rehearsal:
    """The format before 1.6: five pickles one after the other, then the size and bytes of each storage."""
    rehearsal = Rehearsal()
    magic, protocol, _ = (go_through(file, Rehearsal()) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise damaged(label, "its first numbers are not those of torch.save")
    rehearsal.root = go_through(file, rehearsal, trust=trust)
    keys = go_through(file, Rehearsal())
    if set(keys) != set(rehearsal.storages):
        raise damaged(label, "the storages it lists are not those it uses")
    declared, start = sum(rehearsal.storages.values()) + 8 * len(keys), file.tell()
    there = file.seek(0, 2) - start
    if there < declared:
        raise damaged(label, f"it declares {declared:,} bytes of data and has {there:,}")
    return rehearsal


def _refuse_names(rehearsal: Rehearsal, label: str) -> None:
    foreign = sorted(path for path, named in rehearsal.named.items() if named.role == "foreign")
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise ConfigError(
            f"`{label}` names what is outside of torch.nn, torchvision and timm: {', '.join(foreign[:5])}{more}. "
            "It was refused, and nothing in it was run.",
            where=label,
            got=foreign,
            expected="modules of torch.nn, torchvision and timm",
            hint=_hint_foreign(foreign),
        )
    missing = sorted(path for path, named in rehearsal.named.items() if named.role == "missing")
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
    return f"If you trust its origin: {asked}. Or name the code: package.module:make_model@weights.safetensors."
