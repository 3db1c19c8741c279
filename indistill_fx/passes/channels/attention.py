"""Rules of attention: queries give the rows, values and the output projection the features, all of them the heads."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.attention import HeadAttention, window_attention
from indistill_fx.passes.channels.call import Call, again, slice_weights
from indistill_fx.passes.channels.selection import Blocked, Cut, Emitter, Filters, Part, Propagation, sliced


def fused(call: Call, cut: Cut) -> Propagation | Blocked:
    """`scaled_dot_product_attention`."""
    query, key, value, mask = (call.get(name) for name in ("query", "key", "value", "attn_mask"))
    rank = len(call.output_shape)
    if any(len(call.shape(n) or ()) != rank for n in (query, key, value)):
        return Blocked("attention with operands of different rank")
    if call.get("is_causal", False) and cut.start == rank - 2:
        return Blocked("causal attention counts its rows")
    if len({query, key, value}) < 3:
        return Blocked("attention of a tensor with itself")
    if call.get("enable_gqa", False) and cut.start <= rank - 3 < cut.stop:
        step = _grouped_heads(call, cut, query, [key, value])
    else:
        step = product(call, cut, {rank - 2: [query], rank - 1: [value]}, [query, key, value])
    shape = call.shape(mask)
    if shape is None or isinstance(step, Blocked) or cut.start == rank - 1:
        return step
    axis = cut.start - (rank - len(shape))
    if axis < 0 or shape[axis] == 1:
        return step
    cuts = [*(part.cut for part in step.parts), Cut(mask, axis, axis + 1, cut.index)]
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


def _grouped_heads(call: Call, cut: Cut, query: fx.Node, shared: Sequence[fx.Node]) -> Propagation | Blocked:
    """Heads of grouped-query attention: a run of query heads reads one head of keys and values."""
    if cut.width > 1:
        return Blocked("grouped heads are merged with another axis")
    axis = cut.start
    of_query, *of_shared = ((call.shape(n) or ())[axis] for n in (query, *shared))
    cuts = [Cut(query, axis, axis + 1, cut.index)]
    for n, count in zip(shared, of_shared, strict=True):
        if count > 1:  # a single one is every query head's
            cuts.append(Cut(n, axis, axis + 1, tuple(k // (of_query // count) for k in cut.index)))
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


def matmul(call: Call, cut: Cut) -> Propagation | Blocked:
    """Rows come from the left operand, columns from the right one, batches from both; what is added (`addmm`) has all of them."""
    left, right = operands_of(call)
    added = [call.input] if call.op in _ADDING else []
    shapes = {n: call.shape(n) or () for n in (left, right, *added)}
    if left is right or left in added or right in added or not all(shapes.values()):
        return Blocked("a product of a tensor with itself, or with a number")
    if cut.width > 1:
        alike = len({len(shape) for shape in shapes.values()}) == 1 and not added
        rank = len(call.output_shape)
        return product(call, cut, {}, [left, right]) if alike and cut.stop <= rank - 2 else Blocked(_MERGED)
    wanted = call.output_shape[cut.start]
    ends = [(n, k) for n, k in _ends_of_product(call, cut.start) if shapes[n][k] == wanted]
    ends += [
        (n, k)
        for n in added
        if (k := cut.start - len(call.output_shape) + len(shapes[n])) >= 0 and shapes[n][k] == wanted
    ]
    cuts = [Cut(n, k, k + 1, cut.index) for n, k in ends]
    return (
        Propagation(again(call, cuts), tuple(Part(c) for c in cuts))
        if cuts
        else Blocked("it is the same for every operand")
    )


_ADDING = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}
PRODUCTS = ("matmul", "bmm", "mm", "mv", *_ADDING)
_MERGED = "the axes of a product are merged here"


def _ends_of_product(call: Call, axis: int) -> list[tuple[fx.Node, int]]:
    """The operands' axes that an axis of a product is; a vector has neither rows nor columns, and batches are counted from the right."""
    left, right = operands_of(call)
    ranks = [len(call.shape(n) or ()) for n in (left, right)]
    sides = [left] * (ranks[0] > 1) + [right] * (ranks[1] > 1)
    batches = len(call.output_shape) - len(sides)
    if axis >= batches:
        side = sides[axis - batches]
        return [(side, ranks[0] - 2 if side is left else ranks[1] - 1)]
    return [
        (n, k)
        for n, rank in zip((left, right), ranks, strict=True)
        if (k := rank - 2 - batches + axis) >= 0 and rank > 2
    ]


