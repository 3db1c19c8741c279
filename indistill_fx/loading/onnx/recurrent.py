"""Rules of recurrent operators: layers of torch.nn, their gates in torch's order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.loading.onnx.builder import Builder, Op
from indistill_fx.loading.onnx.values import Traced, Undecided, Value

_KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "RNN": (nn.RNN, (0,)),
    "GRU": (nn.GRU, (1, 0, 2)),  # ONNX: update, reset, new; torch: reset, update, new
    "LSTM": (nn.LSTM, (0, 2, 3, 1)),  # ONNX: input, output, forget, cell; torch: input, forget, cell, output
}
_USUAL = {"RNN": ["tanh"], "GRU": ["sigmoid", "tanh"], "LSTM": ["sigmoid", "tanh", "tanh"]}


def recurrent(op: Op, build: Builder) -> Any:
    """RNN, GRU and LSTM with constant weights over whole sequences, forward, in reverse or both.

    Returns:
        Y (length, directions, batch, hidden), then the last states (directions, batch, hidden).
    """
    kind, order = _KINDS[op.kind]
    nonlinearity = _require_plain(op)
    weights, recurring = (op.required_constant(number, "its weights") for number in (1, 2))
    bias = op.constant(3)
    directions, _, hidden = recurring.shape
    found = _torch_weights(weights, recurring, bias, order, hidden)
    settings: dict[str, Any] = {"bias": bias is not None, "bidirectional": directions == 2}
    if op.kind == "RNN":
        settings["nonlinearity"] = nonlinearity
    x = build.tensor(op.required(0))
    if not isinstance(x, Traced):
        raise Undecided("works on a constant")
    backwards = op.get("direction", "forward") == "reverse"
    states = [_state(op.input(number), x, build) for number in ((5, 6) if op.kind == "LSTM" else (5,))]
    x = build.call(torch.flip, x, (0,)) if backwards else x
    inputs: list[Any] = [x]
    if any(state is not None for state in states):
        if any(state is None for state in states):
            raise Undecided("begins with one state that is given and one that is zero")
        inputs.append(states[0] if len(states) == 1 else tuple(states))
    y, last = build.layer(op, lambda: kind(weights.shape[2], hidden, **settings), found, *inputs)
    y = build.call(torch.flip, y, (0,)) if backwards else y
    split = build.call(Tensor.unflatten, y, 2, (directions, hidden))
    return (build.call(torch.transpose, split, 1, 2), *(last if isinstance(last, tuple) else (last,)))


def _require_plain(op: Op) -> str:
    """Refuse what a layer of torch.nn cannot do; returns the activation of an RNN."""
    if op.input(4) is not None:
        raise Undecided("takes the lengths of its sequences")
    if op.input(7) is not None or op.get("input_forget", 0) or "clip" in op.attributes:
        raise Undecided("has peepholes, a coupled input gate or a clip, which no layer of torch.nn has")
    if op.get("layout", 0):
        raise Undecided("takes the batch before the sequence")
    if op.kind == "GRU" and not op.get("linear_before_reset", 0):
        raise Undecided("applies its reset gate before the product (linear_before_reset = 0), and torch's GRU after it")
    usual = _USUAL[op.kind]
    given = [str(name).lower() for name in op.get("activations", usual)]
    named = {"relu", "tanh"} if op.kind == "RNN" else set()
    if given != usual * (len(given) // len(usual)) and not (len(set(given)) == 1 and set(given) <= named):
        raise Undecided(f"has the activations {', '.join(given)}")
    return given[0]


def _torch_weights(
    weights: Tensor, recurring: Tensor, bias: Tensor | None, order: tuple[int, ...], hidden: int
) -> dict[str, Tensor]:
    """Parameters by torch's names, from (directions, gates x hidden, …) in ONNX's order of gates."""

    def ordered(rows: Tensor) -> Tensor:
        gates = rows.split(hidden)
        return torch.cat([gates[place] for place in order])

    found = {}
    for place, suffix in enumerate(("_l0", "_l0_reverse")[: len(weights)]):
        found[f"weight_ih{suffix}"], found[f"weight_hh{suffix}"] = ordered(weights[place]), ordered(recurring[place])
        if bias is not None:
            halves = bias[place].chunk(2)
            found[f"bias_ih{suffix}"], found[f"bias_hh{suffix}"] = ordered(halves[0]), ordered(halves[1])
    return found


def _state(value: Value | None, x: Traced, build: Builder) -> Traced | Tensor | None:
    """An initial state (directions, batch, hidden); None if it is zero, the default."""
    if value is None or _is_zero(value, build):
        return None
    state = build.tensor(value)
    if isinstance(state, Tensor):
        return build.call(Tensor.expand, state, -1, build.size(x, 1), -1)  # type: ignore[no-any-return]
    return state


def _is_zero(value: Value, build: Builder) -> bool:
    """Whether a tensor is certainly zero: a constant, or a constant that is repeated for every sample."""
    if isinstance(value, Tensor):
        return not bool(value.any())
    if not isinstance(value, Traced):
        return False
    node = value.node
    if node.target is torch.full:
        return bool(node.args[1] == 0)
    if node.target == "expand" and getattr(node.args[0], "op", "") == "get_attr":
        return not bool(build.constant_at(str(node.args[0].target)).any())  # type: ignore[union-attr]
    return False
