"""Recurrent layers and cells of torch: inputs are columns, and a hidden unit is the same in all gates, layers, directions and steps.

A hidden unit that is removed is one whose state stays zero: without it the others go on as if its rows of all gates were zeros, because
the candidate state of every kind of cell is tanh(0) = 0 then (or ReLU's). What a state starts from loses the same units.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.channels.call import Call
from indistill_fx.passes.channels.selection import Cut
from indistill_fx.passes.pruning.dependencies import Axis, Coupling, Made, Units, lent

NAMES = ("lstm", "gru", "rnn", "lstm_cell", "gru_cell", "rnn_cell")
WHOLE = "whole"
"""In place of an axis: all of a tuple of tensors."""


def couple_recurrent(found: Coupling, call: Call) -> set[Axis]:
    """Tie the weights of all layers and directions to the input's units and to the hidden ones."""
    module, given_by = call.module, features(call.input)
    shape = call.shape(given_by)
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or shape is None:
        return set()
    last = len(shape) - 1
    first = (call.path, "hidden") not in found.axes
    if first:
        found.axes[call.path, "hidden"] = found.axes[call.path, "out"] = found.fresh(module.hidden_size)
        if size := getattr(module, "proj_size", 0):  # torch runs a projection only to fewer units than there are
            found.axes[call.path, "out"] = found.fresh(size)
            for units in (found.axes[call.path, "hidden"], found.axes[call.path, "out"]):
                found.freeze(units, f"`{call.path}` projects its hidden units")
    hidden, out = found.axes[call.path, "hidden"], found.axes[call.path, "out"]
    given = found.of(given_by, last)
    for name, tensor in module.named_parameters():
        rows, columns = _sides(name, given, hidden, out, _directions(module))
        found.tie_weight(call, name, 0, np.tile(rows, len(tensor) // len(rows)))
        if tensor.dim() > 1:
            found.tie_weight(call, name, 1, columns)
        if first and name in ("weight_ih", "weight_ih_l0"):
            found.made.append(Made("", 0, call.path, tensor.unflatten(0, (-1, len(rows))).transpose(0, 1), rows))
    read: set[Axis] = {(given_by.name, last), (call.input.name, WHOLE)}
    read |= _start(found, call, (out, hidden))
    _hand_on(found, call, (out, hidden))
    _count(found, call, given)
    return read


def features(given: Any) -> Any:
    """The tensor whose last axis a recurrent layer reads: its input, or the data of a packed sequence."""
    return given.args[0] if isinstance(given, fx.Node) and op_name(given) == "PackedSequence" and given.args else given


def packed(found: Coupling, call: Call) -> set[Axis]:
    """A packed sequence: what recurrent layers make of it is followed from its data."""
    followed = all(op_name(user) in NAMES for user in call.node.users)
    return {(n.name, axis) for n in call.node.all_input_nodes for axis in range(len(call.shape(n) or ())) if followed}


def packing(found: Coupling, call: Call) -> set[Axis]:
    """Sequences are packed, or padded again: their features pass."""
    return {(call.input.name, len(call.shape(call.input) or ()) - 1)}


def _directions(module: nn.Module | None) -> int:
    return 2 if getattr(module, "bidirectional", False) else 1


def _sides(name: str, given: Units | None, hidden: Units, out: Units, directions: int) -> tuple[Units, Units | None]:
    """The units of a weight's rows, repeated for each gate, and of its columns."""
    if name.startswith("weight_hr"):
        return out, hidden
    if name.startswith("weight_hh"):
        return hidden, out
    layer = name.removeprefix("weight_ih").removesuffix("_reverse")
    return hidden, given if layer in ("", "_l0") else np.tile(out, directions)


def initial_states(call: Call) -> tuple[Any, ...]:
    """What the states start from: one tensor, the two of an LSTM, or a node that holds both; nothing for zeros."""
    given = call.arguments.get("input_1", call.arguments.get("hx"))
    return () if given is None else tuple(given) if isinstance(given, (tuple, list)) else (given,)


def _start(found: Coupling, call: Call, states: tuple[Units, Units]) -> set[Axis]:
    """Tie what the states start from to the hidden units."""
    read: set[Axis] = set()
    for start, units in zip(initial_states(call), states, strict=False):
        shape = call.shape(start)
        if shape is not None:
            last = len(shape) - 1
            own = found.of(start, last)
            if own is None:
                own = lent(found, Cut(start, last, last + 1, tuple(range(shape[last]))), call.node)
            found.tie(own, units, f"`{call.path}` starts from a fixed state")
            read.add((start.name, last))
        elif (path := _path_of_states(start)) is not None:
            for name, own in zip(("out", "hidden"), states, strict=True):
                found.tie(found.axes.get((path, name)), own, f"`{call.path}` starts from a fixed state")
            read.add((start.name, WHOLE))
        else:
            for own in states:
                found.freeze(own, f"`{call.path}` starts from a state of unknown origin")
    return read


def _path_of_states(node: Any) -> str | None:
    """The recurrent layer or cell whose tuple of states a node is."""
    if not isinstance(node, fx.Node):
        return None
    if op_name(node) == "lstm_cell":
        return str(node.target)
    maker = node.args[0] if _key(node) in (1, -1) else None
    return str(maker.target) if isinstance(maker, fx.Node) and op_name(maker) == "lstm" else None


def _hand_on(found: Coupling, call: Call, states: tuple[Units, Units]) -> None:
    """Pass units on to the tensors that a call results in; where one goes as a part of something else, all units stay."""
    for node, units in _results(call, states):
        if units is not None and node.name in found.facts:
            found.axes[node.name, len(found.facts[node.name].shape) - 1] = units
        else:
            for own in states:
                found.freeze(own, f"the results of `{call.path}` are handed on as a whole")


def _results(call: Call, states: tuple[Units, Units]) -> Iterator[tuple[fx.Node, Units | None]]:
    """The tensors that a call results in, and the units of their last axes: a sequence has those of both directions."""
    if call.op in ("gru_cell", "rnn_cell"):
        yield call.node, states[0]
    elif call.op == "lstm_cell":
        yield from _parts(call.node, states, _LSTMS)
    else:
        sequence = np.tile(states[0], _directions(call.module))
        for user in call.node.users:
            key, whole = _key(user), user.name not in call.facts
            if key in (0, -2):  # whole: a packed sequence of data and numbers that tell how it is packed
                yield from _parts(user, (sequence, None, None, None), ()) if whole else ((user, sequence),)
            elif key in (1, -1):
                yield from _parts(user, states, _LSTMS) if whole else ((user, states[0]),)
            else:
                yield user, None


_LSTMS = ("lstm", "lstm_cell")


def _parts(
    node: fx.Node, units: Sequence[Units | None], readers: tuple[str, ...]
) -> Iterator[tuple[fx.Node, Units | None]]:
    """The tensors with units that are taken out of a tuple, by their places; some readers take it as it is."""
    for user in node.users:
        key = _key(user)
        if key is None and op_name(user) not in readers:
            yield user, None
        elif key is not None and units[key] is not None:
            yield user, units[key]


def _key(user: fx.Node) -> int | None:
    """Which result a node takes."""
    taken = user.target is operator.getitem and isinstance(user.args[1], int)
    return user.args[1] if taken else None  # type: ignore[return-value]


def _count(found: Coupling, call: Call, given: Units | None) -> None:
    """Count the work, which is proportional to the sizes of the weight matrices."""
    module = call.module
    assert module is not None
    below = (call.node, *call.node.users, *(n for user in call.node.users for n in user.users))
    name = next((n.name for n in below if n.name in found.facts and found.facts[n.name].macs), None)
    sizes = {key: w.numel() for key, w in module.named_parameters() if key.startswith("weight")}
    hidden, out = found.axes[call.path, "hidden"], found.axes[call.path, "out"]
    for key, size in sizes.items() if name is not None else ():
        sides = _sides(key, given, hidden, out, 1)
        share = found.facts[name].macs * size // sum(sizes.values())  # type: ignore[index]
        found.work.append((name, share, tuple(u for u in sides if u is not None)))  # type: ignore[arg-type]


def resize_recurrent(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Sizes that follow from the sliced weights."""
    tensors = dict(module.named_parameters())
    rows, columns = (tensors.get(f"weight_{kind}_l0", tensors.get(f"weight_{kind}")) for kind in ("hh", "ih"))
    assert rows is not None and columns is not None
    module.input_size = columns.shape[1]
    if isinstance(module, nn.RNNCellBase):
        module.hidden_size = rows.shape[1]
        return
    module.hidden_size = module.hidden_size if module.proj_size else rows.shape[1]
    module.flatten_parameters()


def silent(module: nn.Module, kept: Sequence[int]) -> nn.Module:
    """The same layer or cell, whose other hidden units keep a state of zero."""
    new, size = copy.deepcopy(module), int(module.hidden_size)  # type: ignore[arg-type]
    stays = torch.zeros(size)
    stays[list(kept)] = 1
    with torch.no_grad():
        for tensor in new.parameters():
            rows = stays.to(tensor).repeat(len(tensor) // size)
            tensor.mul_(rows.view(-1, *[1] * (tensor.dim() - 1)))
    return new
