"""Which code a run directory may name: what this user started a run with, on this machine, and nothing else.

run.json says which model was trained, and `evaluate`, `export` and `bench` take a run directory as a model. That model may be the
user's own code, `models.py:make`. But a run directory may come from anybody, and a spec can name any function there is:
`subprocess:call?args=…`. So when a run is started the spec is signed, together with the path and the content of the file that it
names, with a key that only this user has. A signature that is copied beside other code, or code that changed, is none. The student.py
in a run's own folder may be moved with it: its content must then be what was signed, and it must import libraries alone, because
nobody signed what lies beside it there.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from indistill_fx.loading.spec import Spec
from indistill_fx.system.shortage import home

_BYTES = 32


def sign(spec: Spec) -> str | None:
    """Proof that this user named the spec; None where no key can be kept, for example without a home directory."""
    key = _key(make=True)
    return None if key is None else _digest(key, spec)


def is_signed(spec: Spec, proof: object, moved: Path | None = None) -> bool:
    """Whether `proof` is this user's for this spec and the code that it names as that is now; `moved`: where that file is now."""
    key = _key(make=False)
    if key is None or not isinstance(proof, str):
        return False
    signed = hmac.compare_digest(_bytes(proof), _bytes(_digest(key, spec, moved)))
    return signed and (moved is None or _imports_libraries_alone(moved))


def _imports_libraries_alone(code: Path) -> bool:
    """Whether a file imports only Python's modules and those that a written student.py may need, and none that could lie beside it."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(code.read_bytes())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").partition(".")[0] if not node.level else "")
    ours = {name for name in ("torch", "torchvision", "timm", "transformers") if find_spec(name) is not None}
    return roots <= ours | sys.stdlib_module_names


def code_of(place: str) -> Path | None:
    """The file that `file.py` or `package.module` names; found without importing anything, and None where there is none."""
    if place.endswith(".py"):
        return Path(place).resolve() if os.path.isfile(place) else None
    searched: Sequence[str] | None = [*sys.path, str(Path.cwd())]
    name = ""
    for part in place.split("."):
        name = f"{name}.{part}".lstrip(".")
        found = PathFinder.find_spec(name, searched)
        if found is None:
            return None
        searched = found.submodule_search_locations
    return Path(found.origin).resolve() if found is not None and found.origin else None


def _digest(key: bytes, spec: Spec, moved: Path | None = None) -> str:
    file = code_of(spec.place) if spec.name else None
    read = moved or file
    content = read.read_bytes() if read is not None else b""
    signed = [spec.text, spec.place if moved else str(file), hashlib.sha256(content).hexdigest()]
    return hmac.new(key, _bytes("\0".join(signed)), hashlib.sha256).hexdigest()


def _bytes(text: str) -> bytes:
    """The bytes of a text, even with lone surrogates, which JSON can hold."""
    return text.encode("utf-8", "surrogatepass")


def _key(*, make: bool) -> bytes | None:
    if (own := home()) is None:
        return None
    path = own / ".local" / "state" / "indistill-fx" / "key"
    try:
        if not path.is_file():
            if not make:
                return None
            _write(path)
        found = path.read_bytes()
    except OSError:  # it cannot be read or written
        return None
    return found if len(found) == _BYTES else None


def _write(path: Path) -> None:
    """Write the whole file or nothing, and never overwrite another process's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(secrets.token_bytes(_BYTES))
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
