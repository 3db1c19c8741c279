"""The tensors in a batch, however deep they lie: counted, cut, moved and exchanged in the batch's own form, whatever they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def named(value: Any) -> dict[str, Any] | None:
    """The entries of a mapping, a dataclass or a named tuple by name; None for all others."""
    if isinstance(value, Mapping):
        return {str(key): value[key] for key in value}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def is_own_class(value: Any) -> bool:
    """Whether a tuple or list is of a class of its own, such as a named tuple: one value, not several in order."""
    return isinstance(value, (tuple, list)) and type(value) not in (tuple, list)


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    entries = named(batch)
    parts = batch if isinstance(batch, (tuple, list)) else () if entries is None else entries.values()
    return [tensor for part in parts for tensor in tensors_of(part)]


def count_of(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor."""
    return next((len(value) for value in tensors_of(batch) if value.ndim), 0)


def is_state(tensor: Tensor, count: int) -> bool:
    """Whether a tensor of a batch of so many samples has them in its second axis, as a recurrent state: (layers, batch, width)."""
    return tensor.ndim > 2 and len(tensor) != count == tensor.shape[1]


def samples_of(batch: Any, part: slice) -> Any:
    """Some samples of a batch, in the batch's own form; what is neither a tensor nor a list of all samples stays as it is."""
    count = count_of(batch)

    def is_list_of_samples(value: Any) -> bool:
        """Such as file names, or boxes: not several inputs of the batch that happen to be as many as its samples."""
        tensors = tensors_of(value)
        return len(value) == count and not (tensors and all(t.ndim and len(t) == count for t in tensors))

    def cut(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            if is_state(value, count):
                return value[:, part]
            return value[part] if value.ndim and len(value) == count else value
        if depth and isinstance(value, (tuple, list)) and is_list_of_samples(value):
            return value[part]
        return _with_parts(value, lambda entry: cut(entry, depth + 1))

    return cut(batch, 0)


def joined(values: Sequence[Any]) -> Any:
    """Several batches of one form as one: their tensors one after another; of what is no tensor, that of the first."""
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        return {name: joined([value[name] for value in values]) for name in first}
    if isinstance(first, (tuple, list)):
        parts = [joined(parts) for parts in zip(*values, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def replaced(batch: Any, new: Mapping[int, Tensor]) -> Any:
    """The batch with other tensors in the places of some, which are named by their `id`."""
    return map_tensors(batch, lambda tensor: new.get(id(tensor), tensor))


def stand_in(batch: Any) -> Any:
    """One sample of zeros in the form of a batch that has none."""
    return map_tensors(
        batch, lambda tensor: tensor.new_zeros((1, *tensor.shape[1:])) if tensor.ndim and not len(tensor) else tensor
    )


def to_device(batch: Any, device: torch.device | str, *, non_blocking: bool = False) -> Any:
    """The batch with its tensors on a device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def map_tensors(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with each of its tensors changed, in the batch's own form; a mapping of any kind becomes a dict."""
    if isinstance(batch, Tensor):
        return change(batch)
    return _with_parts(batch, lambda part: map_tensors(part, change))


def _with_parts(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with each of its parts changed; what has none stays as it is."""
    if isinstance(value, Mapping):
        return {name: change(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [change(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        given = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: change(getattr(value, name)) for name in given})
    return value


def described(batch: Any) -> str:
    """A batch for a message: a tuple of Tensor, dict (a, b)."""
    entries = named(batch)
    if entries is not None:
        return f"a {type(batch).__name__} of {', '.join(entries)}"
    if isinstance(batch, (tuple, list)):
        parts = [(type(part).__name__, ", ".join(named(part) or ())) for part in batch]
        shown = [f"{kind} ({names})" if names else kind for kind, names in parts]
        return f"a {type(batch).__name__} of {', '.join(shown)}"
    return f"a {type(batch).__name__}"


def listed(names: Sequence[str]) -> str:
    """Names for a message: `a`, `b`."""
    return ", ".join(f"`{name}`" for name in names)
