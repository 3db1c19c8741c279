"""Operations that torch's ONNX exporter has no form of, or a wrong one, written with others that it has.

Each form has the signature of the operation and computes the same values. It returns NotImplemented where it does not apply, and the
operation itself is exported then. Results that are tuples in torch are tuples here: (values, indices).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from itertools import product
from math import inf, prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SMALL = 25
"""Up to so many rows `torch.cdist` subtracts; beyond, it multiplies matrices, as the form does."""
Mode = Literal["use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"]


class Substitutes(TorchFunctionMode):
    """Within the block, operations without an ONNX form are replaced by others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the form, or the function itself."""
        form = _FORMS.get(getattr(func, "__name__", ""))
        found = NotImplemented if form is None else form(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is NotImplemented else found


def _cdist(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Mode = "use_mm_for_euclid_dist_if_necessary"
) -> Tensor:
    rows = [n for n in (x1.shape[-2], x2.shape[-2]) if isinstance(n, torch.SymInt) or n > _SMALL]
    needed = bool(rows) and compute_mode == "use_mm_for_euclid_dist_if_necessary"
    if p == 2 and (needed or compute_mode == "use_mm_for_euclid_dist"):
        squares = x1.square().sum(-1, keepdim=True) + x2.square().sum(-1)[..., None, :] - 2 * x1 @ x2.mT
        return squares.clamp_min(0).sqrt()
    apart = (x1[..., :, None, :] - x2[..., None, :, :]).abs()
    if p == inf:
        return apart.amax(-1)
    if p == 0:
        return (apart != 0).to(x1.dtype).sum(-1)
    if p == 1:
        return apart.sum(-1)
    return apart.square().sum(-1).sqrt() if p == 2 else apart.pow(p).sum(-1).pow(1 / p)


def _kthvalue(input: Tensor, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    values, places = (x.narrow(dim, k - 1, 1) for x in input.topk(k, dim, largest=False))
    return torch.return_types.kthvalue((values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim)))


def _median(input: Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    if isinstance(size := input.numel() if dim is None else input.shape[dim], torch.SymInt):
        return NotImplemented
    if dim is None:
        return _kthvalue(input.flatten(), (size + 1) // 2).values
    return torch.return_types.median(_kthvalue(input, (size + 1) // 2, dim, keepdim))


def _cumprod(input: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    if isinstance(size := input.shape[dim], torch.SymInt):
        return NotImplemented
    last = (input if dtype is None else input.to(dtype)).movedim(dim, -1)
    before = torch.ones(size, size, dtype=torch.bool, device=input.device).tril()
    return torch.where(before, last[..., None, :], torch.ones((), dtype=last.dtype)).prod(-1).movedim(-1, dim)


def _searchsorted(
    sorted_sequence: Tensor, input: Tensor | float, *, out_int32: bool = False, right: bool = False,
    side: str | None = None, sorter: Tensor | None = None,
) -> Any:  # fmt: skip
    if not isinstance(input, Tensor) or sorter is not None:
        return NotImplemented
    bounds, values = sorted_sequence[..., None, :], input[..., None]
    if sorted_sequence.dim() == 1:
        bounds = sorted_sequence
    passed = bounds <= values if right or side == "right" else bounds < values
    return passed.to(torch.int32 if out_int32 else torch.int64).sum(-1, dtype=torch.int32 if out_int32 else None)


def _isin(elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False) -> Any:
    if not isinstance(elements, Tensor) or not isinstance(test_elements, Tensor):
        return NotImplemented
    found = (elements[..., None] == test_elements.flatten()).any(-1)
    return ~found if invert else found


def _take_along_dim(input: Tensor, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None or input.dim() != indices.dim():
        return NotImplemented
    axes = range(input.dim())
    sizes = [
        (-1, -1) if k == dim % len(axes) else (m if n == 1 else n,) * 2
        for k, n, m in zip(axes, input.shape, indices.shape, strict=True)
    ]
    return input.expand([n for n, _ in sizes]).gather(dim, indices.expand([n for _, n in sizes]))


def _sort(
    input: Tensor, dim: int = -1, descending: bool = False, stable: bool | None = False, *, places: bool = False
) -> Any:
    """ONNX's TopK, which sorts, always leaves equal entries in their order."""
    if not stable:
        return NotImplemented
    return torch.argsort(input, dim, descending) if places else torch.sort(input, dim, descending)


