"""Objects in the user's own code, named `file.py:name` or `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from indistill_fx.errors import ConfigError, IndistillError, nearest


def load_object(spec: str) -> Any:
    """The object a spec names. This runs the user's code.

    Args:
        spec: `file.py:name` or `package.module:name`.

    Returns:
        Whatever stands under that name.

    Raises:
        ConfigError: no such file, module or name, or the code fails while it is imported.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{spec!r} names no object.", where=spec, expected="file.py:name or package.module:name")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except IndistillError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{place!r} cannot be imported: {reason}.",
            where=place,
            got=reason,
            hint="Import it in Python first, to see what fails.",
        ) from error
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        raise ConfigError(f"{place!r} has no {name!r}.", where=spec, got=name, hint=nearest(name, names))
    return getattr(module, name)


def _from_file(path: Path) -> ModuleType:
    if not os.path.isfile(path):
        raise ConfigError(
            f"There is no file {str(path)!r} (looked in {Path.cwd()}).",
            where=str(path),
            hint="Check the path; it is taken from the working directory.",
        )
    path = path.resolve()
    key = f"{path.stem}@{path}"  # no importable name; one file is one module however often it is named
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path, loader=_FromSource(key, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with importable_last(path.parent):  # so that the file finds its neighbours
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


@contextmanager
def importable_last(folder: Path) -> Iterator[None]:
    """Let imports find what is in a folder and nowhere else.

    It comes last, so that no file there stands in for a library; and its files are compiled anew, never taken from the `__pycache__`
    beside them.
    """
    here, libraries = str(folder), (sys.prefix, sys.base_prefix)

    def is_ours(place: str) -> bool:
        return Path(place).is_relative_to(here) and not any(map(Path(place).is_relative_to, libraries))

    def find(place: str) -> FileFinder:
        if not is_ours(place):
            raise ImportError(place)
        return FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_FromSource, SOURCE_SUFFIXES))

    def forget() -> None:
        for place in filter(is_ours, list(sys.path_importer_cache)):
            del sys.path_importer_cache[place]

    sys.path.append(here)
    sys.path_hooks.insert(0, find)
    forget()
    try:
        yield
    finally:
        sys.path_hooks.remove(find)
        sys.path.reverse()
        sys.path.remove(here)  # the last one
        sys.path.reverse()
        forget()


class _FromSource(SourceFileLoader):
    """Compiles the file itself, never what lies in `__pycache__` beside it: that may have been compiled of something else."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)
