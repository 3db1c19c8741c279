"""Objects in the user's own code, named `file.py:name` or `package.module:name`."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES, SOURCE_SUFFIXES, ExtensionFileLoader, FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from indistill_fx.errors import ConfigError, IndistillError, first_lines, nearest
from indistill_fx.system.files import no_file
from indistill_fx.system.terminal import one_line, tell


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
            f"{str(path)!r} is {found}, not a file."
            if (found := no_file(path))
            else f"There is no file {str(path)!r} (looked in {Path.cwd()}).",
            where=str(path),
            hint="Check the path; it is taken from the working directory.",
        )
    path = Path(os.path.realpath(path))
    key = f"{path.stem}@{path}"  # not an importable name; the path makes one file one module
    if key in sys.modules:
        return sys.modules[key]
    try:
        with open(path, "rb"):
            loader = _FromSource(key, str(path), folder=str(path.parent))
    except OSError as error:
        reason = f"{str(path)!r} cannot be read: {first_lines(error)}"
        raise ConfigError(
            reason, where=str(path), hint="Make it readable, or name another."
        ) from None  # no code has failed
    spec = importlib.util.spec_from_loader(key, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with importable_last(path.parent), staying(path.name):  # so that the file can import its neighbours
            loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def failed_line(error: BaseException) -> str | None:
    """The line of the user's own code that failed, as `file.py:3`: the last one outside of libraries; None if ours was called after it."""
    ours, libraries = os.path.join(Path(__file__).parents[1], ""), (sys.base_prefix, sys.prefix)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(ours):
            return None
        if not frame.filename.startswith(("<", *libraries)) and "site-packages" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}"
    return None


def neighbours(place: str) -> AbstractContextManager[None]:
    """What code from `file.py` may import when it is called: the files beside it. Code from a package needs nothing."""
    return importable_last(Path(os.path.realpath(place)).parent) if place.endswith(".py") else nullcontext()


@contextmanager
def staying(whose: str) -> Iterator[None]:
    """Come back to the working directory when the user's own code has left it: all paths that were given are taken from there."""
    home = os.getcwd()
    try:
        yield
    finally:
        away = os.getcwd()
        if away != home:
            os.chdir(home)
            tell(
                one_line(
                    f"{whose} changed the working directory to {away}; it is {home} again, from which all paths are taken."
                    " Files that its code opens later need their whole paths."
                )
            )


@contextmanager
def importable_last(folder: Path) -> Iterator[None]:
    """Let imports find what is in a folder and in no other folder of the user's.

    It comes last, so that no file there stands in for a library; and its files are compiled anew, never taken from the `__pycache__`
    beside them.
    """
    own_folder = str(folder)
    libraries = [place for place in (sys.prefix, sys.base_prefix) if Path(place).is_relative_to(own_folder)]

    def is_ours(place: str) -> bool:
        return Path(place).is_relative_to(own_folder) and not any(map(Path(place).is_relative_to, libraries))

    def find(place: str) -> FileFinder:
        if not is_ours(place) or not os.path.isdir(place):
            raise ImportError(place)
        from_source = partial(_FromSource, folder=own_folder)
        return FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES), (from_source, SOURCE_SUFFIXES))  # type: ignore[arg-type]

    def forget() -> None:
        for place in filter(is_ours, list(sys.path_importer_cache)):
            del sys.path_importer_cache[place]

    sys.path.append(own_folder)
    sys.path_hooks.insert(0, find)
    forget()
    try:
        with _others_aside(own_folder):
            yield
    finally:
        sys.path_hooks.remove(find)
        sys.path.reverse()
        sys.path.remove(own_folder)  # remove the last occurrence
        sys.path.reverse()
        forget()


@contextmanager
def _others_aside(own_folder: str) -> Iterator[None]:
    """Within the block, hide modules from other folders: this folder's models.py needs its own layers.py, not one imported earlier.

    If both folders have a module of one name, neither stays in `sys.modules`: a later import fails instead of getting the wrong one.
    """
    others = {
        _top(name) for name, module in list(sys.modules.items()) if _folder_of(name, module) not in (None, own_folder)
    }
    aside = {name: sys.modules.pop(name) for name in list(sys.modules) if _top(name) in others}
    try:
        yield
    finally:
        twice = {_top(name) for name in sys.modules} & others
        for name in [name for name in sys.modules if _top(name) in twice]:
            del sys.modules[name]
        sys.modules.update({name: module for name, module in aside.items() if _top(name) not in twice})


def _top(name: str) -> str:
    return name.partition(".")[0]


def _folder_of(name: str, module: object) -> str | None:
    """The user's folder in which an import found a module; None for libraries, and for files loaded by their path."""
    spec = vars(module).get("__spec__") if isinstance(module, ModuleType) else None
    loader = getattr(spec, "loader", None)
    return loader.folder if isinstance(loader, _FromSource) and "@" not in name else None


class _FromSource(SourceFileLoader):
    """Compiles the source file itself and never uses `__pycache__`, which may belong to another source."""

    def __init__(self, fullname: str, path: str, *, folder: str):
        super().__init__(fullname, path)
        self.folder = folder

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def comes_from_a_folder(package: str) -> bool:
    """Whether a package was imported from a folder of the user's, so that another folder's may be meant next time."""
    return package in sys.modules and _folder_of(package, sys.modules[package]) is not None