def operands_of(call: Call) -> tuple[Any, Any]:
    """Left and right operand of a product."""
    if call.op in _ADDING:
        first, second = _ADDING[call.op]
        return call.get(first), call.get(second)
    return call.get("input"), call.get("other", call.get("mat2", call.get("vec")))


def product(call: Call, cut: Cut, ends: dict[int, list[fx.Node]], every: list[Any]) -> Propagation | Blocked:
    """A product whose output axes in `ends` come from one operand, and the others from every one."""
    rank = len(call.output_shape)
    if cut.stop > rank - 2 and cut.width > 1:
        return Blocked(_MERGED)
    operands = ends.get(cut.start, every)
    wanted = call.output_shape[cut.start : cut.stop]
    sizes = [(call.shape(n) or ())[cut.start : cut.stop] for n in operands]
    alike = [cut.start not in ends and all(n == 1 for n in size) for size in sizes]
    if any(size != wanted and not same for size, same in zip(sizes, alike, strict=True)):
        return Blocked("the operands of a product broadcast here")
    cuts = [
        Cut(n, cut.start, cut.stop, cut.index)
        for n, size, same in zip(operands, sizes, alike, strict=True)
        if size == wanted or not same
    ]
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


GROUPED = ("_grouped_mm", "grouped_mm")
"""Products in which the matrix of its group multiplies every row, as experts do."""
BY_LETTERS = ("einsum", "tensordot", *GROUPED)
"""Sums of products over axes that the call names, or that have names here."""


def letters(call: Call) -> tuple[list[str], str, list[fx.Node]] | None:
    """The subscripts of an einsum's operands and of its output, and the operands; None if they are not plain.

    An ellipsis is written out in capital letters that the equation does not use. A `tensordot` is an einsum, too. So is a
    product of rows with the matrices of their groups, whose axis stands for itself.
    """
    if call.op in GROUPED:
        rows, weight = call.input, call.get("other")
        plain = isinstance(weight, fx.Node) and call.get("bias") is None
        return (["te", "geo"], "to", [rows, weight]) if plain and len(call.shape(weight) or ()) == 3 else None
    equation, *operands = call.node.args if call.op == "einsum" else (_equation(call), call.input, call.get("other"))
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    text = str(equation).replace(" ", "")
    nodes = [n for n in operands if isinstance(n, fx.Node)]
    if "->" not in text or len(nodes) != len(operands) or len(set(nodes)) != len(nodes):
        return None
    inputs, output = text.split("->")
    names = inputs.split(",")
    ranks = [len(call.shape(n) or ()) for n in nodes]
    if len(names) != len(nodes):
        return None
    spare = [c for c in string.ascii_uppercase if c not in text]
    counts = [rank - len(name) + 3 if "..." in name else 0 for name, rank in zip(names, ranks, strict=True)]
    unnamed = spare[: max(counts)]
    names = [
        name.replace("...", "".join(unnamed[len(unnamed) - count :])) for name, count in zip(names, counts, strict=True)
    ]
    output = output.replace("...", "".join(unnamed))
    plain = all(len(set(name)) == len(name) for name in (*names, output))
    return (names, output, nodes) if plain and [len(name) for name in names] == ranks else None


def _equation(call: Call) -> str | None:
    """A tensordot as an einsum."""
    ranks = [len(call.shape(n) or ()) for n in (call.input, call.get("other"))]
    dims = call.get("dims", 2)
    left, right = (range(ranks[0] - dims, ranks[0]), range(dims)) if isinstance(dims, int) else dims
    first = list(string.ascii_lowercase[: ranks[0]])
    second = list(string.ascii_lowercase[ranks[0] : sum(ranks)])
    for a, b in zip(left, right, strict=True):
        second[b] = first[a]
    output = [letter for letter in (*first, *second) if (letter in first) != (letter in second)]
    return f"{''.join(first)},{''.join(second)}->{''.join(output)}"


def einsum(call: Call, cut: Cut) -> Propagation | Blocked:
    """Every operand that has the selected letter is selected along it, if it is not one entry for all."""
    parsed = letters(call)
    if parsed is None or cut.width > 1:
        return Blocked("an einsum over merged axes, or with repeated letters or operands")
    names, output, nodes = parsed
    letter, wanted = output[cut.start], call.output_shape[cut.start]
    ends = [(n, name.index(letter)) for name, n in zip(names, nodes, strict=True) if letter in name]
    cuts = [Cut(n, k, k + 1, cut.index) for n, k in ends if (call.shape(n) or ())[k] == wanted]
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))


