"""Rules of operations that make channels: the selection is absorbed in their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.edit import with_tensors
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.channels.call import Call, again, index_select, slice_weights, untouched, weight_filters
from indistill_fx.passes.channels.selection import Blocked, Cut, Emitter, Index, Part, Propagation, sliced


def conv(call: Call, cut: Cut) -> Propagation | Blocked:
    """Filters are rows of the weight. In a grouped convolution the groups nobody wants go too, with the channels they read.

    Along an axis of space on which it looks at one place at a time, a selection passes.
    """
    if cut.width == 1 and cut.start in places_alone(call):
        return untouched(call, cut)
    if (cut.start, cut.stop) != (1, 2):
        return Blocked("a convolution mixes the axes of space")
    transposed = call.op == "conv_transpose"
    groups, inputs, outputs = int(call.get("groups", 1)), _inputs(call), call.output_shape[1]
    filters = weight_filters(call, cut.index, rows_axis=1 if transposed and groups == 1 else 0)
    if groups == 1:
        axis = 1 if transposed else 0
        return slice_weights(
            call, {"weight": (axis, cut.index), "bias": (0, cut.index)}, filters=filters, out_channels=len(cut.index)
        )
    return _grouped(call, cut.index, groups, inputs // groups, outputs // groups, transposed=transposed)


def places_alone(call: Call) -> list[int]:
    """The axes of space on which a convolution has a kernel of 1, a stride of 1 and no padding, so that each place stands alone."""
    weight, rank = call.constant("weight"), len(call.output_shape)
    if weight is None or weight.dim() != rank:
        return []

    def setting(name: str, default: int, axis: int) -> Any:
        value = call.get(name, default)
        return value[axis - 2 if len(value) > 1 else 0] if isinstance(value, (tuple, list)) else value

    wanted: dict[str, tuple[Any, ...]] = {"stride": (1,), "padding": (0, "same", "valid"), "output_padding": (0,)}
    return [
        axis
        for axis in range(2, rank)
        if weight.shape[axis] == 1 and all(setting(name, rest[0], axis) in rest for name, rest in wanted.items())
    ]


def deformed(call: Call, cut: Cut) -> Propagation | Blocked:
    """Filters are rows of the weight, as in a convolution without groups, or with one filter for each channel."""
    weight, inputs = call.constant("weight"), _inputs(call)
    if (cut.start, cut.stop) != (1, 2) or weight is None or weight.shape[1] not in (1, inputs):
        return Blocked("a deformable convolution mixes the axes of space, or has groups")
    named = {"weight": (0, cut.index), "bias": (0, cut.index)}
    if weight.shape[1] == inputs:
        return slice_weights(call, named, filters=weight_filters(call, cut.index))
    if len(weight) != inputs or (call.shape(call.get("offset")) or (0, 0))[1] != 2 * weight[0, 0].numel():
        return Blocked("a deformable convolution has groups, of filters or of places to look at")
    part = Part(Cut(call.input, 1, 2, cut.index))
    return slice_weights(call, named, parts=[part], filters=weight_filters(call, cut.index), groups=len(cut.index))


def per_sample(call: Call, cut: Cut) -> Propagation | Blocked:
    """Each sample's own filters, selected like the channels they make; a filter of one channel goes with the channel it reads."""
    groups, channels = int(call.get("groups", 1)), _inputs(call)
    if (cut.start, cut.stop) != (1, 2) or groups not in (1, channels) or (1 < groups != call.output_shape[1]):
        return Blocked("a convolution with filters of each sample's own mixes the axes of space, or has groups")
    operands = [call.get("weight")] if groups == 1 else [call.input, call.get("weight")]
    cuts = [Cut(n, 1, 2, cut.index) for n in operands]
    return Propagation(again(call, cuts, groups=1 if groups == 1 else len(cut.index)), tuple(Part(c) for c in cuts))


def _inputs(call: Call) -> int:
    shape = call.shape(call.input)
    return shape[1] if shape else 0


