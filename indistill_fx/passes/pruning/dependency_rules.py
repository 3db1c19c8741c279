"""How the units of channels pass through operations that make, normalise or sum over channels.

What merely carries channels needs no entry here: the channel rules show it (`dependencies.follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import fx

from indistill_fx.graph.edit import tensor_nodes
from indistill_fx.passes.channels.attention import BY_LETTERS, PRODUCTS
from indistill_fx.passes.channels.call import Call, axis_of
from indistill_fx.passes.channels.comparisons import COMPARISONS, ends_compared
from indistill_fx.passes.channels.joining import FIELDS, REDUCTIONS, WITH_PLACES
from indistill_fx.passes.channels.keys import taken
from indistill_fx.passes.channels.norms import mixed_axis
from indistill_fx.passes.channels.producers import bilinear_inputs, places_alone
from indistill_fx.passes.channels.rules import FILLED
from indistill_fx.passes.channels.sizes import shape_lender
from indistill_fx.passes.channels.space import reduced_axes, rolled
from indistill_fx.passes.pruning import attention_dependencies, recurrent
from indistill_fx.passes.pruning.dependencies import (
    Axis,
    Coupling,
    Made,
    Units,
    follow,
    freeze_beside_places,
)

Coupler = Callable[[Coupling, Call], "set[Axis] | None"]


def conv(found: Coupling, call: Call) -> set[Axis]:
    """New units for the filters; the channels read are columns. Groups must lose the same places, so these are tied.

    Axes on which it looks at one place at a time pass, and so does the batch, into which other axes may be folded.
    """
    transposed = call.op == "conv_transpose"
    groups, inputs, outputs = int(call.get("groups", 1)), (call.shape(call.input) or (0, 0))[1], call.output_shape[1]
    given = found.of(call.input, 1)
    summed: list[Units | None] = []
    if groups == 1:
        made: Units | None = found.fresh(outputs)
        found.tie_weight(call, "weight", 0 if transposed else 1, given)
        found.tie_weight(call, "weight", 1 if transposed else 0, made)
        summed = [given]
    elif groups == inputs:
        made = None if given is None else np.repeat(given, outputs // groups)
        found.tie_weight(call, "weight", 0, given if transposed else made)
    else:
        _tie_groups(found, given, groups)
        made = np.tile(found.fresh(outputs // groups), groups)
        within = None if given is None else given[: inputs // groups]
        found.tie_weight(call, "weight", 0, given if transposed else made)
        found.tie_weight(call, "weight", 1, made[: outputs // groups] if transposed else within)
        summed = [given]
    found.tie_weight(call, "bias", 0, made)
    weight = call.constant("weight")
    if weight is not None and made is not None and (groups == 1 or not transposed):
        found.made.append(Made(call.node.name, 1, call.path, weight.transpose(0, 1) if transposed else weight, made))
    beside = places_alone(call)
    axes = {1: made} | {axis: found.of(call.input, axis) for axis in (0, *beside)}
    return _finish(found, call, axes, summed, {(call.input.name, axis) for axis in (0, 1, *beside)})


def _tie_groups(found: Coupling, units: Units | None, groups: int) -> None:
    if units is not None:
        blocks = units.reshape(groups, -1)
        found.pairs.append((np.tile(blocks[0], groups), blocks.reshape(-1)))


def _finish(
    found: Coupling, call: Call, axes: dict[int, Units | None], summed: Iterable[Units | None], read: set[Axis]
) -> set[Axis]:
    """Note the units of the output and the work; weights that are graph nodes have been read."""
    for axis, units in axes.items():
        if units is not None:
            found.axes[call.node.name, axis] = units
    found.count_work(call, summed)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = call.get(name)
        if isinstance(value, fx.Node):
            read |= {(value.name, axis) for axis in (0, 1)}
    return read


def linear(found: Coupling, call: Call) -> set[Axis]:
    """New units for the rows; the features read are columns; the other axes pass."""
    last = len(call.output_shape) - 1
    given, made = found.of(call.input, last), found.fresh(call.output_shape[last])
    found.tie_weight(call, "weight", 1, given)
    found.tie_weight(call, "weight", 0, made)
    found.tie_weight(call, "bias", 0, made)
    if (weight := call.constant("weight")) is not None:
        found.made.append(Made(call.node.name, last, call.path, weight, made))
    axes = {axis: found.of(call.input, axis) for axis in range(last)} | {last: made}
    return _finish(found, call, axes, [given], {(call.input.name, axis) for axis in range(last + 1)})


def embedding(found: Coupling, call: Call) -> set[Axis]:
    """New units for the columns of the table."""
    last = len(call.output_shape) - 1
    made = found.fresh(call.output_shape[last])
    found.tie_weight(call, "weight", 1, made)
    if (weight := call.constant("weight")) is not None:
        found.made.append(Made(call.node.name, last, call.path, weight.transpose(0, 1), made))
    axes = {axis: found.of(call.input, axis) for axis in range(last)} | {last: made}
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in range(last)})


def bilinear(found: Coupling, call: Call) -> set[Axis]:
    """New units for the rows; both inputs' features are read; the other axes pass."""
    last, inputs = len(call.output_shape) - 1, bilinear_inputs(call)
    made = found.fresh(call.output_shape[last])
    for axis, source in enumerate(inputs, 1):
        found.tie_weight(call, "weight", axis, found.of(source, last))
    found.tie_weight(call, "weight", 0, made)
    found.tie_weight(call, "bias", 0, made)
    if (known := call.constant("weight")) is not None:
        found.made.append(Made(call.node.name, last, call.path, known, made))
    axes: dict[int, Units | None] = {last: made}
    for axis in range(last):
        first, second = (found.of(source, axis) for source in inputs)
        axes[axis] = found.tie(first, second, f"`{call.path}` joins them with a fixed axis")
    read: set[Axis] = {(source.name, axis) for source in inputs for axis in range(last + 1)}
    read |= {(weight.name, 2)} if isinstance(weight := call.get("weight"), fx.Node) else set()
    return _finish(found, call, axes, [found.of(source, last) for source in inputs], read)