def module_output(maker: Call, cut: Cut, key: int, call: Call) -> Propagation | Blocked:
    """The first result of `nn.MultiheadAttention`: its features are rows of the output projection."""
    module = maker.module
    last = len(call.output_shape) - 1
    if not isinstance(module, (nn.MultiheadAttention, HeadAttention)) or key != 0 or cut.start < last or last != 2:
        return Blocked("the attention mixes its sequence")
    free = free_heads(module)
    if free is None:
        return Blocked("attention with extra keys")
    filters = Filters(maker.node, f"{maker.path}.{'out' if module is free else 'out_proj'}", free.out.weight, cut.index)

    def emit(out: Emitter, _: Sequence[fx.Node]) -> fx.Node:
        bias = None if free.out.bias is None else sliced(free.out.bias, 0, cut.index)
        new = with_projections(free, out=linear(sliced(free.out.weight, 0, cut.index), bias))
        result = out.module(str(maker.node.target), new, *maker.node.args, **maker.node.kwargs)
        return out.item(result, 0)

    return Propagation(emit, filters=filters)


def free_heads(module: nn.MultiheadAttention | HeadAttention) -> HeadAttention | None:
    """The same attention with widths that are free of each other, on the same weights; None if it adds keys of its own."""
    if isinstance(module, HeadAttention):
        return module
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return None
    weights = _thirds(module.in_proj_weight) or [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases: Sequence[Tensor | None] = _thirds(module.in_proj_bias) or [None] * 3
    query, key, value = (linear(w, b) for w, b in zip(weights, biases, strict=True))
    out = linear(module.out_proj.weight, module.out_proj.bias)
    new = HeadAttention(
        query, key, value, out, heads=module.num_heads, dropout=module.dropout, batch_first=module.batch_first
    )
    return new.train(module.training)


def _thirds(packed: Tensor | None) -> list[Tensor] | None:
    """A packed parameter in three, each frozen or not as it is."""
    return None if packed is None else [t.detach().requires_grad_(packed.requires_grad) for t in packed.chunk(3)]


def with_projections(module: HeadAttention, **projections: nn.Linear) -> HeadAttention:
    """The attention with some of its linear layers replaced."""
    parts = {name: projections.get(name, getattr(module, name)) for name in ("query", "key", "value", "out")}
    new = HeadAttention(**parts, heads=module.heads, dropout=module.dropout, batch_first=module.batch_first)
    new.training = module.training
    return new


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer on these tensors."""
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = (
        weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=weight.requires_grad)
    )
    if bias is not None:
        new.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=bias.requires_grad)
    return new


def windows(call: Call, cut: Cut) -> Propagation | Blocked:
    """Torchvision's window attention: its features are rows of the output projection."""
    if cut.start < len(call.output_shape) - 1:
        return Blocked("window attention mixes the axes of space")
    named = {name: (0, cut.index) for name in ("proj_weight", "proj_bias") if call.get(name) is not None}
    filters = Filters(call.node, call.path, call.constant("proj_weight"), cut.index)
    step = slice_weights(call, named, filters=filters)

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        node = step.emit(out, new)
        node.target = window_attention  # torchvision's function accepts only an output of the original width
        return node

    return Propagation(emit, step.parts, step.weights, filters)


def position_bias(call: Call, cut: Cut) -> Propagation | Blocked:
    """Torchvision's table of relative positions: heads on axis 1 of both."""
    if (cut.start, cut.stop) != (1, 2):
        return Blocked("relative positions are looked up")
    below = Cut(call.get("table"), 1, 2, cut.index)
    return Propagation(again(call, [below]), (Part(below),))


def patch_merging(call: Call, cut: Cut) -> Propagation | Blocked:
    """Four neighbours side by side: channel k comes from k % C. What any of the four keeps is selected; a gather does the rest."""
    shape = call.shape(call.input)
    last = len(call.output_shape) - 1
    if shape is None or cut.start != last:
        return Blocked("patch merging mixes the axes of space")
    sources = [k % shape[last] for k in cut.index]
    used = tuple(sorted(set(sources)))
    place = {k: at for at, k in enumerate(used)}
    gather = tuple(k // shape[last] * len(used) + place[source] for k, source in zip(cut.index, sources, strict=True))
    part = Part(
        Cut(call.input, last, last + 1, used), (tuple(range(len(sources))), tuple(place[source] for source in sources))
    )
    gathers_all = gather == tuple(range(4 * len(used)))
    merge = again(call, [part.cut])

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        node = merge(out, new)
        return (
            node
            if gathers_all
            else out.function(torch.index_select, node, last, out.tensor("kept", torch.tensor(gather)))
        )

    return Propagation(
        emit, (part,), note="" if gathers_all else "the four neighbours keep different channels; a gather picks them"
    )