def _grouped(
    call: Call, index: Index, groups: int, inputs: int, outputs: int, *, transposed: bool
) -> Propagation | Blocked:
    """With equal numbers from each used group: a smaller grouped convolution. Otherwise, every filter becomes its own group."""
    filters = weight_filters(call, index)
    owners = [k // outputs for k in index]
    used = list(dict.fromkeys(owners))
    per_group = len(index) // len(used)
    balanced = owners == [group for group in used for _ in range(per_group)]
    if not balanced and inputs > 1:
        return _one_group_each(call, index, owners, inputs, outputs, transposed=transposed)
    used = used if balanced else owners
    reads = tuple(group * inputs + k for group in used for k in range(inputs))
    part = Part(Cut(call.input, 1, 2, reads))
    settings: dict[str, Any] = {"groups": len(used), "in_channels": len(reads), "out_channels": len(index)}
    if not transposed:
        return slice_weights(
            call, {"weight": (0, index), "bias": (0, index)}, parts=[part], filters=filters, **settings
        )
    if balanced and per_group == outputs:
        return slice_weights(
            call, {"weight": (0, reads), "bias": (0, index)}, parts=[part], filters=filters, **settings
        )
    return _one_group_each(call, index, owners, inputs, outputs, transposed=True)


def _one_group_each(
    call: Call, index: Index, owners: list[int], inputs: int, outputs: int, *, transposed: bool
) -> Propagation | Blocked:
    weight, bias = call.constant("weight"), call.constant("bias")
    if weight is None:
        return Blocked("the weight of the grouped convolution is computed")
    used = sorted(set(owners))
    part = Part(Cut(call.input, 1, 2, tuple(group * inputs + k for group in used for k in range(inputs))))
    gather = tuple(used.index(group) * inputs + k for group in owners for k in range(inputs))
    rows = _rows_of_transposed(weight, index, owners, inputs, outputs) if transposed else sliced(weight, 0, index)
    new_bias = None if bias is None else sliced(bias, 0, index)

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        spread = index_select(out, new[0], 1, 2, gather)
        if call.module is not None:
            tensors = {"weight": rows} if new_bias is None else {"weight": rows, "bias": new_bias}
            settings = {"groups": len(index), "in_channels": len(gather), "out_channels": len(index)}
            return out.module(str(call.node.target), with_tensors(call.module, tensors, **settings), spread)
        named = {"input": spread, "weight": out.tensor("weight", rows), "groups": len(index)}
        if new_bias is not None:
            named["bias"] = out.tensor("bias", new_bias)
        return out.function(call.node.target, *_positional(call, named))  # type: ignore[arg-type]

    note = "every kept filter became a group of its own, because the groups keep different numbers"
    return Propagation(emit, (part,), filters=weight_filters(call, index), note=note)


def _positional(call: Call, named: dict[str, object]) -> list[object]:
    names = (
        "input weight bias stride padding dilation groups"
        if call.op == "conv"
        else "input weight bias stride padding output_padding groups dilation"
    )
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
    return [named.get(name, call.arguments.get(name, defaults.get(name))) for name in names.split()]


def _rows_of_transposed(
    weight: torch.Tensor, index: Index, owners: list[int], inputs: int, outputs: int
) -> torch.Tensor:
    rows = [
        weight.detach()[g * inputs : (g + 1) * inputs, k % outputs : k % outputs + 1]
        for k, g in zip(index, owners, strict=True)
    ]
    return torch.cat(rows).requires_grad_(weight.requires_grad)


def linear(call: Call, cut: Cut) -> Propagation | Blocked:
    """Rows of the weight on the last axis; every other axis is the input's."""
    if cut.start < len(call.output_shape) - 1:
        return _on_other_axes(call, cut, "a linear layer")
    filters = weight_filters(call, cut.index)
    return slice_weights(
        call, {"weight": (0, cut.index), "bias": (0, cut.index)}, filters=filters, out_features=len(cut.index)
    )


def embedding(call: Call, cut: Cut) -> Propagation | Blocked:
    """Columns of the table on the last axis; every other axis is the input's."""
    if cut.start < len(call.output_shape) - 1:
        return _on_other_axes(call, cut, "an embedding")
    filters = weight_filters(call, cut.index, rows_axis=1)
    return slice_weights(call, {"weight": (1, cut.index)}, filters=filters, embedding_dim=len(cut.index))


def embedding_bag(call: Call, cut: Cut) -> Propagation | Blocked:
    """Columns of the table on the last axis; the rows are bags."""
    return embedding(call, cut) if cut.start == 1 else Blocked("an embedding bag's rows are not those of its input")


def bilinear(call: Call, cut: Cut) -> Propagation | Blocked:
    """Rows of the weight (rows, first, second) on the last axis; every other axis is that of both inputs."""
    last = len(call.output_shape) - 1
    if cut.start == last:
        tensors = {"weight": (0, cut.index), "bias": (0, cut.index)}
        return slice_weights(call, tensors, filters=weight_filters(call, cut.index), out_features=len(cut.index))
    cuts = [Cut(n, cut.start, cut.stop, cut.index) for n in bilinear_inputs(call)]
    if cut.stop > last or len(set(cuts)) < 2:
        return Blocked(
            "the features of a bilinear layer are merged with other axes here, or both its inputs are one tensor"
        )
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


def bilinear_inputs(call: Call) -> list[fx.Node]:
    """Both inputs of `nn.Bilinear` or `F.bilinear`."""
    found = call.arguments
    return [found.get("input1", found.get("input")), found.get("input2", found.get("input_1"))]


def constant(call: Call, cut: Cut) -> Propagation | Blocked:
    """A parameter or buffer: sliced."""
    owner = call.node.graph.owning_module
    value = attribute(owner, str(call.node.target)) if owner is not None else None
    if not isinstance(value, Tensor):
        return Blocked("not a tensor")
    flat = value.flatten(cut.start, cut.stop - 1) if cut.width > 1 else value
    new = sliced(flat, cut.start, cut.index).requires_grad_(value.requires_grad)
    if isinstance(value, nn.Parameter):
        new = nn.Parameter(new, requires_grad=value.requires_grad)
    return Propagation(lambda out, _: out.tensor(str(call.node.target), new))


def _on_other_axes(call: Call, cut: Cut, layer: str) -> Propagation | Blocked:
    """A selection on axes before the layer's last one passes to the input unchanged."""
    if cut.stop > len(call.output_shape) - 1:
        return Blocked(f"the features of {layer} are merged with other axes here")
    below = Cut(call.input, cut.start, cut.stop, cut.index)
    return Propagation(again(call, [below]), (Part(below),))
