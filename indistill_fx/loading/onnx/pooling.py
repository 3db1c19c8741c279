"""Rules of operators over windows and the plane: poolings, padding, resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.values import Size, Traced, Undecided, combined, list_of


def padded(
    op: Op,
    build: Builder,
    x: Traced,
    window: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    *,
    value: float = 0.0,
) -> tuple[Traced, tuple[int, ...]]:
    """What a window runs over, and the padding that is left to it: the same at both ends of an axis.

    Args:
        op: with `pads` or `auto_pad`.
        build: the graph.
        x: (batch, channels, *space).
        window: its size, per axis of space.
        stride: likewise.
        dilation: likewise.
        value: what unequal ends are padded with.
    """
    space = len(window)
    auto = op.get("auto_pad", "NOTSET")
    pads = list(op.get("pads", [0] * 2 * space)) if auto in ("NOTSET", "VALID") else None
    if pads is None:
        total = [_same(build.size(x, axis + 2), window[axis], stride[axis], dilation[axis]) for axis in range(space)]
        less, more = [n // 2 for n in total], [n - n // 2 for n in total]
        pads = [*less, *more] if auto == "SAME_UPPER" else [*more, *less]
    before, after = pads[:space], pads[space:]
    if not any(isinstance(n, Size) for n in pads) and before == after:
        return x, tuple(before)
    flat = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return build.call(F.pad, x, flat, "constant", value), (0,) * space


def _same(length: Any, window: int, stride: int, dilation: int) -> Any:
    """The padding with which only the stride divides an axis's length ("SAME"): a number, or a `Size` of a free axis."""
    reach = (window - 1) * dilation + 1
    if stride == 1:
        return reach - 1
    steps = (length + (stride - 1)) // stride
    return combined(torch.sym_max, (steps - 1) * stride + reach - length, 0)


def max_pool(op: Op, build: Builder) -> Any:
    """MaxPool, its indices not asked for."""
    x = _traced(op)
    window: tuple[int, ...] = tuple(op.get("kernel_shape", ()))
    if op.outputs > 1 or not 1 <= len(window) <= 3:
        raise Undecided("returns its indices")
    ones = [1] * len(window)
    stride, dilation = tuple(op.get("strides", ones)), tuple(op.get("dilations", ones))
    dtype = x.dtype
    least = float("-inf") if dtype.is_floating_point else torch.iinfo(dtype).min
    x, padding = padded(op, build, x, window, stride, dilation, value=least)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(window) - 1]
    return build.call(function, x, window, stride, padding, dilation, bool(op.get("ceil_mode", 0)))


def average_pool(op: Op, build: Builder) -> Any:
    """AveragePool."""
    x = _traced(op)
    window: tuple[int, ...] = tuple(op.get("kernel_shape", ()))
    ones, counted = [1] * len(window), bool(op.get("count_include_pad", 0))
    stride = tuple(op.get("strides", ones))
    new, padding = padded(op, build, x, window, stride, ones)
    if (new is not x and not counted) or set(op.get("dilations", ones)) != {1} or not 1 <= len(window) <= 3:
        raise Undecided("averages over windows that torch has no form for")
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1]
    return build.call(function, new, window, stride, padding, bool(op.get("ceil_mode", 0)), counted)


def global_pool(op: Op, build: Builder) -> Any:
    """GlobalAveragePool and GlobalMaxPool."""
    x = _traced(op)
    average = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
    greatest = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
    return build.call((average if op.kind == "GlobalAveragePool" else greatest)[x.dim - 3], x, (1,) * (x.dim - 2))


