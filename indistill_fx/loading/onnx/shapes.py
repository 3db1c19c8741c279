"""Rules of operators that rearrange entries, pick some of them, or make tensors of a shape."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.loading.onnx.builder import Builder, Op, one_of
from indistill_fx.loading.onnx.values import Size, Traced, Undecided, Value, list_of, numbers_of, sizes

_FAR = 1 << 30


def shape(op: Op, build: Builder) -> Any:
    """Shape: numbers where an axis is fixed, else sizes in the graph."""
    x = op.required(0)
    dim = _dim(x)
    axes = range(dim)[slice(op.get("start", None), op.get("end", None))]
    if isinstance(x, Traced):
        return sizes([build.size(x, axis) for axis in axes])
    return sizes([x.shape[axis] for axis in axes])


def reshape(op: Op, build: Builder) -> Any:
    """Reshape; where one length follows from the input it is left to torch (-1), so that any batch fits."""
    x, wanted = op.required(0), list_of(op.required(1))
    if not isinstance(x, Traced):
        x = build.tensor(x)
        assert isinstance(x, Tensor)
        wanted = [x.shape[place] if n == 0 and not op.get("allowzero", 0) else n for place, n in enumerate(wanted)]
        return build.call(torch.reshape, x, tuple(wanted))
    if not op.get("allowzero", 0):
        wanted = [build.size(x, place) if _is(n, 0) else n for place, n in enumerate(wanted)]
    if build.batch is not None and wanted and _is(wanted[0], build.batch) and x.fixed(0) is None:
        # The file was exported for one batch size; the comparison with onnxruntime shows whether this axis is the
        # batch.
        wanted[0] = build.size(x, 0)
    shapes = [sample.reshape(_at(wanted, number)).shape for number, sample in enumerate(x.samples)]
    return _laid_out(build, x, wanted, shapes)


def _laid_out(build: Builder, x: Traced, wanted: Sequence[Any], shapes: Sequence[Sequence[int]]) -> Any:
    ends = list(zip(*shapes, strict=True))
    fixed = [lengths[0] if len(set(lengths)) == 1 else None for lengths in ends]
    same_batch = bool(ends) and ends[0] == tuple(sample.shape[0] for sample in x.samples)
    if len(ends) == 2 and x.dim > 2 and same_batch:
        return build.call(torch.flatten, x, 1)
    if all(tuple(sample.shape) == tuple(shape) for sample, shape in zip(x.samples, shapes, strict=True)):
        return x
    if fixed.count(None) <= 1:
        return build.call(torch.reshape, x, tuple(-1 if n is None else n for n in fixed))
    known = [n if n is not None else wanted[place] for place, n in enumerate(fixed)]
    return build.call(torch.reshape, x, tuple(known))


def flatten(op: Op, build: Builder) -> Any:
    """Flatten into a matrix."""
    x, axis = build.tensor(op.required(0)), int(op.get("axis", 1))
    axis = axis % _dim(x) if axis < 0 else axis
    if axis == 1:
        return x if _dim(x) == 2 else build.call(torch.flatten, x, 1)
    if axis == 0:
        return build.call(torch.unsqueeze, build.call(torch.flatten, x), 0)
    if axis == _dim(x):
        return build.call(torch.unsqueeze, build.call(torch.flatten, x), 1)
    left = build.call(torch.flatten, x, 0, axis - 1)
    return build.call(torch.flatten, left, 1) if _dim(left) > 2 else left


def squeeze(op: Op, build: Builder) -> Any:
    """Squeeze the axes named, or all of length one."""
    x, axes = build.tensor(op.required(0)), op.numbers("axes", 1)
    dim = _dim(x)
    if axes is None:
        axes = [axis for axis in range(dim) if (x.fixed(axis) if isinstance(x, Traced) else x.shape[axis]) == 1]
    return build.call(torch.squeeze, x, tuple(int(axis) % dim for axis in axes)) if axes else x


def unsqueeze(op: Op, build: Builder) -> Any:
    """Unsqueeze."""
    x, axes = build.tensor(op.required(0)), op.numbers("axes", 1) or []
    dim = _dim(x) + len(axes)
    for axis in sorted(int(axis) % dim for axis in axes):
        x = build.call(torch.unsqueeze, x, axis)
    return x


def transpose(op: Op, build: Builder) -> Any:
    """Transpose by any permutation."""
    x = build.tensor(op.required(0))
    order = tuple(op.get("perm", range(_dim(x))[::-1]))
    return x if order == tuple(range(_dim(x))) else build.call(torch.permute, x, order)


def concat(op: Op, build: Builder) -> Any:
    """Concat; a constant beside a batch that the file fixes to one sample is the same for every sample."""
    parts: list[Any] = [build.tensor(op.required(number)) for number in range(len(op.inputs))]
    first = next((part for part in parts if isinstance(part, Traced)), None)
    # a token that was exported for a single sample
    if first is not None and build.batch == 1 and first.fixed(0) is None:
        rows = build.size(first, 0)
        parts = [
            build.call(Tensor.expand, part, rows, *part.shape[1:])
            if isinstance(part, Tensor) and len(part) == 1
            else part
            for part in parts
        ]
    return parts[0] if len(parts) == 1 else build.call(torch.cat, parts, int(op.get("axis", 0)))


def split(op: Op, build: Builder) -> Any:
    """Split into parts of given or of equal lengths."""
    x, axis, parts = build.tensor(op.required(0)), int(op.get("axis", 0)), op.numbers("split", 1)
    if parts is None:
        count = int(op.get("num_outputs", op.outputs))
        length = x.fixed(axis % x.dim) if isinstance(x, Traced) else x.shape[axis]
        if length is None:
            raise Undecided("splits an axis of free length")
        each = -(-length // count)
        parts = [min(each, length - start) for start in range(0, length, each)]
    return build.call(torch.split, x, [int(n) if not isinstance(n, Size) else n for n in parts], axis)


def cut(op: Op, build: Builder) -> Any:
    """Slice."""
    x = build.tensor(op.required(0))
    starts, ends = op.numbers("starts", 1) or [], op.numbers("ends", 2) or []
    axes = op.numbers("axes", 3) or range(len(starts))
    steps = (op.numbers("steps", 4) if op.opset >= 10 else None) or [1] * len(starts)
    index: list[Any] = [slice(None)] * _dim(x)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        place = int(axis) % _dim(x)
        if step < 0:
            if not (start == -1 or start > _FAR) or end > -_FAR or step != -1:
                raise Undecided("slices backwards other than over the whole axis")
            x = build.call(torch.flip, x, (place,))
            continue
        low = None if _is(start, 0) else start
        high = None if not isinstance(end, Size) and (end > _FAR or _covers(x, place, end)) else end
        index[place] = slice(low, high, None if step == 1 else step)
    if all(entry == slice(None) for entry in index):
        return x
    while index and index[-1] == slice(None):
        index.pop()
    return build.call(operator.getitem, x, tuple(index))


def _covers(x: Value, axis: int, end: int) -> bool:
    length = x.fixed(axis) if isinstance(x, Traced) else x.shape[axis]
    return length is not None and end >= length


def gather(op: Op, build: Builder) -> Any:
    """Gather along an axis; from a constant table by whole numbers it is an embedding."""
    x, index, axis = build.tensor(op.required(0)), op.required(1), int(op.get("axis", 0))
    axis %= _dim(x)
    if isinstance(index, Tensor):
        if index.dim() == 0:
            place = int(index)
            return build.call(torch.select, x, axis, place)
        length = x.fixed(axis) if isinstance(x, Traced) else x.shape[axis]
        if index.dim() == 1 and length is not None:
            return build.call(torch.index_select, x, axis, torch.where(index < 0, index + length, index))
    elif isinstance(index, Traced) and isinstance(x, Tensor) and axis == 0 and x.dim() == 2 and x.is_floating_point():
        rows, columns = x.shape
        return build.layer(op, lambda: nn.Embedding(rows, columns), {"weight": x}, index)
    elif not isinstance(index, (Tensor, Traced)):
        return build.call(torch.select, x, axis, one_of(index))
    return build.call(operator.getitem, x, (*[slice(None)] * axis, index))


def gather_elements(op: Op, build: Builder) -> Any:
    """GatherElements; negative places count from the end."""
    x, index, axis = build.tensor(op.required(0)), build.tensor(op.required(1)), int(op.get("axis", 0))
    length = build.size(x, axis) if isinstance(x, Traced) else x.shape[axis]
    from_start = build.call(torch.where, build.call(torch.lt, index, 0), build.call(operator.add, index, length), index)
    return build.call(torch.gather, x, axis, from_start)


def gather_nd(op: Op, build: Builder) -> Any:
    """GatherND without batch axes."""
    x, index = build.tensor(op.required(0)), build.tensor(op.required(1))
    if op.get("batch_dims", 0) or not isinstance(index, Tensor):
        raise Undecided("gathers by computed indices")
    return build.call(operator.getitem, x, tuple(index.unbind(-1)))


def scatter_nd(op: Op, build: Builder) -> Any:
    """ScatterND that replaces entries."""
    x, index, new = (build.tensor(op.required(number)) for number in range(3))
    if op.get("reduction", "none") != "none" or not isinstance(index, Tensor):
        raise Undecided("scatters by computed indices, or adds up entries of the same place")
    return build.call(torch.index_put, x, tuple(index.unbind(-1)), new)


def expand(op: Op, build: Builder) -> Any:
    """Expand, which broadcasts both ways."""
    x, wanted = build.tensor(op.required(0)), list_of(op.required(1))
    if isinstance(x, Tensor) and not any(isinstance(n, Size) for n in wanted):
        return build.call(Tensor.expand, x, torch.broadcast_shapes(x.shape, tuple(wanted)))
    samples = x.samples if isinstance(x, Traced) else (x,) * len(build.counts)
    shapes = [torch.broadcast_shapes(sample.shape, _at(wanted, number)) for number, sample in enumerate(samples)]
    if all(tuple(sample.shape) == tuple(new) for sample, new in zip(samples, shapes, strict=True)):
        return x
    ends = list(zip(*shapes, strict=True))
    extra = len(ends) - len(samples[0].shape)
    result: list[Any] = []
    for place, lengths in enumerate(ends):
        kept = place >= extra and all(
            sample.shape[place - extra] == n for sample, n in zip(samples, lengths, strict=True)
        )
        number = wanted[place - len(ends)] if len(ends) - place <= len(wanted) else -1
        result.append(-1 if kept else lengths[0] if len(set(lengths)) == 1 else number)
    return build.call(Tensor.expand, x, *result)


def tile(op: Op, build: Builder) -> Any:
    """Tile."""
    return build.call(Tensor.repeat, build.tensor(op.required(0)), *list_of(op.required(1)))


def constant_of_shape(op: Op, build: Builder) -> Any:
    """ConstantOfShape."""
    value = op.get("value", torch.zeros(1))
    return build.make(torch.full, tuple(list_of(op.required(0))), value.reshape(-1)[0].item(), dtype=value.dtype)


def span(op: Op, build: Builder) -> Any:
    """Range."""
    ends = [one_of(numbers_of(op.required(number))) for number in range(3)]
    first = op.input(0)
    dtype = first.dtype if isinstance(first, Tensor) else torch.int64
    return build.make(torch.arange, *ends, dtype=dtype)


def constant(op: Op, build: Builder) -> Any:
    """Constant, in all its forms."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in op.attributes:
            value = op.attributes[name]
            return value if isinstance(value, Tensor) else torch.tensor(value)
    raise Undecided("holds text or a sparse tensor")


def triangle(op: Op, build: Builder) -> Any:
    """Trilu."""
    diagonal = op.constant(1)
    function = torch.triu if op.get("upper", 1) else torch.tril
    return build.call(function, build.tensor(op.required(0)), int(diagonal) if diagonal is not None else 0)


def entries(op: Op, build: Builder) -> Any:
    """Size: how many entries a tensor has."""
    x = op.required(0)
    total: Any = 1
    for axis in range(_dim(x)):
        total = total * (build.size(x, axis) if isinstance(x, Traced) else x.shape[axis])
    return sizes(total)


def _dim(value: Value) -> int:
    return value.dim if isinstance(value, Traced) else len(value.shape)


def _is(number: Any, wanted: int) -> bool:
    return not isinstance(number, Size) and bool(number == wanted)


def _at(numbers: Sequence[Any], place: int) -> tuple[int, ...]:
    return tuple(int(n.samples[place]) if isinstance(n, Size) else int(n) for n in numbers)
