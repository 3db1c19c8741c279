"""Rules of operators with weights: each is a layer of torch.nn under the name that its weights have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.pooling import padded
from indistill_fx.loading.onnx.values import Traced, Undecided, Value


def convolution(op: Op, build: Builder) -> Any:
    """Conv in one to three dimensions; its filters may be computed."""
    x, filters = _traced(op, 0), op.required(1)
    shape = filters.samples[0].shape if isinstance(filters, Traced) else torch.Size(filters.shape)
    space = len(shape) - 2
    if not 1 <= space <= 3:
        raise Undecided(f"is a convolution in {space} dimensions")
    stride = tuple(op.get("strides", [1] * space))
    dilation = tuple(op.get("dilations", [1] * space))
    x, padding = padded(op, build, x, tuple(shape[2:]), stride, dilation)
    groups = int(op.get("group", 1))
    if isinstance(filters, Traced):
        function = (F.conv1d, F.conv2d, F.conv3d)[space - 1]
        return build.call(function, x, filters, op.input(2), stride, padding, dilation, groups)
    weight, bias = op.constant(1), op.constant(2)
    assert weight is not None

    def make() -> nn.Module:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
        size: Any = tuple(shape[2:])
        return kind(shape[1] * groups, shape[0], size, stride, padding, dilation, groups, bias is not None)  # type: ignore[arg-type]

    return build.layer(op, make, {"weight": weight, "bias": bias}, x)


def transposed_convolution(op: Op, build: Builder) -> Any:
    """ConvTranspose with the same padding on both ends."""
    x, weight, bias = _traced(op, 0), op.constant(1), op.constant(2)
    if weight is None or "output_shape" in op.attributes or op.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Undecided("is a transposed convolution with a shape or filters that are computed")
    space = weight.dim() - 2
    pads = list(op.get("pads", [0] * 2 * space))
    if pads[:space] != pads[space:] or not 1 <= space <= 3:
        raise Undecided("pads both ends differently")
    stride, dilation = tuple(op.get("strides", [1] * space)), tuple(op.get("dilations", [1] * space))
    more, groups = tuple(op.get("output_padding", [0] * space)), int(op.get("group", 1))

    def make() -> nn.Module:
        kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[space - 1]
        size: Any = tuple(weight.shape[2:])
        channels = weight.shape[0], weight.shape[1] * groups
        return kind(*channels, size, stride, tuple(pads[:space]), more, groups, bias is not None, dilation)  # type: ignore[arg-type]

    return build.layer(op, make, {"weight": weight, "bias": bias}, x)


def gemm(op: Op, build: Builder) -> Any:
    """Gemm: a linear layer where weights are constants, else a product and a sum."""
    x, weight = build.tensor(op.required(0)), build.tensor(op.required(1))
    alpha, beta, bias = float(op.get("alpha", 1.0)), float(op.get("beta", 1.0)), op.input(2)
    if isinstance(x, Traced) and isinstance(weight, Tensor) and (bias is None or isinstance(bias, Tensor)):
        plain = not op.get("transA", 0) and alpha == 1 and (bias is None or beta == 1)
        matrix = weight if op.get("transB", 0) else build.turned(weight)
        flat = bias.reshape(-1) if isinstance(bias, Tensor) and bias.numel() == len(matrix) else None
        if plain and (bias is None or flat is not None):
            if isinstance(bias, Tensor) and flat is not None:
                flat = bias if bias.dim() == 1 else flat
                build.names.setdefault(id(flat), build.names.get(id(bias), ""))
            return linear(op, build, x, matrix, flat)
    x = build.call(torch.t, x) if op.get("transA", 0) else x
    product = build.call(torch.matmul, x, build.call(torch.t, weight) if op.get("transB", 0) else weight)
    product = build.call(torch.mul, product, alpha) if alpha != 1 else product
    if bias is None:
        return product
    bias = build.tensor(bias)
    return build.call(torch.add, product, build.call(torch.mul, bias, beta) if beta != 1 else bias)


def linear(op: Op, build: Builder, x: Value, matrix: Tensor, bias: Tensor | None) -> Any:
    """A linear layer.

    Args:
        op: gives the name.
        build: the graph.
        x: (…, in).
        matrix: (out, in).
        bias: (out,) or None.
    """
    rows, columns = matrix.shape
    return build.layer(op, lambda: nn.Linear(columns, rows, bias is not None), {"weight": matrix, "bias": bias}, x)


def matmul(op: Op, build: Builder) -> Any:
    """MatMul: with a constant second matrix it is a linear layer, which takes the bias added next as its own (see `convert`)."""
    x, other = build.tensor(op.required(0)), build.tensor(op.required(1))
    if isinstance(x, Traced) and isinstance(other, Tensor) and other.dim() == 2 and other.is_floating_point():
        return linear(op, build, x, build.turned(other), op.constant(2))
    return build.call(torch.matmul, x, other)


def batch_norm(op: Op, build: Builder) -> Any:
    """BatchNormalization with its stored statistics."""
    if op.get("training_mode", 0) or op.outputs > 1:
        raise Undecided("is a batch norm in training mode")
    x = _traced(op, 0)
    weights = dict(zip(("weight", "bias", "running_mean", "running_var"), map(op.constant, range(1, 5)), strict=True))
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[x.dim]
    channels, eps = len(_given(weights["weight"])), float(op.get("epsilon", 1e-5))
    return build.layer(op, lambda: kind(channels, eps, 1 - float(op.get("momentum", 0.9))), weights, x)


def layer_norm(op: Op, build: Builder) -> Any:
    """LayerNormalization over the last axes."""
    x, weight, bias = _traced(op, 0), _given(op.constant(1)), op.constant(2)
    axis = int(op.get("axis", -1)) % x.dim
    shape = [x.fixed(place) for place in range(axis, x.dim)]
    if op.outputs > 1 or tuple(weight.shape) != tuple(shape):
        raise Undecided("normalises over axes of free lengths, or returns its statistics")
    eps = float(op.get("epsilon", 1e-5))
    make = lambda: nn.LayerNorm(tuple(weight.shape), eps, bias=bias is not None)  # noqa: E731
    return build.layer(op, make, {"weight": weight, "bias": bias}, x)


def instance_norm(op: Op, build: Builder) -> Any:
    """InstanceNormalization."""
    x, weight, bias = _traced(op, 0), _given(op.constant(1)), op.constant(2)
    kind = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}[x.dim]
    eps = float(op.get("epsilon", 1e-5))
    return build.layer(op, lambda: kind(len(weight), eps, affine=True), {"weight": weight, "bias": bias}, x)


def group_norm(op: Op, build: Builder) -> Any:
    """GroupNormalization with a scale for every channel (operator set 21)."""
    x, weight, bias = _traced(op, 0), _given(op.constant(1)), op.constant(2)
    groups = int(op.get("num_groups", 1))
    if len(weight) != x.fixed(1):
        raise Undecided("has one scale for a group of channels")
    eps = float(op.get("epsilon", 1e-5))
    return build.layer(op, lambda: nn.GroupNorm(groups, len(weight), eps), {"weight": weight, "bias": bias}, x)


def local_response_norm(op: Op, build: Builder) -> Any:
    """LRN."""
    settings = float(op.get("alpha", 1e-4)), float(op.get("beta", 0.75)), float(op.get("bias", 1.0))
    return build.call(F.local_response_norm, _traced(op, 0), int(op.get("size", 1)), *settings)


def _traced(op: Op, number: int) -> Traced:
    value = op.required(number)
    if not isinstance(value, Traced):
        raise Undecided("works on a constant")
    return value


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise Undecided("lacks its weights")
    return tensor
