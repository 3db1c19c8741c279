"""How the units of channels pass through products and attention: heads go whole, and what is summed over goes on both sides."""

from __future__ import annotations

import numpy as np
from torch import fx, nn

from indistill_fx.graph.attention import HeadAttention
from indistill_fx.passes.channels.attention import GROUPED, free_heads, letters, operands_of
from indistill_fx.passes.channels.call import Call
from indistill_fx.passes.pruning.dependencies import Axis, Coupling, Made, Units, follow


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
    read = follow(found, call, [units]) | {(n.name, axis) for n, axis in ends}
    last = len(call.output_shape) - 1
    if ranks[1] > 1:
        _note_filters(found, call, right, ranks[1] - 1, last)
    if ranks[0] > 1:
        _note_filters(found, call, left, ranks[0] - 2, last - (ranks[1] > 1))
    return read


def _note_filters(found: Coupling, call: Call, operand: fx.Node, axis: int, made: int) -> None:
    """Treat a matrix product with a parameter as a linear layer: the parameter's axes define the channels."""
    weight = call.weight(operand)
    units = found.axes.get((call.node.name, made))
    if weight is not None and weight.dim() > 1 and units is not None:
        rows = weight.movedim(axis, 0)
        found.made.append(Made(call.node.name, made, str(operand.target), rows.reshape(len(rows), -1), units))


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
    read |= follow(found, call, summed)
    if call.op in GROUPED:
        _keep_aligned(found, call, nodes[1], summed[0])
    for name, n in zip(names, nodes, strict=True):
        for letter in name:
            if letter in output and not any(letter in other for other in names if other != name):
                _note_filters(found, call, n, name.index(letter), output.index(letter))
    return read


_ALIGNED = 16
"""Bytes that the rows of a grouped product are a multiple of; torch refuses others."""


def _keep_aligned(found: Coupling, call: Call, weight: fx.Node, units: Units | None) -> None:
    """All groups stay, and the channels that a grouped product sums over go as many at a time as torch needs."""
    found.freeze(found.of(weight, 0), f"`{call.node.name}` has a matrix for each of them")
    each = _ALIGNED // call.facts[weight.name].dtype.itemsize
    if units is not None and len(units) % each == 0:
        for place in range(1, each):
            found.pairs.append((units[::each], units[place::each]))


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
    if free is None or any(len(call.shape(n) or ()) != 3 for n in sources):
        return set()
    path, inner = call.path, free.out.in_features
    known = {name: found.axes.get((path, name)) for name in ("heads", "out")}
    heads = known["heads"] if known["heads"] is not None else found.fresh(free.heads)
    made = known["out"] if known["out"] is not None else found.fresh(free.out.out_features)
    found.axes[path, "heads"], found.axes[path, "out"] = heads, made
    rows = np.repeat(heads, inner // free.heads)
    results = [user for user in call.node.users if user.args[1:] == (1,) and user.users]
    found.freeze(heads if results else None, "the weights of the attention are read")
    mask = call.arguments.get("attn_mask", call.arguments.get("input_5"))
    found.freeze(heads if len(call.shape(mask) or ()) == 3 else None, "every head has a mask of its own")
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
    """Count the work of window attention: the two projections, and the rest as the attention itself."""
    shape, macs = call.output_shape, found.facts[call.node.name].macs
    (wh, ww), places = call.get("window_size"), 1
    for size, window in zip(shape[1:3], (wh, ww), strict=True):
        places *= -(-size // window) * window
    channels = (call.shape(call.input) or (0,))[-1]
    first, last = places * channels * 3 * inner, places * inner * shape[-1]
    for cost, units in ((first, (given, heads)), (last, (heads, made)), (macs - first - last, (heads,))):
        found.work.append((call.node.name, cost, tuple(u for u in units if u is not None)))
