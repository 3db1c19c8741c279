"""A batch that stays where it is: its tensors are overwritten by those of the next one, which a recorded step then reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from indistill_fx.system.nested import map_tensors

Form = tuple[Any, ...]
"""What two batches must have in common for one to be copied over the other: structure, shapes, strides, dtypes, devices, other values."""


def form_of(batch: Any) -> Form:
    """The form of a batch, which can be hashed.

    Of numbers and words it holds the value itself, as a recorded step would go on using that of its recording; other objects are like no
    other, not even themselves.
    """
    if isinstance(batch, Tensor):
        return ("tensor", tuple(batch.shape), batch.stride(), batch.dtype, batch.device)
    if isinstance(batch, Mapping):
        return (type(batch), *((name, form_of(value)) for name, value in batch.items()))
    if isinstance(batch, (tuple, list)):
        return (type(batch), *map(form_of, batch))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return (
            type(batch),
            *((field.name, form_of(getattr(batch, field.name))) for field in dataclasses.fields(batch)),
        )
    plain = batch is None or isinstance(batch, (bool, int, float, str, bytes))
    return ("value", type(batch), batch if plain else object())


def static_copy(batch: Any) -> Any:
    """The same batch in memory of its own, of the same form."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def overwrite(static: Any, batch: Any) -> None:
    """Copy a batch over one of the same form, in place. On a GPU without waiting: in the order of its stream."""
    for target, new in zip(_tensors(static), _tensors(batch), strict=True):
        target.copy_(new, non_blocking=True)


def _tensors(batch: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found
