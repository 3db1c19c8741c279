"""The values of many tensors at one time, to find out later which were written, and to put them back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

_SMALL = 1 << 14
"""Entries of a tensor that is kept joined with others: a network's statistics are hundreds of tensors, and one comparison."""
_SAMPLE = 1 << 12
"""Entries of a larger tensor that a sample looks at, evenly spread: a write of as many adjacent entries as lie between two is found."""
Group = tuple[list[Tensor], list[torch.Size], Tensor]
"""Tensors, their shapes if there are several, and their values end to end."""


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Dense tensors that together say what a tensor holds, be it sparse, quantised, nested or of another layout.

    >>> [part.tolist() for part in dense_parts(torch.tensor([0.0, 2.0]).to_sparse())]
    [[[1]], [2.0]]
    """
    tensor = tensor.detach()
    if tensor.is_nested:
        return [part for entry in tensor.unbind() for part in dense_parts(entry)]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    return [tensor.resolve_conj().resolve_neg() if tensor.layout is torch.strided else tensor.to_dense()]


class Values:
    """Copies of the values that some tensors have now.

    Args:
        tensors: of any dtype and on any device; each once. Those without data have no values.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        groups: dict[object, list[Tensor]] = {}
        for tensor in tensors:
            if not tensor.is_meta and _copies(tensor):
                groups.setdefault(_kind(tensor), []).append(tensor)
        with torch.no_grad():
            self._groups: list[Group] = [
                (group, [t.shape for t in group] if len(group) > 1 else [], _joined(group)) for group in groups.values()
            ]

    @torch.no_grad()
    def changed(self, *, sample: bool = False) -> list[tuple[Tensor, Tensor]]:
        """The tensors whose values have changed, each with its former value.

        Args:
            sample: compare only some evenly spaced entries of large tensors.
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
                _write(tensor, before)
        return bool(changed)


def _write(tensor: Tensor, before: Tensor) -> None:
    """Write a value under `no_grad`; the version counter of a dense tensor does not change."""
    if not _is_dense(tensor):
        with suppress(RuntimeError):  # some layouts cannot be copied into
            tensor.copy_(before)
            return
    elif (tensor.shape, tensor.dtype) == (before.shape, before.dtype):
        # along an axis that was expanded, all entries are one
        once = tuple(slice(0, 1) if step == 0 else slice(None) for step in tensor.stride())
        tensor.data[once].copy_(before[once])
        return
    tensor.data = before.clone()


def _is_dense(tensor: Tensor) -> bool:
    return not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_quantized


def _copies(tensor: Tensor) -> bool:
    """Whether torch can copy the tensor; this fails for some quantised ones."""
    try:
        _is_dense(tensor) or tensor.clone()
    except RuntimeError:
        return False
    return True


def _kind(tensor: Tensor) -> object:
    """A key that is equal for tensors that can be concatenated."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and _is_dense(tensor)
    return (tensor.dtype, tensor.device) if plain and tensor.numel() <= _SMALL else id(tensor)


def _equal(tensor: Tensor, before: Tensor, *, sample: bool) -> bool:
    dense = sample and _is_dense(tensor) and _is_dense(before)
    if dense and tensor.shape == before.shape and tensor.is_contiguous() and before.is_contiguous():
        step = max(tensor.numel() // _SAMPLE, 1)
        return _same(tensor.view(-1)[::step], before.view(-1)[::step])
    return _same(tensor, before)


def _same(tensor: Tensor, before: Tensor) -> bool:
    if tensor.dtype != before.dtype:
        return False
    if _is_dense(tensor) and _is_dense(before):
        return torch.equal(tensor, before)
    parts, old = dense_parts(tensor), dense_parts(before)
    return len(parts) == len(old) and all(map(torch.equal, parts, old))


def _joined(group: Sequence[Tensor]) -> Tensor:
    if len(group) == 1:
        return group[0].detach().clone()
    return torch.cat([tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in group])