def pad(op: Op, build: Builder) -> Any:
    """Pad by any numbers."""
    x = build.tensor(op.required(0))
    pads = op.numbers("pads", 1)
    if pads is None:
        raise Undecided("lacks its pads")
    dim = x.dim if isinstance(x, Traced) else x.dim()
    axes = (
        [int(axis) % dim for axis in op.numbers("axes", 3) or range(len(pads) // 2)] if op.opset >= 18 else range(dim)
    )
    before, after = [0] * dim, [0] * dim
    for axis, low, high in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        before[axis], after[axis] = low, high
    flat = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    while len(flat) > 2 and all(not isinstance(n, Size) and n == 0 for n in flat[-2:]):
        flat = flat[:-2]
    if all(not isinstance(n, Size) and n == 0 for n in flat):
        return x
    mode = {"edge": "replicate", "wrap": "circular"}.get(op.get("mode", "constant"), op.get("mode", "constant"))
    value = op.constant(2) if op.opset >= 11 else None
    filled = value.item() if value is not None and value.numel() else float(op.get("value", 0.0))
    if mode != "constant":
        return build.call(F.pad, x, flat, mode)
    return build.call(F.pad, x, flat, mode, filled)


def resize(op: Op, build: Builder) -> Any:
    """Resize and Upsample of the axes of space, where torch has the same form of it."""
    x = _traced(op)
    mode, corners = _form(op)
    new = op.input(3)
    scales = op.numbers("scales", 2 if op.kind == "Resize" and op.opset >= 11 else 1) if new is None else None
    lengths = list_of(new) if new is not None else None
    if "axes" in op.attributes or op.get("antialias", 0) or op.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Undecided("resizes in a way that torch has no form for")
    given = lengths or scales
    if not given or x.dim != len(given) or any(not _kept(build, x, axis, given, scales is not None) for axis in (0, 1)):
        raise Undecided("resizes axes other than those of space")
    more: dict[str, Any] = {"align_corners": corners} if mode not in ("nearest", "nearest-exact") else {}
    if lengths is not None:
        return build.call(F.interpolate, x, tuple(lengths[2:]), None, mode, **more)
    return build.call(F.interpolate, x, None, tuple(map(_as_written, given[2:])), mode, **more)


def _as_written(scale: float) -> float:
    """A scale as people write it: the file's single precision makes 1.39999998 of 1.4, with which torch loses a pixel."""
    return float(str(np.float32(scale)))


def _form(op: Op) -> tuple[str, bool]:
    """Torch's mode, and whether corners are aligned."""
    upsample = op.kind == "Upsample" or op.opset < 11
    place = "asymmetric" if upsample else op.get("coordinate_transformation_mode", "half_pixel")
    mode = op.get("mode", "nearest")
    if mode == "nearest":
        rounding = "floor" if upsample else op.get("nearest_mode", "round_prefer_floor")
        forms = {
            ("asymmetric", "floor"): "nearest",
            ("half_pixel", "round_prefer_floor"): "nearest-exact",
            ("half_pixel", "round_prefer_ceil"): "nearest-exact",
            ("pytorch_half_pixel", "round_prefer_floor"): "nearest-exact",
        }
        if (place, rounding) in forms:
            return forms[place, rounding], False
    elif place in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        space = _traced(op).dim - 2
        name = {"linear": ("linear", "bilinear", "trilinear")[space - 1], "cubic": "bicubic"}.get(mode)
        if name is not None and (mode != "cubic" or abs(op.get("cubic_coeff_a", -0.75) + 0.75) < 1e-6):
            return name, place == "align_corners"
    raise Undecided(f"resizes by {mode} with {place}, which torch has no form for")


def _kept(build: Builder, x: Traced, axis: int, given: Sequence[Any], scaled: bool) -> bool:
    if scaled:
        return bool(given[axis] == 1)
    length: Any = given[axis]
    if isinstance(length, Size):
        return bool(length.samples == tuple(sample.shape[axis] for sample in x.samples))
    return bool(x.fixed(axis) == length or (axis == 0 and length == build.batch))


def _traced(op: Op) -> Traced:
    value = op.required(0)
    if not isinstance(value, Traced):
        raise Undecided("works on a constant")
    return value


def depth_to_space(op: Op, build: Builder) -> Any:
    """DepthToSpace and SpaceToDepth."""
    x, edge = _traced(op), int(op.get("blocksize", 1))
    batch, channels, height, width = (build.size(x, axis) for axis in range(4))
    if op.kind == "SpaceToDepth":
        split = build.call(torch.reshape, x, (batch, channels, height // edge, edge, width // edge, edge))
        moved = build.call(torch.permute, split, (0, 3, 5, 1, 2, 4))
        return build.call(torch.flatten, moved, 1, 3)
    if op.get("mode", "DCR") == "CRD":
        return build.call(F.pixel_shuffle, x, edge)
    split = build.call(torch.unflatten, x, 1, (edge, edge, -1))
    return build.call(
        F.pixel_shuffle, build.call(torch.flatten, build.call(torch.permute, split, (0, 3, 1, 2, 4, 5)), 1, 3), edge
    )
