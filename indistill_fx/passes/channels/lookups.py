"""Rules of operations that look entries up, or write them, at computed places: indexing by tensors, `gather`, `scatter`, `index_add`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from indistill_fx.passes.channels.call import Call, again, axis_of
from indistill_fx.passes.channels.keys import full_key
from indistill_fx.passes.channels.norms import mixed_axis
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation


def looked_up(call: Call, cut: Cut) -> Propagation | Blocked:
    """A tensor that is indexed by tensors: the axes that are taken whole are its own."""
    axes = _axes_of_lookup(call)
    if axes is None:
        return Blocked(f"it is indexed by tensors or by computed numbers{call.why_open}")
    if cut.width > 1:
        return Blocked("a table looked up, with merged axes")
    axis, whole = axes[cut.start]
    if axis is None:
        return Blocked("the selected axis is new here" if whole else "it is looked up along the selected axis")
    if not whole:
        return Blocked("the selected axis is sliced")
    below = Cut(call.input, axis, axis + 1, cut.index)
    return Propagation(again(call, [below]), (Part(below),))


def _axes_of_lookup(call: Call) -> list[tuple[int | None, bool]] | None:
    """For every axis of the result, the axis of the tensor it was and whether it was taken whole.

    Axes of the places are (None, False), new ones (None, True). The places stand where the first of adjacent tensors stood, and in front if
    the tensors stand apart. Numbers take their axis away first, as torch does it and numpy does not.
    """
    shape, given = call.shape(call.input), call.get("key", call.get("index"))
    entries = given if isinstance(given, tuple) else (given,)
    entries = tuple(entry for entry in entries for _ in range(_axes_of_mask(call, entry) or 1))
    key = full_key(entries, len(shape)) if shape is not None else None
    if key is None:
        return None
    axes: list[tuple[int | None, bool]] = []
    tensors, ranks, axis = list[int](), list[int](), 0
    for entry in key:
        if entry is None:
            axes.append((None, True))
            continue
        rank = 0 if isinstance(entry, slice) else _rank(call, entry)
        if rank is None:
            return None
        if isinstance(entry, slice):
            axes.append((axis, entry == slice(None)))
        elif rank:
            tensors.append(len(axes) + len(tensors))
            ranks.append(rank)
        axis += 1
    apart = tensors != list(range(tensors[0], tensors[0] + len(tensors))) if tensors else False
    first = tensors[0] if tensors and not apart else 0
    return [*axes[:first], *[(None, False)] * max(ranks, default=0), *axes[first:]]


def _axes_of_mask(call: Call, entry: Any) -> int | None:
    """How many axes a mask is a mask of; None for any other entry. It is as many lists of places as it has axes."""
    masks = isinstance(entry, fx.Node) and call.shape(entry) and call.facts[entry.name].dtype == torch.bool
    return len(call.shape(entry) or ()) if masks else None


def _rank(call: Call, entry: Any) -> int | None:
    """How many axes places have; None if it is not known."""
    if isinstance(entry, fx.Node):
        shape = call.shape(entry)
        single = shape is None or (not shape and call.facts[entry.name].dtype == torch.bool)
        return None if single else 1 if _axes_of_mask(call, entry) else len(shape or ())
    plain = isinstance(entry, int) and not isinstance(entry, bool)
    return 0 if plain else 1 if isinstance(entry, list) and all(type(k) is int for k in entry) else None


def along_places(call: Call, cut: Cut) -> Propagation | Blocked:
    """`gather`, `scatter`, `index_add`, `diff`, …: along another axis than theirs, every operand of as many axes is selected alike."""
    dim, rank = mixed_axis(call), len(call.output_shape)
    if not isinstance(dim, int) or cut.width > 1:
        return Blocked(f"{call.op} along a computed axis, or with merged axes")
    if axis_of(dim, rank) == cut.start:
        return Blocked(f"{call.op} looks up along the selected axis")
    shapes = {n: shape for n in call.node.all_input_nodes if len(shape := call.shape(n) or ()) == rank}
    sizes = {n: shape[cut.start] for n, shape in shapes.items()}
    alone = 1 if call.op == "take_along_dim" else None  # it broadcasts
    wanted = call.output_shape[cut.start]
    if any(size not in (wanted, alone) for size in sizes.values()):
        return Blocked(f"the operands of {call.op} have different sizes along the selected axis")
    cuts = [Cut(n, cut.start, cut.stop, cut.index) for n, size in sizes.items() if size == wanted]
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))
