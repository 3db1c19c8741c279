"""Rules of operators on single numbers: activations, arithmetic, comparisons, types."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.read import dtype_of
from indistill_fx.loading.onnx.values import Traced, Undecided

UNARY: dict[str, Callable[..., Any]] = {
    "Relu": F.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "HardSwish": F.hardswish,
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Erf": torch.erf,
    **{
        name: getattr(torch, name.lower())
        for name in "Exp Log Sqrt Abs Neg Floor Ceil Round Sign Sin Cos Tan Atan".split()
    },
    "Reciprocal": torch.reciprocal,
    "Not": torch.logical_not,
    "IsNaN": torch.isnan,
}
_ARITHMETIC: dict[str, Callable[..., Any]] = {"Add": operator.add, "Sub": operator.sub, "Mul": operator.mul}
COMPARISONS: dict[str, Callable[..., Any]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
}


def unary(op: Op, build: Builder) -> Any:
    """A function of one tensor without settings."""
    return build.call(UNARY[op.kind], build.tensor(op.required(0)))


def is_infinite(op: Op, build: Builder) -> Any:
    """IsInf, of both signs or one."""
    x, below, above = build.tensor(op.required(0)), op.get("detect_negative", 1), op.get("detect_positive", 1)
    if not below and not above:
        raise Undecided("detects neither sign of infinity")
    if below and above:
        return build.call(torch.isinf, x)
    return build.call(torch.eq, x, float("inf") if above else float("-inf"))


def with_slope(op: Op, build: Builder) -> Any:
    """LeakyRelu, Elu, Celu, Selu, ThresholdedRelu and HardSigmoid, with torch's own function where the settings are its."""
    x = build.tensor(op.required(0))
    alpha = float(op.get("alpha", {"LeakyRelu": 0.01, "HardSigmoid": 0.2, "Selu": 1.67326}.get(op.kind, 1.0)))
    if op.kind == "HardSigmoid":
        beta = float(op.get("beta", 0.5))
        if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
            return build.call(F.hardsigmoid, x)
        scaled = build.call(operator.add, build.call(operator.mul, x, alpha), beta)
        return build.call(torch.clamp, scaled, 0.0, 1.0)
    if op.kind == "ThresholdedRelu":
        return build.call(F.threshold, x, alpha, 0.0)
    if op.kind == "Selu":
        if abs(alpha - 1.67326) > 1e-4 or abs(op.get("gamma", 1.0507) - 1.0507) > 1e-4:
            raise Undecided("has other constants than a SELU")
        return build.call(F.selu, x)
    slope: Callable[..., Any] = {"LeakyRelu": F.leaky_relu, "Elu": F.elu, "Celu": F.celu}[op.kind]
    return build.call(slope, x, alpha)


def gelu(op: Op, build: Builder) -> Any:
    """Gelu, exact or by tanh."""
    return build.call(F.gelu, build.tensor(op.required(0)), approximate=op.get("approximate", "none"))


def clip(op: Op, build: Builder) -> Any:
    """Clip between constants: ReLU and ReLU6 where it is one."""
    x = build.tensor(op.required(0))
    bounds: list[float | None] = []
    for place, name in enumerate(("min", "max")):
        given = op.attributes.get(name) if op.opset < 11 else op.constant(place + 1)
        bounds.append(given.item() if isinstance(given, Tensor) else given)
    low, high = (None if bound is not None and abs(bound) > 3e38 else bound for bound in bounds)
    if (low, high) == (0, None):
        return build.call(F.relu, x)
    if (low, high) == (0, 6):
        return build.call(F.relu6, x)
    if low is None and high is None:
        return x
    return build.call(torch.clamp, x, low, high)


def arithmetic(op: Op, build: Builder) -> Any:
    """Add, Sub, Mul, Div and Pow; whole numbers are divided towards zero, and their powers are whole."""
    first = op.required(0)
    a, b = _operands(op, build)
    if op.kind == "Div":
        integral = not any(_is_real(value) for value in (a, b))
        return build.call(torch.div, a, b, rounding_mode="trunc") if integral else build.call(operator.truediv, a, b)
    if op.kind == "Pow":
        power = build.call(torch.pow, a, b)
        return power if _is_real(a) or not _is_real(b) else build.call(Tensor.to, power, build.tensor(first).dtype)
    return build.call(_ARITHMETIC[op.kind], a, b)