def channel_norm(found: Coupling, call: Call) -> set[Axis]:
    """Batch, instance and group norm: the channels pass; groups, of several channels each, must lose the same places.

    A group whose channels are one unit, such as a head, goes as a whole.
    """
    given = found.of(call.input, 1)
    groups = given.reshape(int(call.get("num_groups")), -1) if call.op == "group_norm" and given is not None else None
    if groups is not None and (groups != groups[:, :1]).any():
        _tie_groups(found, given, len(groups))
        found.note_mixing(call, given)
    for name in ("weight", "bias", "running_mean", "running_var"):
        found.tie_weight(call, name, 0, given)
    return _finish(found, call, {1: given}, [], {(call.input.name, 1)})


def deformed(found: Coupling, call: Call) -> set[Axis]:
    """As a convolution; where it looks, and how much it counts, is fixed. Groups, also of places to look at, lose the same channels."""
    given, inputs = found.of(call.input, 1), (call.shape(call.input) or (0, 0))[1]
    weight = call.constant("weight")
    if weight is None:
        return set()
    groups, outputs = inputs // weight.shape[1], call.output_shape[1]
    places = (call.shape(call.get("offset")) or (0, 0))[1] // (2 * weight[0, 0].numel())
    for count in {1 if groups == inputs else groups, places} - {1}:
        _tie_groups(found, given, count)
    if groups == inputs > 1:  # a depthwise convolution
        made = found.fresh(outputs) if given is None else np.repeat(given, outputs // groups)
        if given is None:
            found.freeze(made, f"`{call.path}` filters each of its fixed channels alone")
    else:
        made = np.tile(found.fresh(outputs // groups), groups)
        found.tie_weight(call, "weight", 1, None if given is None else given[: inputs // groups])
    found.tie_weight(call, "weight", 0, made)
    found.tie_weight(call, "bias", 0, made)
    found.made.append(Made(call.node.name, 1, call.path, weight, made))
    return _finish(found, call, {1: made}, [given], {(call.input.name, 1)})


def per_sample(found: Coupling, call: Call) -> set[Axis]:
    """Filters of each sample's own: what they read is tied to the channels; without groups their number is the output's width."""
    weight, groups = call.get("weight"), int(call.get("groups", 1))
    given = found.of(call.input, 1)
    read: set[Axis] = {(call.input.name, 1), (weight.name, 1), (weight.name, 2)}
    if groups == 1:
        found.tie(given, found.of(weight, 2), f"`{call.node.name}` sums over them together with a fixed axis")
        return _finish(found, call, {1: found.of(weight, 1)}, [given], read)
    return follow(found, call) | {(weight.name, 2)}


def normalized(found: Coupling, call: Call) -> set[Axis]:
    """`normalize`, softmax and their like: all axes pass, some by convention: the norm of fewer channels is the norm of those that stay.

    A cumulative sum adds up the channels that stay, as a reader of channels does.
    """
    given, rank = mixed_axis(call), len(call.output_shape)
    mixed = [given] if isinstance(given, int) else list(given or ())
    if not mixed or not all(isinstance(dim, int) for dim in mixed):
        return follow(found, call)
    axes = {axis: found.of(call.input, axis) for axis in range(rank)}
    for dim in mixed if call.op != "cumsum" else ():
        found.note_mixing(call, axes[axis_of(dim, rank)])
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in range(rank)})


def layer_norm(found: Coupling, call: Call) -> set[Axis]:
    """Layer norm and RMS norm: all axes pass, for the norm of fewer channels is the norm of those that stay."""
    rank, shape = len(call.output_shape), call.get("normalized_shape")
    normalized = len(shape) if isinstance(shape, (tuple, list)) else 1
    axes = {axis: found.of(call.input, axis) for axis in range(rank)}
    for k in range(normalized):
        found.note_mixing(call, axes[rank - normalized + k])
        found.tie_weight(call, "weight", k, axes[rank - normalized + k])
        found.tie_weight(call, "bias", k, axes[rank - normalized + k])
        if call.module is not None and call.get("weight") is None:
            units = axes[rank - normalized + k]
            first = found.shapes.setdefault((id(call.module), k), units)
            found.tie(first, units, f"the shape of `{call.path}` is shared with a fixed layer")
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in range(rank)})


def prelu(found: Coupling, call: Call) -> set[Axis]:
    """All axes pass; slopes, if there are several, follow axis 1."""
    axes = {axis: found.of(call.input, axis) for axis in range(len(call.output_shape))}
    weight = call.constant("weight")
    if weight is None or weight.numel() > 1:
        found.tie_weight(call, "weight", 0, axes[1])
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in axes})


