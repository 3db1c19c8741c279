"""The values of many tensors at one time, to find out later which were written, and to put them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

_SMALL = 1 << 14
"""Entries of a tensor that is kept joined with others: a network's statistics are hundreds of tensors, and one comparison."""
_SAMPLE = 1 << 12
"""Entries of a larger tensor that a sample looks at, evenly spread: a write of as many adjacent entries as lie between two is found."""
Group = tuple[list[Tensor], list[torch.Size], Tensor]
"""Tensors, their shapes, and their values end to end."""


class Values:
    """Copies of the values that some tensors have now.

    Args:
        tensors: of any dtype and on any device; each once. Those without data have no values.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        groups: dict[object, list[Tensor]] = {}
        for tensor in tensors:
            if not tensor.is_meta:
                groups.setdefault(_kind(tensor), []).append(tensor)
        with torch.no_grad():
            self._groups: list[Group] = [(group, [t.shape for t in group], _joined(group)) for group in groups.values()]

    @torch.no_grad()
    def changed(self, *, sample: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The tensors that have another value now, each with the one it had.

        Args:
            sample: of large tensors, look at some entries alone, evenly spread.
        """
        found = []
        for group, shapes, before in self._groups:
            if len(group) == 1:
                found += [(group[0], before)] if not _equal(group[0], before, sample=sample) else []
            elif not _same(_joined(group), before):
                parts = before.split([shape.numel() for shape in shapes])
                old = (part.view(shape) for part, shape in zip(parts, shapes, strict=True))
                found += [(tensor, part) for tensor, part in zip(group, old, strict=True) if not _same(tensor, part)]
        return found

    def put_back(self, *, sample: bool = False) -> bool:
        """Give the tensors their former values; returns whether one had another. `sample` as above."""
        changed = self.changed(sample=sample)
        with torch.no_grad():
            for tensor, before in changed:
                if (tensor.shape, tensor.dtype) == (before.shape, before.dtype):
                    tensor.data.copy_(before)
                else:
                    tensor.data = before.clone()
        return bool(changed)


def _kind(tensor: Tensor) -> object:
    """Equal for tensors that may be joined."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized
    return (tensor.dtype, tensor.device) if plain and tensor.numel() <= _SMALL else id(tensor)


def _equal(tensor: Tensor, before: Tensor, *, sample: bool) -> bool:
    if sample and tensor.shape == before.shape and tensor.is_contiguous() and before.is_contiguous():
        step = max(tensor.numel() // _SAMPLE, 1)
        return _same(tensor.view(-1)[::step], before.view(-1)[::step])
    return _same(tensor, before)


def _same(tensor: Tensor, before: Tensor) -> bool:
    return tensor.dtype == before.dtype and torch.equal(tensor, before)


def _joined(group: Sequence[Tensor]) -> Tensor:
    if len(group) == 1:
        return group[0].detach().clone()
    return torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in group])
