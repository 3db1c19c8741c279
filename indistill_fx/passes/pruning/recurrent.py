"""Recurrent layers of torch: their inputs are columns, and a hidden unit is the same in all gates, layers and directions.

A hidden unit that is removed is one whose state stays zero: without it the others go on as if its rows of all gates were zeros, because
the candidate state of every kind of cell is tanh(0) = 0 then. (So only with an initial state of zeros, and tanh or ReLU.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from indistill_fx.passes.channels.call import Call
from indistill_fx.passes.pruning.dependencies import Axis, Coupling, Made, Units

NAMES = ("lstm", "gru", "rnn")


def couple_recurrent(found: Coupling, call: Call) -> set[Axis]:
    """Tie the weights of all layers and directions to the input's units and to the hidden ones."""
    module, shape = call.module, call.shape(call.input)
    if not isinstance(module, nn.RNNBase) or shape is None or module.proj_size or len(call.node.all_input_nodes) > 1:
        return set()
    last, directions = len(shape) - 1, 2 if module.bidirectional else 1
    known = found.axes.get((call.path, "hidden"))
    hidden = found.fresh(module.hidden_size) if known is None else known
    found.axes[call.path, "hidden"] = hidden
    given = found.of(call.input, last)
    for name, tensor in module.named_parameters():
        found.tie_weight(call, name, 0, np.tile(hidden, len(tensor) // module.hidden_size))
        if name.startswith("weight_hh"):
            found.tie_weight(call, name, 1, hidden)
        elif name.startswith("weight_ih"):
            found.tie_weight(call, name, 1, given if "_l0" in name else np.tile(hidden, directions))
    if known is None:
        rows: Tensor = dict(module.named_parameters())["weight_ih_l0"]
        weight = rows.unflatten(0, (-1, module.hidden_size)).transpose(0, 1)
        found.made.append(Made("", 0, call.path, weight, hidden))
    _hand_on(found, call, hidden, directions)
    _count(found, call, given, hidden)
    return {(call.input.name, axis) for axis in range(len(shape))}


def _hand_on(found: Coupling, call: Call, hidden: Units, directions: int) -> None:
    """Pass units on: the sequence has those of both directions, a last state those of one direction."""
    for user in call.node.users:
        key = user.args[1] if len(user.args) > 1 else None
        states = [user] if user.name in found.facts else [u for u in user.users if u.name in found.facts]
        if key not in (0, 1) or (user.name not in found.facts and len(states) < len(user.users)):
            found.freeze(hidden, f"the results of `{call.path}` are handed on as a whole")
        for state in states:
            last = len(found.facts[state.name].shape) - 1
            found.axes[state.name, last] = np.tile(hidden, directions) if key == 0 else hidden


def _count(found: Coupling, call: Call, given: Units | None, hidden: Units) -> None:
    """Count the work, which is proportional to the sizes of the weight matrices."""
    assert call.module is not None
    name = next((u.name for u in call.node.users if u.name in found.facts and found.facts[u.name].macs), None)
    sizes = {key: w.numel() for key, w in call.module.named_parameters() if key.startswith("weight")}
    for key, size in sizes.items() if name is not None else ():
        columns = given if key.startswith("weight_ih_l0") else hidden
        share = found.facts[name].macs * size // sum(sizes.values())  # type: ignore[index]
        found.work.append((name, share, tuple(u for u in (hidden, columns) if u is not None)))  # type: ignore[arg-type]


def resize_recurrent(module: nn.RNNBase) -> None:
    """Sizes that follow from the sliced weights."""
    tensors = dict(module.named_parameters())
    module.input_size, module.hidden_size = (tensors[f"weight_{kind}_l0"].shape[1] for kind in ("ih", "hh"))
    module.flatten_parameters()


def silent(module: nn.RNNBase, kept: Sequence[int]) -> nn.RNNBase:
    """The same layer whose other hidden units keep a state of zero."""
    new = copy.deepcopy(module)
    stays = torch.zeros(module.hidden_size)
    stays[list(kept)] = 1
    with torch.no_grad():
        for tensor in new.parameters():
            rows = stays.to(tensor).repeat(len(tensor) // module.hidden_size)
            tensor.mul_(rows.view(-1, *[1] * (tensor.dim() - 1)))
    return new
