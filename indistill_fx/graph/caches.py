"""Caches in somebody else's code, left as they were found: what a traced forward pass puts there must not be used afterwards."""

from __future__ import annotations

import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from indistill_fx.system.random_state import Generator, is_generator, python_generators, set_state_of, state_of

_LIBRARIES = {"torch", "numpy", *sys.stdlib_module_names}
"""Their caches are their own business: restoring `sys.modules`, say, would have modules imported twice."""
Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any] | tuple[Any, ...]
_CONTAINERS = frozenset({dict, list, set, OrderedDict, defaultdict, Counter, deque})
_SIMPLE = frozenset({type(None), bool, int, float, str})
OWN_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What torch itself keeps in every module: registries, hooks, the training flag."""


class Reach(NamedTuple):
    """What a module's code can reach: containers, cached functions, and random generators. What its attributes hold is not part of it."""

    containers: list[Container]
    cached: list[Any]
    generators: list[Generator]


@contextmanager
def no_generation_cache(module: nn.Module) -> Iterator[bool]:
    """Have Hugging Face's decoders return no keys and values of their layers, which only `generate` reads and no graph can hold.

    Args:
        module: whose parts have a `config`; those that say `use_cache=True` say False inside the block.

    Yields:
        Whether there is one.
    """
    configs = {id(config): config for part in module.modules() if (config := vars(part).get("config")) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    try:
        for config in caching:
            config.use_cache = False
        yield bool(caching)
    finally:
        for config in caching:
            config.use_cache = True


@contextmanager
def caches_kept(reach: Reach) -> Iterator[Callable[[], None]]:
    """Restore the caches that a module's code can reach: `lru_cache`d functions, and dictionaries, lists and sets.

    Containers get their former contents back, be they in the classes of the module's parts or in the files of its code; those in
    attributes are `State`'s business. An `lru_cache` that was asked for something new is emptied. Random generators get their states back.

    Args:
        reach: of the module whose forward runs inside the block.

    Yields:
        What restores them at once.
    """
    containers, functions, generators = reach
    contents = [(container, copy_of(container)) for container in containers]
    states = [state_of(generator) for generator in generators]
    misses = [function.cache_info().misses for function in functions]

    def put_back() -> None:
        for container, before in contents:
            if container or before:
                restore(container, before)
        for generator, state in zip(generators, states, strict=True):
            set_state_of(generator, state)
        for k, function in enumerate(functions):
            if function.cache_info().misses != misses[k]:
                function.cache_clear()
                misses[k] = 0

    try:
        yield put_back
    finally:
        put_back()


def copy_of(container: Container) -> Any:
    """A container's contents as they are now."""
    if isinstance(container, tuple):
        return container
    return container.copy() if container else ()


def as_before(container: Container, before: Any) -> bool:
    """Whether a container still holds the very objects that its copy `before` does."""
    if len(container) != len(before) or not all(a is b for a, b in zip(container, before, strict=True)):
        return False
    return not isinstance(container, dict) or all(container[key] is before[key] for key in before)


def restore(container: Any, before: Any) -> None:
    """Give a container the contents of its copy `before`."""
    if not as_before(container, before):
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(before)


def held_by(part: nn.Module) -> list[tuple[str, Any]]:
    """The attributes of a module that torch does not keep in every module, and that may hold more than a number or a text."""
    return [(n, v) for n, v in part.__dict__.items() if type(v) not in _SIMPLE and n not in OWN_ATTRIBUTES]


def containers_of(parts: Iterable[nn.Module]) -> list[tuple[tuple[nn.Module, str], Container]]:
    """The containers that are held in attributes of these modules, each with the module and the attribute; those inside them too.

    Tuples count: what they hold may be written in place.
    """
    seen = dict[int, Container]()
    found = list[tuple[tuple[nn.Module, str], Container]]()
    for part in parts:
        for name, value in held_by(part):
            if not isinstance(value, Tensor):
                found += [((part, name), container) for container in _collect(value, seen)]
    return found


def held_values(parts: Iterable[nn.Module], containers: Iterable[Container]) -> list[Any]:
    """What attributes of these modules hold (see `held_by`), and what these containers do."""
    held = [value for part in parts for _, value in held_by(part)]
    for container in containers:
        held += container.values() if isinstance(container, dict) else container
    return held


def generators_of(module: nn.Module, reach: Reach) -> list[Generator]:
    """Python's and numpy's own random generators, and all others that a module holds or that its code can reach."""
    parts = list(module.modules())
    held = held_values(parts, (container for _, container in containers_of(parts)))
    found = [*python_generators(), *filter(is_generator, held), *reach.generators]
    return list({id(generator): generator for generator in found}.values())


def reach_of(module: nn.Module) -> Reach:
    """What the code of a module's parts names, from function to function.

    Their code is their classes', and the functions that they hold in attributes.
    """
    containers: dict[int, Container] = {}
    cached: dict[int, Any] = {}
    generators: list[Generator] = []
    seen: set[int] = set()
    todo: list[Any] = []
    for part in module.modules():
        todo += [value for _, value in held_by(part) if _function(value) is not None]
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
        if _attribute(value, "cache_info") is not None and _attribute(value, "cache_clear") is not None:
            cached[id(value)] = value
        if isinstance(value, (dict, list, set)):
            _collect(value, containers)
        if is_generator(value):
            generators.append(value)
        todo += _named_by(_function(value))
    return Reach(list(containers.values()), list(cached.values()), generators)


def _collect(value: Any, seen: dict[int, Container]) -> list[Container]:
    """Collect a container that was not seen yet, and those inside it; for an object of the user's own class, those in its attributes."""
    found, todo = list[Container](), [value]
    while todo:
        container = _contents(todo.pop())
        if container is not None and id(container) not in seen:
            seen[id(container)] = container
            found.append(container)
            todo += container.values() if isinstance(container, dict) else container
    return found


def _contents(value: Any) -> Container | None:
    if type(value) in _CONTAINERS:
        return value  # type: ignore[no-any-return]
    if isinstance(value, tuple):
        return value if any(type(entry) not in _SIMPLE for entry in value) else None
    plain = not isinstance(value, (nn.Module, Tensor, type, ModuleType, FunctionType)) and hasattr(value, "__dict__")
    return vars(value) if plain and not _is_library(type(value).__module__) else None


def _function(value: Any) -> FunctionType | None:
    """The plain Python function inside a method, property or wrapper."""
    for attribute in ("__wrapped__", "__func__", "fget", "func"):
        inner: Callable[..., Any] | None = _attribute(value, attribute)
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
        except ValueError:  # the closure's cell is still empty
            continue
    codes, names = [function.__code__], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [constant for constant in code.co_consts if isinstance(constant, type(code))]
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and not _is_library(value.__name__):
            yield from (_attribute(value, other) for other in names)
        elif isinstance(value, type) and not _is_library(value.__module__):
            yield from vars(value).values()
        elif value is not None:
            yield value


def _attribute(value: Any, name: str) -> Any:
    """None, too, where looking raises: stand-ins for a package that is not installed raise what they like."""
    with suppress(Exception):
        return getattr(value, name, None)
    return None


def _is_library(name: str | None) -> bool:
    return (name or "").partition(".")[0] in _LIBRARIES
