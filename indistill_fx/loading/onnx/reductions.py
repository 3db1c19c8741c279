"""Rules of operators along axes: sums and means, softmax, the largest entries, products by subscripts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.values import Traced, Undecided, Value

_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
}
_SUMS = frozenset("ReduceSum ReduceSumSquare ReduceL1".split())


def reduction(op: Op, build: Builder) -> Any:
    """Reduce…, over some axes or all."""
    x = build.tensor(op.required(0))
    axes = op.numbers("axes", 1)
    if not axes:
        if op.get("noop_with_empty_axes", 0):
            return x
        axes = list(range(_dim(x)))
    over = tuple(int(axis) % _dim(x) for axis in axes)
    keep = bool(op.get("keepdims", 1))
    if op.kind == "ReduceProd":
        for axis in sorted(over, reverse=True):
            x = build.call(torch.prod, x, axis, keep, dtype=x.dtype)
        return x
    if op.kind == "ReduceL1":
        x = build.call(torch.abs, x)
    if op.kind == "ReduceL2":
        return build.call(torch.linalg.vector_norm, x, 2, over, keep)
    if op.kind == "ReduceSumSquare":
        x = build.call(torch.square, x)
    if op.kind in _SUMS:
        return build.call(torch.sum, x, over, keep, **_kept_type(x))
    return build.call(_REDUCTIONS[op.kind], x, over, keep)


def softmax(op: Op, build: Builder) -> Any:
    """Softmax and LogSoftmax; before operator set 13 over all axes from one on."""
    x = build.tensor(op.required(0))
    function = torch.softmax if op.kind == "Softmax" else torch.log_softmax
    axis = int(op.get("axis", -1 if op.opset >= 13 else 1)) % _dim(x)
    if op.opset >= 13 or axis == _dim(x) - 1:
        return build.call(function, x, axis)
    lengths = [build.size(x, place) if isinstance(x, Traced) else x.shape[place] for place in range(axis, _dim(x))]
    flat = build.call(function, build.call(torch.flatten, x, axis), axis)
    return build.call(torch.unflatten, flat, axis, tuple(lengths))


def argument(op: Op, build: Builder) -> Any:
    """ArgMax and ArgMin; of equal entries the first."""
    if op.get("select_last_index", 0):
        raise Undecided("takes the last of equal entries")
    function = torch.argmax if op.kind == "ArgMax" else torch.argmin
    return build.call(function, build.tensor(op.required(0)), int(op.get("axis", 0)), bool(op.get("keepdims", 1)))


def top_k(op: Op, build: Builder) -> Any:
    """TopK of a constant number, largest or smallest first; of equal entries the first, which `torch.topk` does not promise."""
    count = torch.tensor(op.attributes["k"]) if "k" in op.attributes else op.constant(1)
    if count is None or count.numel() != 1:
        raise Undecided("takes a computed number of entries")
    x, axis, descending = build.tensor(op.required(0)), int(op.get("axis", -1)), bool(op.get("largest", 1))
    both = build.call(torch.sort, x, dim=axis, descending=descending, stable=True)
    return tuple(build.call(torch.narrow, part, axis, 0, int(count)) for part in both)


def running_sum(op: Op, build: Builder) -> Any:
    """CumSum forwards."""
    axis = op.constant(1)
    if axis is None or op.get("exclusive", 0) or op.get("reverse", 0):
        raise Undecided("sums backwards, or without the entry itself")
    x = build.tensor(op.required(0))
    return build.call(torch.cumsum, x, int(axis), **_kept_type(x))


def einsum(op: Op, build: Builder) -> Any:
    """Einsum."""
    operands = [build.tensor(op.required(number)) for number in range(len(op.inputs))]
    return build.call(torch.einsum, op.get("equation", ""), *operands)


def mean_variance(op: Op, build: Builder) -> Any:
    """MeanVarianceNormalization."""
    x = build.tensor(op.required(0))
    axes = tuple(op.get("axes", [0, 2, 3]))
    centred = build.call(operator.sub, x, build.call(torch.mean, x, axes, True))
    deviation = build.call(torch.sqrt, build.call(torch.mean, build.call(torch.square, centred), axes, True))
    return build.call(operator.truediv, centred, build.call(operator.add, deviation, 1e-9))


def _kept_type(x: Tensor | Traced) -> dict[str, torch.dtype]:
    """What keeps a sum of whole numbers in their type; torch makes it int64."""
    return {} if x.dtype.is_floating_point else {"dtype": x.dtype}


def _dim(value: Value) -> int:
    return value.dim if isinstance(value, Traced) else len(value.shape)
