"""Caches in somebody else's code, left as they were found: what a traced forward pass puts there must not be used afterwards."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}
"""Their caches are their own business: restoring `sys.modules`, say, would have modules imported twice."""
Container = dict[Any, Any] | list[Any] | set[Any]
_CONTAINERS = frozenset({dict, list, set, OrderedDict, defaultdict, Counter})


@contextmanager
def caches_kept(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Restore the caches that a module's code can reach: `lru_cache`d functions, and dictionaries, lists and sets.

    Containers get their former contents back, wherever they stand: in attributes of the module's parts, in their classes, or in the files
    of its code. An `lru_cache` that was asked for something new is emptied.

    Args:
        module: whose forward runs inside the block.

    Yields:
        What restores them at once.
    """
    containers, functions = _reachable(module)
    contents = [(container, container.copy() if container else ()) for container in containers]
    misses = [function.cache_info().misses for function in functions]

    def put_back() -> None:
        for container, before in contents:
            if container or before:
                _restore(container, before)
        for k, function in enumerate(functions):
            if function.cache_info().misses != misses[k]:
                function.cache_clear()
                misses[k] = 0

    try:
        yield put_back
    finally:
        put_back()


def _restore(container: Any, before: Any) -> None:
    as_before = len(container) == len(before) and all(a is b for a, b in zip(container, before, strict=True))
    if as_before and not (isinstance(before, dict) and any(container[key] is not before[key] for key in before)):
        return
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(before)


def _reachable(module: nn.Module) -> tuple[list[Container], list[Any]]:
    """Containers and cached functions: of the parts themselves, then what their code names, from function to function."""
    containers: dict[int, Container] = {}
    cached: dict[int, Any] = {}
    seen: set[int] = set()
    todo: list[Any] = []
    for part in module.modules():
        for name, value in part.__dict__.items():
            if type(value) in _CONTAINERS and name not in ("_parameters", "_buffers", "_modules"):
                _collect(value, containers)
        if id(type(part)) not in seen and not _is_library(type(part).__module__):
            seen.add(id(type(part)))
            todo += [
                value
                for parent in type(part).__mro__
                if not _is_library(parent.__module__)
                for value in vars(parent).values()
            ]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if hasattr(value, "cache_info") and hasattr(value, "cache_clear"):
            cached[id(value)] = value
        if isinstance(value, (dict, list, set)):
            _collect(value, containers)
        todo += _named_by(_function(value))
    return list(containers.values()), list(cached.values())


def _collect(value: Any, containers: dict[int, Container]) -> None:
    """A container and those inside it."""
    if type(value) in _CONTAINERS and id(value) not in containers:
        containers[id(value)] = value
        for entry in value.values() if isinstance(value, dict) else value:
            _collect(entry, containers)


def _function(value: Any) -> FunctionType | None:
    """The plain Python function inside a method, property or wrapper."""
    for attribute in ("__wrapped__", "__func__", "fget", "func"):
        inner: Callable[..., Any] | None = getattr(value, attribute, None)
        if isinstance(inner, FunctionType):
            return inner
    return value if isinstance(value, FunctionType) else None


def _named_by(function: FunctionType | None) -> Iterator[Any]:
    """The objects that a function's code names, outside the libraries."""
    if function is None or _is_library(function.__module__):
        return
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, type(code))]
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            yield from (getattr(value, other) for other in names if hasattr(value, other))
        elif isinstance(value, type) and not _is_library(value.__module__):
            yield from vars(value).values()
        elif value is not None:
            yield value


def _is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES
