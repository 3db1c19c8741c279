"""Models from the user's own code: a factory is called, and when it fails, the error says in which line."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from indistill_fx.errors import ConfigError, FrontendError
from indistill_fx.system.user_code import comes_from_a_folder, importable_last, load_object, neighbours, staying


def build_by_factory(place: str, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call a factory, or a class, of the user's own code.

    Args:
        place: `file.py` or `package.module`; modules are also looked for in the working directory.
        name: the factory in it.
        arguments: passed on by name.

    Returns:
        The module it makes.

    Raises:
        ConfigError: no such file, module or name, or arguments the factory does not take; says which it takes.
        FrontendError: the code fails, or makes no module; names file and line.
    """
    spec = f"{place}:{name}"
    found = neighbours(place) if place.endswith(".py") or is_installed(place) else importable_last(Path.cwd())
    with found, staying(spec):
        factory = _import(place, spec)
        _require_callable(factory, spec, arguments)
        try:
            made = factory(**arguments)
        except (Exception, SystemExit) as error:
            raise _failed(error, f"The factory {spec}", spec) from error
    if not isinstance(made, nn.Module):
        message = f"{spec} made no module but a value of type {type(made).__name__}."
        hint = f"Let {name} return a torch.nn.Module."
        raise FrontendError(message, where=_place_of(factory, spec), got=made, hint=hint)
    return made


def _import(place: str, spec: str) -> Any:
    try:
        return load_object(spec)
    except ConfigError as error:
        if error.__cause__ is None:
            raise
        if _is_absent(error.__cause__, place):
            hint = "It has to be installed or in the working directory; torchvision: and timm: name constructors."
            raise ConfigError(f"There is no Python module {place!r}.", where=spec, got=place, hint=hint) from error
        raise _failed(error.__cause__, f"Importing {place}", spec) from error.__cause__
    except SystemExit as error:
        raise _failed(error, f"Importing {place}", spec) from error


def _is_absent(error: BaseException, place: str) -> bool:
    """Whether the module itself is missing, and not one that it imports."""
    return (
        isinstance(error, ModuleNotFoundError) and error.name is not None and f"{place}.".startswith(f"{error.name}.")
    )


def _require_callable(factory: Any, spec: str, arguments: Mapping[str, Any]) -> None:
    if isinstance(factory, nn.Module) or not callable(factory):
        found = "a module already made" if isinstance(factory, nn.Module) else f"a {type(factory).__name__}"
        hint = "Name a function that returns the model, or its class."
        raise ConfigError(f"{spec} is {found}, not a factory.", where=spec, got=found, hint=hint)
    try:
        signature = inspect.signature(factory)
    except ValueError:  # builtins have no signature
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"{spec} cannot be called with {', '.join(arguments) or 'no arguments'}: {error}.",
            where=_place_of(factory, spec),
            got=dict(arguments),
            hint=f"It takes {signature}; give arguments as '{spec}?{_needed(signature)}'.",
        ) from error


def _needed(signature: inspect.Signature) -> str:
    """The arguments without a default, as they are written in a spec."""
    needed = [name for name, parameter in signature.parameters.items() if parameter.default is parameter.empty]
    return "&".join(f"{name}=…" for name in needed) or "name=value"


def _failed(error: BaseException, subject: str, spec: str) -> FrontendError:
    """The error for user code that raised; it names the innermost line outside of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    else:
        user_frames = [frame for frame in frames if _is_users(frame.filename)] or list(frames)
        where = f"{user_frames[-1].filename}:{user_frames[-1].lineno}" if user_frames else spec
    reason = f"{type(error).__name__}: {error}".rstrip(": ")
    hint = "Fix that line, or the arguments."
    if isinstance(error, ImportError) and "@" in (error.name or ""):  # as `load_object` names files: a relative import
        hint = "A file is in no package; from the folder that holds the package, name package.module:name."
    return FrontendError(f"{subject} failed at {where}: {reason}.", where=where, got=reason, hint=hint)


def _is_users(filename: str) -> bool:
    libraries = (str(Path(__file__).parent), sys.base_prefix, sys.prefix)
    return not filename.startswith(("<", *libraries)) and "site-packages" not in filename


def _place_of(factory: Any, spec: str) -> str:
    code = getattr(inspect.unwrap(factory), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code is not None else spec


def is_installed(package: str) -> bool:
    """Whether Python finds a package without the working directory's help; nothing is imported."""
    top = package.partition(".")[0]
    if top in sys.modules and not comes_from_a_folder(top):
        return True
    spec = PathFinder.find_spec(top, sys.path)
    return spec is not None and spec.origin is not None  # without one, it is a mere folder of that name