def reduction(found: Coupling, call: Call) -> set[Axis]:
    """The mean of fewer channels is the mean of those that stay; a sum or maximum likewise. Its place counts all of them."""
    reduced = reduced_axes(call)
    for axis in reduced if call.op not in _SUMS else ():
        found.note_mixing(call, found.of(call.input, axis))
    places = call.op in ("argmax", "argmin") or (call.op in WITH_PLACES and any(map(_reads_places, call.node.users)))
    for axis in reduced if places else ():
        found.freeze(found.of(call.input, axis), f"`{call.node.name}` ({call.op}) numbers them")
    read = {(call.input.name, axis) for axis in reduced}
    if call.node.name in found.facts:
        return read | follow(found, call)
    rank = len(call.shape(call.input) or ())
    return read | {(call.input.name, axis) for axis in range(rank) if reduced and axis not in reduced}


_SUMS = frozenset("sum nansum count_nonzero all any".split())


def _reads_places(user: fx.Node) -> bool:
    """Whether a node takes the second result of a maximum, its places, for others to read."""
    return bool(user.users) and user.args[1:] in ((1,), (FIELDS[1],))


def channel_shuffle(found: Coupling, call: Call) -> set[Axis]:
    """All groups must lose the same places."""
    _tie_groups(found, found.of(call.input, 1), int(call.get("groups")))
    return follow(found, call)


def reshape(found: Coupling, call: Call) -> set[Axis]:
    """Followed like any other; a tensor that only lends its shape must lose the same channels."""
    read = follow(found, call)
    lender = shape_lender(call)
    if lender is not None:
        for axis in range(len(found.facts[lender.name].shape)):
            found.tie(
                found.of(lender, axis),
                found.of(call.node, axis),
                f"`{call.node.name}` takes its shape from a fixed tensor",
            )
            read.add((lender.name, axis))
    return read


def follows_first(found: Coupling, call: Call) -> set[Axis]:
    """Conversions to another tensor's type: of that one nothing else is read."""
    others = {(n.name, axis) for n in call.node.all_input_nodes[1:] for axis in range(len(call.shape(n) or ()))}
    return follow(found, call) | others


def filled(found: Coupling, call: Call) -> set[Axis]:
    """A tensor of one value: of another tensor it reads the type alone. Its entries are new units, which anything may be tied to.

    So the zeros from which a recurrence starts lose the units of its state. Units that nothing makes are never removed by themselves.
    A tensor of another one's shape has the units of that.
    """
    sizes, known = call.arguments.get("shape"), found.facts[call.node.name]
    if shape_lender(call) is not None:
        return follow(found, call)
    for axis, size in enumerate(known.shape):
        if (
            not found.holds_samples(call.node, axis)
            and size > 1
            and isinstance(sizes, (tuple, list))
            and len(sizes) == len(known.shape)
        ):
            units = found.axes[call.node.name, axis] = found.fresh(size)
            found.filled.update(units.tolist())
    return {(n.name, axis) for n in call.node.all_input_nodes for axis in range(len(call.shape(n) or ()))}


