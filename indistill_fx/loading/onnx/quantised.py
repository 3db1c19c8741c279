"""Rules of quantised operators: what the file computes in whole numbers, in floats with the same roundings.

Constants are dequantised while converting, so weights become those of ordinary layers.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from indistill_fx.loading.onnx import layers
from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.read import dtype_of
from indistill_fx.loading.onnx.values import Traced, Undecided, Value


def quantize(op: Op, build: Builder) -> Any:
    """QuantizeLinear: saturate(round(x / scale) + zero), ties to even."""
    _refuse_blocks(op)
    zero = op.constant(2)
    named = int(op.get("output_dtype", 0))
    dtype = zero.dtype if zero is not None else dtype_of(named, op.name) if named else torch.uint8
    return _quantized(
        build.tensor(op.required(0)), op.required_constant(1, "its scale"), zero, dtype, int(op.get("axis", 1)), build
    )


def dequantize(op: Op, build: Builder) -> Any:
    """DequantizeLinear: (x - zero) * scale."""
    _refuse_blocks(op)
    made = _dequantized(
        op.required(0), op.required_constant(1, "its scale"), op.constant(2), int(op.get("axis", 1)), build
    )
    if isinstance(made, Tensor):
        _name(made, op, 0, build)
    return made


def dynamic_quantize(op: Op, build: Builder) -> Any:
    """DynamicQuantizeLinear: to uint8 between the tensor's own bounds; also its scale and zero."""
    x = build.tensor(op.required(0))
    low = build.call(torch.clamp, build.call(torch.amin, x), max=0.0)
    high = build.call(torch.clamp, build.call(torch.amax, x), min=0.0)
    scale = build.call(operator.truediv, build.call(operator.sub, high, low), 255.0)
    zero = build.call(torch.round, build.call(operator.truediv, build.call(operator.neg, low), scale))
    zero = build.call(torch.clamp, zero, 0.0, 255.0)
    rounded = build.call(operator.add, build.call(torch.round, build.call(operator.truediv, x, scale)), zero)
    y = build.call(Tensor.to, build.call(torch.clamp, rounded, 0.0, 255.0), torch.uint8)
    return y, scale, build.call(Tensor.to, zero, torch.uint8)


def convolution(op: Op, build: Builder) -> Any:
    """QLinearConv: a convolution of dequantised numbers, quantised again."""
    x = _dequantized(op.required(0), op.required_constant(1, "its scale"), op.constant(2), 1, build)
    filters = _dequantized(
        op.required_constant(3, "its weights"), op.required_constant(4, "its scale"), op.constant(5), 0, build
    )
    _name(filters, op, 3, build)
    bias = op.constant(8)
    if bias is not None:
        bias = bias.to(filters.dtype) * (
            op.required_constant(1, "its scale") * op.required_constant(4, "its scale")
        ).reshape(-1)
        _name(bias, op, 8, build)
    plain = replace(
        op, inputs=(x, filters, bias), names=(op.names[0], op.names[3], op.names[8] if bias is not None else "")
    )
    return _again(layers.convolution(plain, build), op, build)


def matmul(op: Op, build: Builder) -> Any:
    """QLinearMatMul: a product of dequantised numbers, quantised again."""
    a = _dequantized(op.required(0), op.required_constant(1, "its scale"), op.constant(2), -2, build)
    b = _dequantized(op.required(3), op.required_constant(4, "its scale"), op.constant(5), -1, build)
    if isinstance(b, Tensor):
        _name(b, op, 3, build)
    return _again(layers.matmul(replace(op, inputs=(a, b), names=(op.names[0], op.names[3])), build), op, build)


def whole_convolution(op: Op, build: Builder) -> Any:
    """ConvInteger: a convolution of whole numbers."""
    x, filters = _shifted(op, 0, 2, 1, build), _shifted(op, 1, 3, 0, build)
    plain = replace(op, inputs=(x, filters), names=op.names[:2])
    return _whole(layers.convolution(plain, build), build)


def whole_matmul(op: Op, build: Builder) -> Any:
    """MatMulInteger: a product of whole numbers."""
    a, b = _shifted(op, 0, 2, -2, build), _shifted(op, 1, 3, -1, build)
    return _whole(layers.matmul(replace(op, inputs=(a, b), names=op.names[:2]), build), build)


def _again(value: Traced, op: Op, build: Builder) -> Any:
    zero = op.constant(7)
    return _quantized(
        value, op.required_constant(6, "its scale"), zero, zero.dtype if zero is not None else torch.uint8, 1, build
    )


def _quantized(x: Any, scale: Tensor, zero: Tensor | None, dtype: torch.dtype, axis: int, build: Builder) -> Any:
    rounded = build.call(torch.round, build.call(operator.truediv, x, _along(scale, x, axis)))
    if zero is not None and bool(zero.any()):
        rounded = build.call(operator.add, rounded, _along(zero.to(scale.dtype), x, axis))
    bounds = torch.iinfo(dtype)
    return build.call(Tensor.to, build.call(torch.clamp, rounded, float(bounds.min), float(bounds.max)), dtype)


def _dequantized(x: Value, scale: Tensor, zero: Tensor | None, axis: int, build: Builder) -> Any:
    x = _as_floats(build.tensor(x), scale.dtype, build)
    if zero is not None and bool(zero.any()):
        x = build.call(operator.sub, x, _along(zero.to(scale.dtype), x, axis))
    return build.call(operator.mul, x, _along(scale, x, axis))


def _as_floats(x: Tensor | Traced, dtype: torch.dtype, build: Builder) -> Any:
    """Integers as floats; if they were quantised from floats just before, those floats."""
    if isinstance(x, Traced) and x.node.target == "to" and isinstance(x.node.args[0], fx.Node):
        source = x.node.args[0]
        if source.target is torch.clamp and x.dtype in (torch.uint8, torch.int8, torch.int16):
            return Traced(source, tuple(torch.empty_like(sample, dtype=dtype) for sample in x.samples))
    return build.call(Tensor.to, x, dtype)


def _shifted(op: Op, number: int, zero: int, axis: int, build: Builder) -> Any:
    """An integer operand minus its zero point, as floats."""
    x = build.call(Tensor.to, build.tensor(op.required(number)), torch.float32)
    shift = op.input(zero)
    if isinstance(shift, Tensor):
        x = build.call(operator.sub, x, _along(shift.float(), x, axis)) if bool(shift.any()) else x
    elif shift is not None:
        x = build.call(operator.sub, x, build.call(Tensor.to, build.tensor(shift), torch.float32))
    if isinstance(x, Tensor):
        _name(x, op, number, build)
    return x


def _whole(value: Any, build: Builder) -> Any:
    return build.call(Tensor.to, build.call(torch.round, value), torch.int32)


def _along(value: Tensor, x: Any, axis: int) -> Any:
    """A scale or zero point in the shape that broadcasts to a tensor: one number, or one for each entry of an axis."""
    if value.numel() == 1:
        return value.item()
    dim = x.dim if isinstance(x, Traced) else x.dim()
    if value.dim() != 1:
        raise Undecided("has scales in blocks")
    return value.reshape(-1, *[1] * (dim - 1 - axis % dim))


def _refuse_blocks(op: Op) -> None:
    if op.get("block_size", 0):
        raise Undecided("has scales in blocks")


def _name(tensor: Tensor, op: Op, number: int, build: Builder) -> None:
    """Record a weight's original name: quantisers turn `conv1.weight` into `conv1.weight_quantized`."""
    build.names[id(tensor)] = op.names[number].removesuffix("_quantized")
