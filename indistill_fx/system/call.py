"""The arguments of one call of a model: tensors, or dicts, tuples and lists of tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from indistill_fx.system.nested import map_tensors, tensors_of


@dataclass(frozen=True, slots=True, eq=False)  # older versions of torch.compile hash it before it has its fields
class Call:
    """The arguments of one model's forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, model: Callable[..., Any]) -> Any:
        """The model's output for this batch."""
        return model(*self.args, **self.kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, however deep they lie, in order."""
        return tensors_of((*self.args, *self.kwargs.values()))

    @property
    def first(self) -> Tensor | None:
        """The first tensor; None if there is none."""
        return next(iter(self.tensors), None)

    def plus(self, more: Mapping[str, Any]) -> Call:
        """The call with further arguments."""
        return Call(self.args, {**self.kwargs, **more}) if more else self

    def to(self, device: torch.device) -> Call:
        """The call with its tensors on a device."""
        return self.changed(lambda tensor: tensor.to(device))

    def changed(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The call with a function applied to each of its tensors."""
        return Call(map_tensors(self.args, change), map_tensors(dict(self.kwargs), change))

    def by_name(self, names: Sequence[str]) -> dict[str, Any]:
        """The arguments by name, in the order of the names, which are those of the model's arguments."""
        found = dict(zip(names, self.args, strict=False)) | {key: v for key, v in self.kwargs.items() if v is not None}
        return {name: found[name] for name in names if name in found}