def constant(found: Coupling, call: Call) -> set[Axis]:
    """Numbers in the code (`torch.tensor([…])`): as a tensor of one value, but which of them stay is written."""
    plain = call.node.name in found.facts and not tensor_nodes(call.node.args)
    for axis, size in enumerate(call.output_shape if plain else ()):
        units = found.axes[call.node.name, axis] = found.fresh(size)
        found.filled.update(units.tolist())
    return {(n.name, axis) for n in call.node.all_input_nodes for axis in range(len(call.shape(n) or ()))}


def sliced(found: Coupling, call: Call) -> set[Axis]:
    """Slices, and writes into slices, are followed, but not along an axis that holds channels and places."""
    parsed = taken(call) if call.shape(call.input) is not None else None
    entries = [] if parsed is None else [entry for entry in parsed[0] if entry is not None]
    for axis, entry in enumerate(entries):
        if parsed is not None and (isinstance(entry, int) or axis in parsed[1]):
            freeze_beside_places(found, call.input, axis, call.node)
    return follow(found, call)


def taken_by_number(found: Coupling, call: Call) -> set[Axis]:
    """Slices are followed; a channel that is taken by its number must stay."""
    if call.node.name not in found.facts:
        return set()
    read = sliced(found, call)
    parsed = taken(call) if call.shape(call.input) is not None else None
    axes = [] if parsed is None else [entry for entry in parsed[0] if entry is not None]
    for axis, entry in enumerate(axes):
        units = found.of(call.input, axis) if isinstance(entry, int) else None
        if units is not None:
            found.freeze(units[[entry]], f"`{call.node.name}` takes it by its number")
            read.add((call.input.name, axis))
    return read


def rolled_on(found: Coupling, call: Call) -> set[Axis]:
    """Followed, but not along an axis that holds channels and places."""
    for axis in rolled(call):
        freeze_beside_places(found, call.input, axis, call.node)
    return follow(found, call)


def compared(found: Coupling, call: Call) -> set[Axis]:
    """What two tensors are compared over is the same on both sides: the similarity of fewer channels is that of those that stay."""
    if not (ends := ends_compared(call)):
        return set()
    why = f"`{call.node.name}` compares them with a fixed axis"
    first, second = (found.of(*end) for end in ends)
    units = found.tie(first, second, why)
    found.note_mixing(call, units)
    return follow(found, call, [units]) | {(n.name, axis) for n, axis in ends}


COUPLERS: dict[str, Coupler] = {
    "conv": conv,
    "conv_transpose": conv,
    "linear": linear,
    **dict.fromkeys(("embedding", "embedding_bag"), embedding),
    "bilinear": bilinear,
    "batch_norm": channel_norm,
    "instance_norm": channel_norm,
    "group_norm": channel_norm,
    "layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "prelu": prelu,
    **dict.fromkeys("mean sum amax amin var std norm vector_norm".split(), reduction),
    **dict.fromkeys("prod logsumexp argmax argmin all any nansum nanmean count_nonzero".split(), reduction),
    **dict.fromkeys(REDUCTIONS - {"kthvalue", "mode"}, reduction),
    **dict.fromkeys("normalize softmax log_softmax softmin softmax2d cumsum".split(), normalized),
    "deform_conv2d": deformed,
    "conv_per_sample": per_sample,
    **dict.fromkeys(("getitem", "select"), taken_by_number),
    **dict.fromkeys(("narrow", "slice", "index_select", "with_item"), sliced),
    "roll": rolled_on,
    **dict.fromkeys(FILLED, filled),
    "tensor": constant,
    **dict.fromkeys(PRODUCTS, attention_dependencies.product),
    **dict.fromkeys(BY_LETTERS, attention_dependencies.einsum),
    "scaled_dot_product_attention": attention_dependencies.fused,
    "multihead_attention": attention_dependencies.attention_module,
    "head_attention": attention_dependencies.attention_module,
    **dict.fromkeys(("shifted_window_attention", "window_attention"), attention_dependencies.windows),
    **dict.fromkeys(recurrent.NAMES, recurrent.couple_recurrent),
    "PackedSequence": recurrent.packed,
    **dict.fromkeys(("_pack_padded_sequence", "_pad_packed_sequence"), recurrent.packing),
    "channel_shuffle": channel_shuffle,
    **dict.fromkeys(COMPARISONS, compared),
    **dict.fromkeys(("view", "reshape"), reshape),
    **dict.fromkeys(("type_as", "to"), follows_first),
}
"""Operation -> how units pass. What is not here follows the channel rules."""
