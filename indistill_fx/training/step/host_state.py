"""What a step changes beside tensors: a recording would not do it again.

Seen are the attributes of modules: numbers and words, which tensors stand in them, and what short lists, sets and mappings there hold. Not
seen is what is elsewhere: globals, closures, the insides of objects that are not modules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

_LONGEST, _DEEPEST = 1000, 3
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}


def host_state(module: nn.Module) -> dict[str, Any]:
    """The Python state of all parts of a module by name; compare two of them by `changed_in`."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        attributes = {name: value for name, value in vars(part).items() if name not in _OF_TORCH}
        for name, value in {**attributes, **part._buffers, **part._parameters}.items():
            found[f"{path}.{name}" if path else name] = _summary(value, _DEEPEST)
    return found


def changed_in(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of what is other than it was, was not there before, or is there no longer."""
    return sorted(
        name
        for name in before.keys() | after.keys()
        if name not in before or name not in after or not _same(before[name], after[name])
    )


class _Held:
    """An object that is compared by identity, and kept alive so that its id stays unique."""

    def __init__(self, value: object, mark: object = None):
        self.value, self.mark = value, mark


def _summary(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value), value)
    if isinstance(value, Tensor):
        return _Held(value, value.data_ptr() if value.device.type != "meta" else None)
    if not isinstance(value, (list, tuple, deque, dict, set, frozenset)):
        return _Held(value)
    if len(value) > _LONGEST or not depth:
        return _Held(value, len(value))
    entries: list[Any] = [*value, *value.values()] if isinstance(value, dict) else list(value)
    if isinstance(value, (set, frozenset)):
        entries.sort(key=id)
    return (type(value), [_summary(entry, depth - 1) for entry in entries])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, _Held) or isinstance(other, _Held):
        return (
            isinstance(one, _Held) and isinstance(other, _Held) and one.value is other.value and one.mark == other.mark
        )
    if isinstance(one[1], list) and isinstance(other[1], list):
        pairs = zip(one[1], other[1], strict=False)
        return one[0] is other[0] and len(one[1]) == len(other[1]) and all(_same(a, b) for a, b in pairs)
    same: bool = one[0] is other[0] and (one[1] == other[1] or (one[1] != one[1] and other[1] != other[1]))
    return same
