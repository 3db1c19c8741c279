"""How the units of channels pass through operations that make, normalise or sum over channels.

What merely carries channels needs no entry here: the channel rules tell it (`coupling.follow`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from torch import fx, nn

from indistill_fx.graph.attention import HeadAttention
from indistill_fx.graph.ops import op_name
from indistill_fx.passes.channels.attention import free_heads, letters, operands_of
from indistill_fx.passes.channels.call import Call, axis_of
from indistill_fx.passes.pruning.dependencies import Axis, Coupling, Made, Units, follow

Coupler = Callable[[Coupling, Call], "set[Axis] | None"]


def conv(found: Coupling, call: Call) -> set[Axis]:
    """New units for the filters; the channels read are columns. Groups must lose the same places, so these are tied."""
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
    return _finish(found, call, {1: made}, summed, {(call.input.name, 1)})


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


def channel_norm(found: Coupling, call: Call) -> set[Axis]:
    """Batch, instance and group norm: the channels pass; groups must lose the same places."""
    given = found.of(call.input, 1)
    if call.op == "group_norm":
        _tie_groups(found, given, int(call.get("num_groups")))
    for name in ("weight", "bias", "running_mean", "running_var"):
        found.tie_weight(call, name, 0, given)
    return _finish(found, call, {1: given}, [], {(call.input.name, 1)})


def layer_norm(found: Coupling, call: Call) -> set[Axis]:
    """All axes pass: the norm of fewer channels is the norm of those that stay."""
    rank, shape = len(call.output_shape), call.get("normalized_shape")
    normalized = len(shape) if isinstance(shape, (tuple, list)) else 1
    axes = {axis: found.of(call.input, axis) for axis in range(rank)}
    for k in range(normalized):
        found.tie_weight(call, "weight", k, axes[rank - normalized + k])
        found.tie_weight(call, "bias", k, axes[rank - normalized + k])
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in range(rank)})


def prelu(found: Coupling, call: Call) -> set[Axis]:
    """All axes pass; slopes, if there are several, follow axis 1."""
    axes = {axis: found.of(call.input, axis) for axis in range(len(call.output_shape))}
    weight = call.constant("weight")
    if weight is None or weight.numel() > 1:
        found.tie_weight(call, "weight", 0, axes[1])
    return _finish(found, call, axes, [], {(call.input.name, axis) for axis in axes})


def reduction(found: Coupling, call: Call) -> set[Axis]:
    """The mean of fewer channels is the mean of those that stay; a sum or maximum likewise."""
    dims, rank = call.get("dim"), len(call.shape(call.input) or ())
    given = [dims] if isinstance(dims, int) else dims if isinstance(dims, (tuple, list)) else []
    reduced = {(call.input.name, axis_of(d, rank)) for d in given if isinstance(d, int)}
    return follow(found, call) | reduced if call.node.name in found.facts else set()


def product(found: Coupling, call: Call) -> set[Axis]:
    """The axis summed over is the same on both sides."""
    left, right = operands_of(call)
    ranks = [len(call.shape(n) or ()) for n in (left, right)]
    if 0 in ranks:
        return set()
    ends = (left, ranks[0] - 1), (right, max(ranks[1] - 2, 0))
    units = found.tie(
        found.of(*ends[0]), found.of(*ends[1]), f"`{call.node.name}` sums over them together with a fixed axis"
    )
    return follow(found, call, [units]) | {(n.name, axis) for n, axis in ends}


def einsum(found: Coupling, call: Call) -> set[Axis]:
    """As a product, by letters."""
    parsed = letters(call)
    if parsed is None:
        return set()
    names, output, nodes = parsed
    read: set[Axis] = set()
    summed: list[Units | None] = []
    for letter in dict.fromkeys("".join(names)):
        if letter not in output:
            ends = [(n, name.index(letter)) for name, n in zip(names, nodes, strict=True) if letter in name]
            units = found.of(*ends[0])
            for end in ends[1:]:
                units = found.tie(
                    units, found.of(*end), f"`{call.node.name}` sums over them together with a fixed axis"
                )
            summed.append(units)
            read |= {(n.name, axis) for n, axis in ends}
    return follow(found, call, summed) | read


def fused(found: Coupling, call: Call) -> set[Axis]:
    """Heads are units; the width of a head stays, and with it the scale of the softmax."""
    query, key, value = (call.get(name) for name in ("query", "key", "value"))
    rank = len(call.shape(key) or ())
    if rank < 2:
        return set()
    found.tie(found.of(key, rank - 2), found.of(value, rank - 2), "attention looks at a sequence")
    read = {(key.name, rank - 2), (value.name, rank - 2)}
    for source in (query, key):
        found.freeze(found.of(source, rank - 1), "the width of a head")
    return follow(found, call) | read


def attention_module(found: Coupling, call: Call) -> set[Axis] | None:
    """`nn.MultiheadAttention`: columns of the three input projections, heads, rows of the output projection."""
    module = call.module
    sources = [
        call.arguments.get(name, call.arguments.get(f"input_{k}")) for k, name in enumerate(("query", "key", "value"))
    ]
    sources[0] = call.arguments.get("query", call.arguments.get("input"))
    free = free_heads(module) if isinstance(module, (nn.MultiheadAttention, HeadAttention)) else None
    masked = any(
        isinstance(call.arguments.get(name), fx.Node)
        for name in ("attn_mask", "input_4", "key_padding_mask", "input_3")
    )
    if free is None or masked or any(len(call.shape(n) or ()) != 3 for n in sources):
        return set()
    path, inner = call.path, free.out.in_features
    known = {name: found.axes.get((path, name)) for name in ("heads", "out")}
    heads = known["heads"] if known["heads"] is not None else found.fresh(free.heads)
    made = known["out"] if known["out"] is not None else found.fresh(free.out.out_features)
    found.axes[path, "heads"], found.axes[path, "out"] = heads, made
    rows = np.repeat(heads, inner // free.heads)
    results = [user for user in call.node.users if user.args[1:] == (1,) and user.users]
    found.freeze(heads if results else None, "the weights of the attention are read")
    result = next((user.name for user in call.node.users if user.args[1:] == (0,)), call.node.name)
    sizes = [call.shape(n) or () for n in sources]
    lengths = [shape[1 if free.batch_first else 0] for shape in sizes]
    for name, source, length in zip(("query", "key", "value"), sources, lengths, strict=True):
        given = found.of(source, 2)
        column = f"{name} columns"
        earlier = found.axes.get((path, column))
        if earlier is not None or (path, column) in found.axes:
            found.tie(earlier, given, f"`{path}` is called again on fixed channels")
        elif given is not None:
            found.axes[path, column] = given
        else:
            found.axes[path, column] = found.fresh(getattr(free, name).in_features)
            found.freeze(found.axes[path, column], f"`{path}` reads fixed channels")
        layer = getattr(free, name)
        found.made.append(Made("", 0, f"{path}.{name}", layer.weight, rows))
        found.work.append(
            (result, length * layer.in_features * inner, tuple(u for u in (given, heads) if u is not None))
        )
    found.made.append(Made(result, 2, f"{path}.out_proj", free.out.weight, made))
    found.work.append((result, 2 * lengths[0] * lengths[1] * inner, (heads,)))
    found.work.append((result, lengths[0] * inner * free.out.out_features, (heads, made)))
    for user in call.node.users:
        if user.args[1:] == (0,):
            found.axes[user.name, 2] = made
    return (
        {(n.name, axis) for n in sources for axis in range(3)}
        if not _sequence_units(found, sources)
        else {(n.name, 2) for n in sources}
    )


def _sequence_units(found: Coupling, sources: list[fx.Node]) -> bool:
    return any(found.of(n, axis) is not None for n in sources for axis in (0, 1))


def windows(found: Coupling, call: Call) -> set[Axis]:
    """Torchvision's window attention: columns of qkv, heads, rows of the projection."""
    count, qkv, proj = call.get("num_heads"), call.get("qkv_weight"), call.get("proj_weight")
    inner = (call.shape(qkv) or (0,))[0] // 3
    heads, last = found.fresh(int(count)), len(call.output_shape) - 1
    why = "window attention reads fixed channels"
    read: set[Axis] = {(call.input.name, last), (qkv.name, 1), (qkv.name, 0), (proj.name, 0), (proj.name, 1)}
    given = found.tie(found.of(call.input, last), found.of(qkv, 1), why)
    rows = np.tile(np.repeat(heads, inner // int(count)), 3)
    made = found.of(proj, 0)
    found.tie(found.of(qkv, 0), rows, why)
    found.tie(found.of(proj, 1), rows[:inner], why)
    for name, axis, units in (
        ("qkv_bias", 0, rows),
        ("proj_bias", 0, made),
        ("relative_position_bias", 1, heads),
        ("logit_scale", 0, heads),
    ):
        value = call.get(name)
        if isinstance(value, fx.Node):
            found.tie(found.of(value, axis), units, why)
            read.add((value.name, axis))
    for path, units in (("qkv_weight", rows), ("proj_weight", made)):
        weight = call.constant(path)
        if weight is not None and units is not None:
            found.made.append(
                Made(call.node.name if path == "proj_weight" else "", last, f"{call.path}.{path}", weight, units)
            )
    if made is not None:
        found.axes[call.node.name, last] = made
    found.axes[call.node.name, "heads"] = heads
    _count_windows(found, call, inner, given, heads, made)
    return read


def _count_windows(
    found: Coupling, call: Call, inner: int, given: Units | None, heads: Units, made: Units | None
) -> None:
    """Two projections, and what is left of the work is the attention itself."""
    shape, macs = call.output_shape, found.facts[call.node.name].macs
    (wh, ww), places = call.get("window_size"), 1
    for size, window in zip(shape[1:3], (wh, ww), strict=True):
        places *= -(-size // window) * window
    channels = (call.shape(call.input) or (0,))[-1]
    first, last = places * channels * 3 * inner, places * inner * shape[-1]
    for cost, units in ((first, (given, heads)), (last, (heads, made)), (macs - first - last, (heads,))):
        found.work.append((call.node.name, cost, tuple(u for u in units if u is not None)))


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


def shape_lender(call: Call) -> fx.Node | None:
    """The tensor whose whole shape a reshape takes: `x.reshape_as(y)`, `x.view(y.shape)`."""
    given = call.arguments.get("shape", (call.arguments.get("other"),))
    lender = given[0] if isinstance(given, tuple) and len(given) == 1 else None
    if (
        isinstance(lender, fx.Node)
        and call.shape(lender) is None
        and op_name(lender) in ("getattr", "size", "shape")
        and len(lender.all_input_nodes) == 1
    ):
        lender = lender.all_input_nodes[0]
    return lender if isinstance(lender, fx.Node) and call.shape(lender) == call.output_shape else None


def follows_first(found: Coupling, call: Call) -> set[Axis]:
    """Conversions to another tensor's type: of that one nothing else is read."""
    others = {(n.name, axis) for n in call.node.all_input_nodes[1:] for axis in range(len(call.shape(n) or ()))}
    return follow(found, call) | others


COUPLERS: dict[str, Coupler] = {
    "conv": conv,
    "conv_transpose": conv,
    "linear": linear,
    "embedding": embedding,
    "batch_norm": channel_norm,
    "instance_norm": channel_norm,
    "group_norm": channel_norm,
    "layer_norm": layer_norm,
    "prelu": prelu,
    **dict.fromkeys("mean sum amax amin var std logsumexp".split(), reduction),
    **dict.fromkeys(("matmul", "bmm"), product),
    "einsum": einsum,
    "scaled_dot_product_attention": fused,
    "multihead_attention": attention_module,
    "head_attention": attention_module,
    **dict.fromkeys(("shifted_window_attention", "window_attention"), windows),
    "channel_shuffle": channel_shuffle,
    **dict.fromkeys(("view", "reshape"), reshape),
    **dict.fromkeys(("type_as", "to"), follows_first),
}
"""Operation -> how units pass. What is not here follows the channel rules."""
