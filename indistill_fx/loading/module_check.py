"""Modules made from a file: are they trees of modules and tensors under plain names, as `nn.Module` would have made them?

A file fills a module's dictionary without any of the checks of `register_parameter`, `add_module` and `register_buffer`. So:

  1. The registries are dictionaries of what belongs there, and no module holds itself, or more than can be walked.
  2. Names are plain (`graph/names.py`), stand in one registry only, and hide nothing of the class or of `nn.Module`.
  3. What else `nn.Module` keeps for itself, such as the dictionaries of hooks, is recreated, and empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from indistill_fx.graph.names import is_plain

# Module trees are walked recursively and without a record of visits, in torch as well (`Module.train`).
_DEEPEST, _MOST_VISITS = 200, 50_000
_REGISTRIES: tuple[tuple[str, type], ...] = (("_parameters", Tensor), ("_buffers", Tensor), ("_modules", nn.Module))
_UNSAVED = "_non_persistent_buffers_set"
_KEPT = ("training", _UNSAVED, *(name for name, _ in _REGISTRIES))


def find_fault(root: nn.Module, is_trusted: Callable[[type], bool] = lambda _: False) -> str:
    """What makes a module from a file unfit to be used, or nothing. Also does what rule 3 says.

    Args:
        root: the module.
        is_trusted: whether a class is the user's own; such a module keeps its hooks.
    """
    ahead: list[tuple[nn.Module, frozenset[int]]] = [(root, frozenset())]
    seen: set[int] = set()
    for _ in range(_MOST_VISITS):
        if not ahead:
            return ""
        current, above = ahead.pop()
        kind = type(current).__name__
        if id(current) not in seen:
            trusted = is_trusted(type(current))
            for fault in _faults(current, trusted=trusted):
                return f"a {kind} in it {fault}"
            seen.add(id(current))
            if not trusted:
                _renew(current)
        if id(current) in above or len(above) > _DEEPEST:
            return f"a {kind} in it holds itself, or is nested too deeply"
        above = above | {id(current)}
        ahead += [(child, above) for child in vars(current)["_modules"].values() if child is not None]
    return "it holds too many modules"


def _faults(module: nn.Module, *, trusted: bool) -> Iterator[str]:
    state, plain = vars(module), vars(nn.Module())
    for registry, legal in _REGISTRIES:
        held = state.get(registry)
        if not isinstance(held, dict) or not all(value is None or isinstance(value, legal) for value in held.values()):
            yield f"has no proper {registry[1:]}"
            return
    if not isinstance(state.get("training"), bool):
        yield "has no training flag"
    for name, made in plain.items():
        held = state.get(name, made)
        if isinstance(made, (dict, set)) and not isinstance(held, (dict, set)):
            yield f"has no proper {name}"
        if "hook" in name and held and not trusted:
            yield f"has {name}"
    used_names = {*plain, *state}
    for name in [name for registry, _ in _REGISTRIES for name in state[registry]]:
        if not isinstance(name, str) or not is_plain(name):
            yield f"calls one of its parts {str(name)[:60]!r}, which is not an identifier or number"
        elif name in used_names or hasattr(type(module), name):
            yield f"calls one of its parts {name!r}, which hides what every module has, or another part"
        used_names.add(name)
    for name, value in state.items():
        # timm's FasterNet assigns one of its own methods to `forward`.
        if callable(getattr(nn.Module, str(name), None)) and getattr(value, "__self__", None) is not module:
            yield f"has an attribute {name!r} in the place of a method"


def _renew(module: nn.Module) -> None:
    state = vars(module)
    for name, value in vars(nn.Module()).items():
        if name not in _KEPT:
            state[name] = value
    state[_UNSAVED] = {name for name in state.get(_UNSAVED, ()) if name in state["_buffers"]}