def comparison(op: Op, build: Builder) -> Any:
    """Comparisons and logic."""
    if op.kind in ("And", "Or", "Xor"):
        return build.call(COMPARISONS[op.kind], *(build.tensor(op.required(number)) for number in (0, 1)))
    a, b = _operands(op, build)
    if not isinstance(a, (Tensor, Traced)):  # torch compares a tensor with a number, but not a number with a tensor
        turned: dict[str, Callable[..., Any]] = {
            "Greater": torch.lt,
            "GreaterOrEqual": torch.le,
            "Less": torch.gt,
            "LessOrEqual": torch.ge,
        }
        return build.call(turned.get(op.kind, COMPARISONS[op.kind]), b, a)
    return build.call(COMPARISONS[op.kind], a, b)


def of_several(op: Op, build: Builder) -> Any:
    """Sum, Mean, Min and Max of any number of tensors."""
    values = [build.tensor(op.required(number)) for number in range(len(op.inputs))]
    if op.kind in ("Min", "Max"):
        function: Callable[..., Any] = torch.minimum if op.kind == "Min" else torch.maximum
        return reduce(lambda a, b: build.call(function, a, b), values)
    total = reduce(lambda a, b: build.call(operator.add, a, b), values)
    return build.call(operator.truediv, total, len(values)) if op.kind == "Mean" else total


def modulo(op: Op, build: Builder) -> Any:
    """Mod, with the sign of the divisor, or of the dividend with fmod."""
    if op.get("fmod", 0):
        return build.call(torch.fmod, *(build.tensor(op.required(number)) for number in (0, 1)))
    return build.call(torch.remainder, *_operands(op, build))


def where(op: Op, build: Builder) -> Any:
    """Where."""
    condition, a, b = (build.tensor(op.required(number)) for number in range(3))
    return build.call(torch.where, condition, a, b)


def cast(op: Op, build: Builder) -> Any:
    """Cast and CastLike; to the type that it has already it is nothing."""
    x = build.tensor(op.required(0))
    if op.kind == "CastLike":
        reference = op.required(1)
        dtype = build.tensor(reference).dtype
    else:
        dtype = dtype_of(int(op.get("to", 1)), op.name)
    return x if x.dtype == dtype else build.call(Tensor.to, x, dtype)


def identity(op: Op, build: Builder) -> Any:
    """Identity, and Dropout of a network in use."""
    if op.kind == "Dropout" and (mode := op.constant(2)) is not None and bool(mode):
        raise Undecided("drops at random: the file is for training")
    x = op.required(0)
    return x if op.outputs < 2 else (x, build.call(torch.ones_like, build.tensor(x), dtype=torch.bool))


def prelu(op: Op, build: Builder) -> Any:
    """PRelu with one slope, or one for each channel."""
    slope, x = op.constant(1), op.required(0)
    if slope is None or not isinstance(x, Traced):
        raise Undecided("has no constant slope")
    channels = x.fixed(1) if x.dim > 1 else None
    if slope.numel() == 1 or (slope.numel() == channels and tuple(slope.shape) == (channels, *[1] * (x.dim - 2))):
        flat = slope.reshape(-1)
        build.names[id(flat)] = build.names.get(id(slope), "")
        return build.layer(op, lambda: torch.nn.PReLU(slope.numel()), {"weight": flat}, x)
    return build.call(torch.where, build.call(torch.gt, x, 0), x, build.call(operator.mul, x, slope))


def _operands(op: Op, build: Builder) -> tuple[Any, Any]:
    first, second = op.required(0), op.required(1)
    return build.plain(first, beside=second), build.plain(second, beside=first)


def _is_real(value: Any) -> bool:
    return value.dtype.is_floating_point if isinstance(value, (Tensor, Traced)) else isinstance(value, float)
