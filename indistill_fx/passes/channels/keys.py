"""What an indexing takes: keys of numbers, None, slices and constant tensors, and `select`, `narrow`, `slice` and `index_select`."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from indistill_fx.graph.ops import is_inplace, op_name
from indistill_fx.passes.channels.call import Call, axis_of, constant_of, index_select
from indistill_fx.passes.channels.selection import Emitter, Index

Key = tuple[Any, ...]


def taken(call: Call) -> tuple[Key, dict[int, Index]] | None:
    """What a slicing takes: a full key of numbers, None and slices, and for each axis sliced by numbers the entries taken of it.

    Slices by numbers, and a constant tensor of places, are written whole in the key; computed slices stay as they are.
    """
    shape = call.shape(call.input)
    if shape is None:
        return None
    if call.op in ("getitem", "with_item"):
        given = call.get("key")
        key = full_key(given if isinstance(given, tuple) else (given,), len(shape))
    else:
        dim = call.get("dim", 0)
        if not isinstance(dim, int):
            return None
        dim = axis_of(dim, len(shape))
        if call.op == "index_select":
            chosen = _places(call, call.get("index"), shape[dim])
            return None if chosen is None else ((slice(None),) * len(shape), {dim: chosen})
        entry = _entry(call)
        key = None if entry is None else full_key((*[slice(None)] * dim, entry), len(shape))
    entries: dict[int, Index] = {}
    if key is not None and call.op == "getitem":
        key, entries = _without_places(call, key, shape)
    if key is None or not all(_plain(entry) for entry in key):
        return None
    axis = 0
    for entry in key:
        if isinstance(entry, slice) and entry != slice(None) and _by_numbers(entry):
            entries[axis] = tuple(range(*entry.indices(shape[axis])))
        axis += 0 if entry is None else 1
    return tuple(slice(None) if isinstance(entry, slice) and _by_numbers(entry) else entry for entry in key), entries


def written_slices(call: Call, axes: Container[int]) -> dict[int, slice]:
    """The slices of some axes as the code writes them, which fit other sizes than the example's."""
    shape = call.shape(call.input) or ()
    if call.op in ("getitem", "with_item"):
        given = call.get("key")
        key = full_key(given if isinstance(given, tuple) else (given,), len(shape))
    else:
        dim = call.get("dim", 0)
        known = call.op in ("slice", "narrow") and isinstance(dim, int)
        key = full_key((*[slice(None)] * axis_of(dim, len(shape)), _entry(call)), len(shape)) if known else None
    found: dict[int, slice] = {}
    axis = 0
    for entry in key or ():
        if isinstance(entry, slice) and axis in axes:
            found[axis] = entry
        axis += 0 if entry is None else 1
    return found


def _without_places(call: Call, key: Key, shape: tuple[int, ...]) -> tuple[Key, dict[int, Index]]:
    """The key with a whole slice in place of its only entry of constant places, and these; with numbers, axes would change their order."""
    tensors = [k for k, entry in enumerate(key) if isinstance(entry, (fx.Node, list))]
    if len(tensors) != 1 or any(isinstance(entry, int) for entry in key):
        return key, {}
    (at,) = tensors
    axis = sum(entry is not None for entry in key[:at])
    chosen = _places(call, key[at], shape[axis])
    return (key, {}) if chosen is None else ((*key[:at], slice(None), *key[at + 1 :]), {axis: chosen})


def _places(call: Call, given: Any, size: int) -> Index | None:
    """Constant places on an axis of this size, counted from the front; a mask stands for the places it has."""
    if isinstance(given, fx.Node):
        given = _lasting(given, call)
    elif isinstance(given, list) and all(isinstance(k, int) for k in given):
        given = torch.tensor(given)
    if not isinstance(given, Tensor) or given.dim() != 1 or given.is_floating_point() or given.is_complex():
        return None
    return tuple((given.nonzero().flatten() if given.dtype == torch.bool else given % size).tolist())


_SAME_EACH_TIME = frozenset(
    "get_attr getattr arange tensor flip roll view reshape permute transpose t flatten unflatten unsqueeze squeeze contiguous clone detach "
    "cat stack chunk split getitem index_select repeat expand to long int type_as add sub mul div floordiv floor_divide mod remainder neg "
    "argsort sort nonzero eq ne lt le gt ge not invert logical_not zeros ones full zeros_like ones_like full_like".split()
)
"""Operations on constants that compute the same at every call."""


def _lasting(node: fx.Node, call: Call) -> Any:
    """The value of a constant that nothing draws at random and nothing writes into; None if it may change."""
    seen, pending = {node}, [node]
    while pending:
        current = pending.pop()
        if op_name(current) not in _SAME_EACH_TIME or any(
            is_inplace(user) and user.args[0] is current for user in current.users
        ):
            return None
        fresh = [source for source in current.all_input_nodes if source not in seen]
        seen.update(fresh)
        pending += fresh
    written = {str(n.args[0].target) for n in node.graph.nodes if is_inplace(n) and isinstance(n.args[0], fx.Node)}
    return None if any(n.op == "get_attr" and str(n.target) in written for n in seen) else constant_of(node, call.facts)


def _entry(call: Call) -> Any:
    if call.op == "select":
        return call.get("index")
    if call.op == "narrow":
        start, length = call.get("start"), call.get("length")
        return slice(start, start + length) if isinstance(start, int) and isinstance(length, int) else None
    return slice(call.get("start"), call.get("end"), call.get("step"))


def index_by(out: Emitter, node: fx.Node, key: Key, entries: Mapping[int, Index]) -> fx.Node:
    """Take these entries of some axes, then index by a key of numbers, None and whole slices."""
    for axis, chosen in entries.items():
        step = chosen[1] - chosen[0] if len(chosen) > 1 else 1
        if step > 0 and chosen == tuple(range(chosen[0], chosen[-1] + 1, step)):
            node = out.function(operator.getitem, node, (*[slice(None)] * axis, slice(chosen[0], chosen[-1] + 1, step)))
        else:
            node = index_select(out, node, axis, axis + 1, chosen)
    return node if all(entry == slice(None) for entry in key) else out.function(operator.getitem, node, key)


def _plain(entry: Any) -> bool:
    if isinstance(entry, slice):
        return not isinstance(entry.step, fx.Node) and (entry.step is None or entry.step > 0)
    return entry is None or (isinstance(entry, int) and not isinstance(entry, bool))


def _by_numbers(entry: slice) -> bool:
    return not any(isinstance(v, fx.Node) for v in (entry.start, entry.stop, entry.step))


def full_key(key: Key, rank: int) -> tuple[Any, ...] | None:
    """The key with Ellipsis and missing entries written out."""
    named = sum(1 for entry in key if entry is not None and entry is not Ellipsis)
    if sum(1 for entry in key if entry is Ellipsis) > 1 or named > rank:
        return None
    fill = [slice(None)] * (rank - named)
    place = next((k for k, entry in enumerate(key) if entry is Ellipsis), None)
    return (*key, *fill) if place is None else (*key[:place], *fill, *key[place + 1 :])