def _multi_dot(tensors: Sequence[Tensor]) -> Any:
    return reduce(torch.matmul, tensors)


def _hypot(input: Tensor, other: Tensor) -> Tensor:
    return (input.square() + other.square()).sqrt()


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Any:
    return NotImplemented if training else F.leaky_relu(input, (lower + upper) / 2)


def _avg_pool2d(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: int | None = None,
) -> Any:  # fmt: skip
    if divisor_override is None or ceil_mode:
        return NotImplemented
    cells = kernel_size**2 if isinstance(kernel_size, int) else prod(kernel_size)
    return F.avg_pool2d(input, kernel_size, stride, padding) * (cells / divisor_override)


def _cells(input: Tensor, output_size: Any, axes: int) -> list[tuple[Tensor, list[int]]] | None:
    """What every entry of an adaptive pooling's output looks at, and where that begins; None where sizes are open, or all is one entry."""
    wanted = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
    sizes = input.shape[-axes:]
    if None in wanted or any(isinstance(n, torch.SymInt) for n in sizes) or set(wanted) == {1}:
        return None
    cells = []
    for place in product(*map(range, wanted)):
        part, begins = input, []
        for axis, k, n, m in zip(range(-axes, 0), place, wanted, sizes, strict=True):
            begins.append(k * m // n)
            part = part.narrow(axis, begins[-1], -((k + 1) * m // -n) - begins[-1])
        cells.append((part, begins))
    return cells


def _unflattened(entries: Sequence[Tensor], output_size: Any, axes: int) -> Tensor:
    wanted = (output_size,) * axes if isinstance(output_size, int) else tuple(output_size)
    result: Tensor = torch.stack(list(entries), -1).unflatten(-1, wanted)
    return result


def _adaptive_avg_pool3d(input: Tensor, output_size: Any) -> Any:
    cells = _cells(input, output_size, 3)
    if cells is None:
        return NotImplemented
    return _unflattened([part.mean((-3, -2, -1)) for part, _ in cells], output_size, 3)


def _adaptive_max_pool(input: Tensor, output_size: Any, return_indices: bool = True, *, axes: int) -> Any:
    cells = _cells(input, output_size, axes)
    if cells is None:
        return NotImplemented
    if not return_indices:
        return _unflattened([part.amax(tuple(range(-axes, 0))) for part, _ in cells], output_size, axes)
    found = [part.flatten(-axes).max(-1) for part, _ in cells]
    places = []
    for (part, begins), (_, rest) in zip(cells, found, strict=True):
        place, stride = torch.zeros_like(rest), 1
        for axis in range(-1, -axes - 1, -1):
            place, rest = place + (rest % part.shape[axis] + begins[axis]) * stride, rest // part.shape[axis]
            stride *= input.shape[axis]
        places.append(place)
    return tuple(_unflattened(entries, output_size, axes) for entries in ([values for values, _ in found], places))


def _grouped_mm(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Any:  # fmt: skip
    """Every group's matrix multiplies all rows, of which those of other groups are 0: a file has no rows of their own for a group."""
    if offs is None or bias is not None or out_dtype is not None or (input.dim(), weight.dim()) != (2, 3):
        return NotImplemented
    group = (torch.arange(input.shape[0], device=input.device)[:, None] >= offs).sum(1)
    own = group == torch.arange(weight.shape[0], device=input.device)[:, None]
    return (torch.where(own[..., None], input, torch.zeros((), dtype=input.dtype)) @ weight).sum(0)


_FORMS: dict[str, Callable[..., Any]] = {
    "cdist": _cdist,
    "kthvalue": _kthvalue,
    "median": _median,
    "cumprod": _cumprod,
    "searchsorted": _searchsorted,
    "isin": _isin,
    "take_along_dim": _take_along_dim,
    "sort": _sort,
    "argsort": partial(_sort, places=True),
    "linalg_multi_dot": _multi_dot,
    "hypot": _hypot,
    "rrelu": _rrelu,
    "avg_pool2d": _avg_pool2d,
    **{
        f"adaptive_max_pool{axes}d{ending}": partial(_adaptive_max_pool, axes=axes)
        for axes in (1, 2, 3)
        for ending in ("", "_with_indices")
    },
    "adaptive_avg_pool3d": _adaptive_avg_pool3d,
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped_mm),
}
"""By the operation's name: its form."""
