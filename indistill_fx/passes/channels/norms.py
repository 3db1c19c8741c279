"""Rules of normalisations: those that treat each channel alone are crossed, those that mix the selected axis block it."""

from __future__ import annotations

from typing import Any

from indistill_fx.passes.channels.call import Call, again, axis_of, slice_weights
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation, used_groups


def per_channel_norm(call: Call, cut: Cut) -> Propagation | Blocked:
    """Batch and instance norm: every channel, on axis 1, has statistics and an affine map of its own."""
    below = Part(Cut(call.input, cut.start, cut.stop, cut.index))
    if (cut.start, cut.stop) != (1, 2):
        return Blocked("it normalises each channel over the other axes")
    tensors = {name: (0, cut.index) for name in ("weight", "bias", "running_mean", "running_var")}
    return slice_weights(call, tensors, parts=[below], num_features=len(cut.index))


def group_norm(call: Call, cut: Cut) -> Propagation | Blocked:
    """Whole groups can be taken; a part of a group cannot, for its statistics are shared."""
    groups, channels = int(call.get("num_groups")), call.output_shape[1]
    if (cut.start, cut.stop) != (1, 2):
        return Blocked("it normalises over the axes of space")
    used = used_groups(cut.index, channels // groups)
    if used is None:
        return Blocked(
            f"group norm shares statistics among the {channels // groups} channels of each of its {groups} groups"
        )
    below = Part(Cut(call.input, 1, 2, cut.index))
    tensors = {name: (0, cut.index) for name in ("weight", "bias")}
    return slice_weights(call, tensors, parts=[below], num_groups=len(used), num_channels=len(cut.index))


def layer_norm(call: Call, cut: Cut) -> Propagation | Blocked:
    """Layer norm and RMS norm: the last axes are mixed; those before them are free."""
    shape = call.get("normalized_shape")
    axes = len(shape) if isinstance(shape, (tuple, list)) else 1
    if cut.stop > len(call.output_shape) - axes:
        return Blocked(f"{call.op.replace('_', ' ')} shares its statistics among all channels")
    below = Cut(call.input, cut.start, cut.stop, cut.index)
    return Propagation(again(call, [below]), (Part(below),))


_USUAL_AXIS = {"normalize": 1, "softmax2d": -3, **dict.fromkeys("sort argsort topk glu kthvalue mode diff".split(), -1)}
"""The axis that is mixed where none is named."""


def mixed_axis(call: Call) -> Any:
    """The axis that an operation mixes, as it is written; None if it does not say."""
    return call.get("dim", _USUAL_AXIS.get(call.op))


def along_axis(call: Call, cut: Cut) -> Propagation | Blocked:
    """Softmax, normalize, cumulative sums, sorting, …: one axis is mixed, the others are free."""
    rank, dim = len(call.shape(call.input) or ()), mixed_axis(call)
    if not isinstance(dim, int):
        return Blocked(f"{call.op} mixes several axes, or one it does not name")
    dim = axis_of(dim, rank)
    if cut.start <= dim < cut.stop:
        return Blocked(f"{call.op} mixes the channels")
    below = Cut(call.input, cut.start, cut.stop, cut.index)
    return Propagation(again(call, [below], dim=dim if dim < cut.start else dim - cut.width + 1), (Part(below),))


def glu(call: Call, cut: Cut) -> Propagation | Blocked:
    """Channel k is made of the channels k and k + half."""
    rank = len(call.output_shape)
    dim = axis_of(int(call.get("dim", -1)), rank)
    if not cut.start <= dim < cut.stop:
        return along_axis(call, cut)
    if cut.width > 1:
        return Blocked("the halved axis is merged with others here")
    half, n = call.output_shape[dim], len(cut.index)
    below = Cut(call.input, cut.start, cut.stop, (*cut.index, *(k + half for k in cut.index)))
    return Propagation(again(call, [below], dim=dim), (Part(below, (tuple(range(n)) * 2, tuple(range(2 * n)))),))
