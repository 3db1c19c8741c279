"""Rules of operations on the axes of space: pooling, interpolation, padding, reductions, shifts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from indistill_fx.passes.channels.call import Call, again, axis_of, source, untouched
from indistill_fx.passes.channels.norms import mixed_axis
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation, used_groups


def per_channel_map(call: Call, cut: Cut) -> Propagation | Blocked:
    """Pooling and interpolation: each channel, on axis 1, is treated alone."""
    if cut.stop > 2:
        return Blocked(f"{call.op} mixes the axes of space")
    return untouched(call, cut)


def pad(call: Call, cut: Cut) -> Propagation | Blocked:
    """Padding of other axes passes; padding of the selected axis becomes padding by the number of padded entries that are wanted."""
    rank = len(call.output_shape)
    sizes = call.get("pad", call.get("padding"))
    if not isinstance(sizes, (tuple, list)):
        return Blocked("the padding is computed")
    padded = [rank - 1 - k for k in range(len(sizes) // 2) if (sizes[2 * k], sizes[2 * k + 1]) != (0, 0)]
    if not any(cut.start <= axis < cut.stop for axis in padded):
        if cut.width > 1 and any(axis < cut.start for axis in padded):
            return Blocked("an axis to the left of the merged ones is padded")
        return untouched(call, cut)
    if cut.width > 1 or call.module is not None or call.get("mode", "constant") != "constant":
        return Blocked("the channels themselves are padded")
    return _padded_channels(call, cut, list(sizes), rank)


def _padded_channels(call: Call, cut: Cut, sizes: list[int], rank: int) -> Propagation | Blocked:
    shape = call.shape(call.input)
    place = 2 * (rank - 1 - cut.start)
    if not all(isinstance(n, int) for n in sizes[place : place + 2]):
        return Blocked("the padding of the channels is computed")
    low, real = sizes[place], shape[cut.start] if shape else 0
    kinds = [-1 if k < low else 1 if k >= low + real else 0 for k in cut.index]
    inside = tuple(k - low for k, kind in zip(cut.index, kinds, strict=True) if kind == 0)
    if kinds != sorted(kinds) or not inside:
        return Blocked("the padded channels stand between the others")
    sizes[place], sizes[place + 1] = kinds.count(-1), kinds.count(1)
    positions = tuple(k for k, kind in enumerate(kinds) if kind == 0)
    below = Cut(call.input, cut.start, cut.stop, inside)
    return Propagation(again(call, [below], pad=tuple(sizes)), (Part(below, (positions, tuple(range(len(inside))))),))


def reduced_axes(call: Call) -> list[int]:
    """The axes that a reduction names; none if it reduces all of them, or computes them."""
    dims, rank = mixed_axis(call), len(call.shape(call.input) or ())
    given = [dims] if isinstance(dims, int) else dims if isinstance(dims, (tuple, list)) else []
    return sorted(axis_of(d, rank) for d in given if isinstance(d, int))


def reduction(call: Call, cut: Cut) -> Propagation | Blocked:
    """Means, sums and maxima over other axes."""
    shape, dims, reduced = call.shape(call.input), call.get("dim"), reduced_axes(call)
    if shape is None or not reduced:
        return Blocked(f"{call.op} mixes all axes")
    stay = (
        list(range(len(shape)))
        if call.get("keepdim", False)
        else [axis for axis in range(len(shape)) if axis not in reduced]
    )
    axes = stay[cut.start : cut.stop]
    if axes != list(range(axes[0], axes[-1] + 1)) or any(axis in reduced for axis in axes):
        return Blocked(f"{call.op} mixes some of the merged axes")
    below = Cut(call.input, axes[0], axes[-1] + 1, cut.index)
    moved = [d if d < axes[0] else d - cut.width + 1 for d in reduced]
    return Propagation(again(call, [below], dim=moved if isinstance(dims, (tuple, list)) else moved[0]), (Part(below),))


def flip(call: Call, cut: Cut) -> Propagation | Blocked:
    """The last entry comes first, on the selected axis too: whichever of them stay, they stand the other way round."""
    dims, rank = call.get("dims"), len(call.output_shape)
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) for d in dims):
        return Blocked("the flipped axes are computed")
    axes = [axis_of(d, rank) for d in dims]
    inside = [axis for axis in axes if cut.start <= axis < cut.stop]
    if inside and cut.width > 1:
        return Blocked("flip moves one of the merged axes")
    last = call.output_shape[cut.start] - 1
    below = Cut(call.input, cut.start, cut.stop, tuple(last - k for k in cut.index) if inside else cut.index)
    moved = tuple(axis if axis < cut.start else axis - cut.width + 1 for axis in axes if axis not in inside)
    if not moved:
        return Propagation(source, (Part(below),))
    return Propagation(lambda out, new: out.function(torch.flip, new[0], moved), (Part(below),))


def rolled(call: Call) -> dict[int, Any]:
    """By how much a roll moves each axis that it names; none if it moves all entries as one axis."""
    shifts, dims = ([n] if isinstance(n, (int, fx.Node)) else n for n in (call.get("shifts"), call.get("dims")))
    if not (isinstance(shifts, (tuple, list)) and isinstance(dims, (tuple, list))):
        return {}
    found = {axis_of(d, len(call.output_shape)): shift for d, shift in zip(dims, shifts, strict=True)}
    return found if len(found) == len(dims) else {}


def shift(call: Call, cut: Cut) -> Propagation | Blocked:
    """Roll: entries of the selected axis, too, come from others by a fixed number further on."""
    shifts = rolled(call)
    inside = [axis for axis in shifts if cut.start <= axis < cut.stop]
    if not shifts or (inside and (cut.width > 1 or not isinstance(shifts[cut.start], int))):
        return Blocked(f"{call.op} moves all axes as one, merged axes, or by a computed number")
    moved = {d if d < cut.start else d - cut.width + 1: by for d, by in shifts.items() if d not in inside}
    size, by = call.output_shape[cut.start], shifts[cut.start] if inside else 0
    index = tuple((k - by) % size for k in cut.index) if inside else cut.index
    part = Part(Cut(call.input, cut.start, cut.stop, index))
    if not moved:
        return Propagation(source, (part,))
    return Propagation(lambda out, new: out.function(torch.roll, new[0], (*moved.values(),), (*moved,)), (part,))


def pixel_shuffle(call: Call, cut: Cut) -> Propagation | Blocked:
    """Channel c of the output is made of the r*r channels from c*r*r on."""
    r = call.get("upscale_factor")
    if (cut.start, cut.stop) != (1, 2) or not isinstance(r, int):
        return Blocked("pixel shuffle mixes the axes of space")
    return _one_of_many(call, cut, r * r)


def pixel_unshuffle(call: Call, cut: Cut) -> Propagation | Blocked:
    """Groups of r*r channels of the output are one channel of the input."""
    r = call.get("downscale_factor")
    if (cut.start, cut.stop) != (1, 2) or not isinstance(r, int):
        return Blocked("pixel unshuffle mixes the axes of space")
    return _many_of_one(call, cut, r * r)


def spectrum(call: Call, cut: Cut) -> Propagation | Blocked:
    """Fourier transforms, and shifts of spectra, along other axes."""
    dims, rank = call.get("dim"), len(call.output_shape)
    if dims is None:
        dims = (-2, -1) if call.op.endswith("2") else range(rank) if call.op.endswith(("n", "shift")) else -1
    return _beside(call, cut, [dims] if isinstance(dims, int) else list(dims))


def _beside(call: Call, cut: Cut, dims: list[int]) -> Propagation | Blocked:
    """An operation on some axes, on a selection of another one."""
    if cut.width > 1 or cut.start in [axis_of(d, len(call.shape(call.input) or ())) for d in dims]:
        return Blocked(f"{call.op} mixes the channels, or axes that are merged here")
    return untouched(call, cut)


def triangle(call: Call, cut: Cut) -> Propagation | Blocked:
    """`tril` and `triu` are of the last two axes."""
    return _beside(call, cut, [-2, -1])


def turned(call: Call, cut: Cut) -> Propagation | Blocked:
    """`rot90` of other axes."""
    dims = call.get("dims", (0, 1))
    return (
        _beside(call, cut, list(dims)) if isinstance(dims, (tuple, list)) else Blocked("the turned axes are computed")
    )


def complex_view(call: Call, cut: Cut) -> Propagation | Blocked:
    """`view_as_real` and `view_as_complex`: real and imaginary parts are the last axis of the real tensor."""
    complex_rank = min(len(call.shape(call.input) or ()), len(call.output_shape))
    return (
        untouched(call, cut)
        if cut.stop <= complex_rank
        else Blocked("the selected axis is that of real and imaginary parts")
    )


def unpool(call: Call, cut: Cut) -> Propagation | Blocked:
    """Values go back to the places of the maxima, each channel alone."""
    if cut.stop > 2:
        return Blocked(f"{call.op} mixes the axes of space")
    cuts = [Cut(n, cut.start, cut.stop, cut.index) for n in call.node.all_input_nodes if call.shape(n) is not None]
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


def unfold(call: Call, cut: Cut) -> Propagation | Blocked:
    """`F.unfold`: the places of a patch, as many as the kernel has, are one channel of the input. `Tensor.unfold` adds an axis."""
    shape = call.shape(call.input) or ()
    if len(call.output_shape) == len(shape) + 1:
        return _beside(call, cut, [call.get("dimension", call.get("kernel_size")), len(shape)])
    if (cut.start, cut.stop, len(shape), len(call.output_shape)) != (1, 2, 4, 3):
        return Blocked("unfold mixes the axes of space")
    return _many_of_one(call, cut, call.output_shape[1] // shape[1])


def fold(call: Call, cut: Cut) -> Propagation | Blocked:
    """`F.fold`: a channel is made of the places of its patches."""
    shape = call.shape(call.input) or ()
    if (cut.start, cut.stop, len(call.output_shape)) != (1, 2, 4):
        return Blocked("fold mixes the axes of space")
    return _one_of_many(call, cut, shape[1] // call.output_shape[1])


def _one_of_many(call: Call, cut: Cut, count: int) -> Propagation:
    """Channel c is made of the `count` channels from c*count on."""
    below = Cut(call.input, 1, 2, tuple(k * count + j for k in cut.index for j in range(count)))
    repeated = tuple(k for k in range(len(cut.index)) for _ in range(count))
    return Propagation(again(call, [below]), (Part(below, (repeated, tuple(range(len(below.index))))),))


def _many_of_one(call: Call, cut: Cut, count: int) -> Propagation | Blocked:
    """`count` channels, one after the other, are one channel of the input."""
    used = used_groups(cut.index, count)
    if used is None:
        return Blocked("only a part of the places of a channel is wanted")
    below = Cut(call.input, 1, 2, tuple(used))
    links = tuple(range(len(cut.index))), tuple(k // count for k in range(len(cut.index)))
    return Propagation(again(call, [below]), (Part(below, links),))


def channel_shuffle(call: Call, cut: Cut) -> Propagation | Blocked:
    """Output channel k comes from channel (k % groups) * (channels / groups) + k // groups."""
    groups, channels = call.get("groups"), call.output_shape[1]
    if (cut.start, cut.stop) != (1, 2) or not isinstance(groups, int):
        return Blocked("channel shuffle on another axis")
    per_group = channels // groups
    below = Cut(call.input, 1, 2, tuple((k % groups) * per_group + k // groups for k in cut.index))
    return Propagation(lambda _, new: new[0], (Part(below),))
