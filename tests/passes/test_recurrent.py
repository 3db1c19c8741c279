"""Recurrent layers and cells lose hidden units together with what their states start from, over all steps and calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from indistill_fx.errors import PassError
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning import recurrent
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from tests.numerics.masked_reference import run_masked

WIDTH, STEPS = 12, 5
Op = Callable[[nn.Module, Tensor], Tensor]


class Steps(nn.Module):
    """A linear layer, something recurrent over five steps, and a linear layer."""

    def __init__(self, operation: Op, out: int = WIDTH, **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.enter, self.leave, self.operation = nn.Linear(6, WIDTH), nn.Linear(out, 4), operation
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.operation(self, self.enter(x).tanh()))  # type: ignore[no-any-return]


def halved(module: nn.Module, *inputs: Tensor, ratio: float = 0.5) -> ShrinkReport:
    """Shrink, compare with the masked original, and run a training step."""
    module = module.double().eval()
    inputs = inputs or (torch.randn(2, STEPS, 6, dtype=torch.float64),)
    model = trace(module, inputs)
    result = shrink(model, ratio=ratio)
    small = result.value.graph_module
    with torch.no_grad():
        got, expected = small(*inputs), run_masked(model, result.report, *inputs)
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert trace(small, inputs).macs == result.value.macs == result.report.macs[1]
    _, values = run_keeping(small, list(result.value.facts), *inputs)
    assert {name: tuple(value.shape) for name, value in values.items()} == {
        name: known.shape for name, known in result.value.facts.items() if name in values
    }
    small.train()(*inputs).pow(2).mean().backward()
    return result.report


def stepping(m: nn.Module, x: Tensor) -> Tensor:
    h, found = torch.zeros(x.shape[0], m.cell.hidden_size, dtype=x.dtype), []
    for k in range(x.shape[1]):
        h = m.cell(x[:, k], h)
        found.append(h)
    return torch.stack(found, 1)


def unbound(m: nn.Module, x: Tensor) -> Tensor:
    state, found = None, []
    for step in x.unbind(1):
        state = m.cell(step, state)
        found.append(state[0] if isinstance(state, tuple) or m.cell.weight_hh.shape[0] == 4 * WIDTH else state)
    return torch.stack(found, 1)


def two_states(m: nn.Module, x: Tensor) -> Tensor:
    h = x.new_zeros(x.size(0), WIDTH)
    c, found = torch.zeros_like(h), []
    for step in x.unbind(1):
        h, c = m.cell(step, (h, c))
        found.append(h + m.peek(c))
    return torch.stack(found, 1)


def decoded(m: nn.Module, x: Tensor) -> Tensor:
    _, state = m.reads(x)
    return m.writes(x.flip(1), state)[0]  # type: ignore[no-any-return]


def plain_by_hand(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    for step in x.unbind(1):
        h = (m.reads(step) + m.repeats(h)).tanh()
    return h


def gru_by_hand(m: nn.Module, x: Tensor) -> Tensor:
    h, found = x.new_zeros(x.size(0), WIDTH), []
    for k in range(x.size(1)):
        of_x, of_h = m.reads(x[:, k]).chunk(3, -1), m.repeats(h).chunk(3, -1)
        update, reset = (of_x[0] + of_h[0]).sigmoid(), (of_x[1] + of_h[1]).sigmoid()
        h = (1 - update) * (of_x[2] + reset * of_h[2]).tanh() + update * h
        found.append(h)
    return torch.stack(found, 1)


def convolutional(m: nn.Module, x: Tensor) -> Tensor:
    """A ConvLSTM on maps of two by three places."""
    h = torch.zeros(x.shape[0], WIDTH, 2, 3, dtype=x.dtype)
    c, found = torch.zeros_like(h), []
    for step in x.unbind(1):
        below = torch.cat([step[:, :, None, None].expand(-1, -1, 2, 3), h], 1)
        i, f, o, g = m.gates(below).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(h.mean((2, 3)))
    return torch.stack(found, 1)


def convolved(m: nn.Module, x: Tensor) -> Tensor:
    h, found = x.new_zeros(x.size(0), WIDTH, 5), []
    for step in x.unbind(1):
        h = (m.repeats(h) + m.reads(step).unsqueeze(2)).tanh()
        found.append(h.amax(2))
    return torch.stack(found, 1)


def gated(m: nn.Module, x: Tensor, *, reset: bool) -> Tensor:
    """A GRU whose gates read input and state as one tensor, so that several layers read the zeros it starts from."""
    h, found = x.new_zeros(x.size(0), WIDTH), []
    for step in x.unbind(1):
        both = torch.cat([step, h], 1)
        update = m.updates(both).sigmoid()
        new = m.reads(torch.cat([step, update * h], 1) if reset else both).tanh()
        h = (1 - update) * new + update * h
        found.append(h)
    return torch.stack(found, 1)


def normalised(m: nn.Module, x: Tensor) -> Tensor:
    h, found = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype), []
    for step in x.unbind(1):
        h = (m.reads(step) + m.repeats(m.norm(h))).tanh()
        found.append(h)
    return torch.stack(found, 1)


def read_twice(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    factor, found = (h + 0.5).sigmoid(), []
    for step in x.unbind(1):
        h = (m.reads(step) + m.repeats(h) * factor).tanh()
        found.append(h)
    return torch.stack(found, 1)


def packed(m: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.full((x.shape[0],), STEPS)
    steps, (h, _) = m.cells(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    return pad_packed_sequence(steps, batch_first=True, total_length=STEPS)[0] + h[-1][:, None]


def gates() -> dict[str, nn.Module]:
    return {"updates": nn.Linear(2 * WIDTH, WIDTH), "reads": nn.Linear(2 * WIDTH, WIDTH)}


GOES: dict[str, Callable[[], Steps]] = {
    "gru cell": lambda: Steps(stepping, cell=nn.GRUCell(WIDTH, WIDTH)),
    "rnn cell": lambda: Steps(stepping, cell=nn.RNNCell(WIDTH, WIDTH)),
    "rnn cell with relu": lambda: Steps(stepping, cell=nn.RNNCell(WIDTH, WIDTH, nonlinearity="relu", bias=False)),
    "gru cell from nothing": lambda: Steps(unbound, cell=nn.GRUCell(WIDTH, WIDTH)),
    "lstm cell, state as a whole": lambda: Steps(unbound, cell=nn.LSTMCell(WIDTH, WIDTH)),
    "lstm cell, two states": lambda: Steps(two_states, cell=nn.LSTMCell(WIDTH, WIDTH), peek=nn.Linear(WIDTH, WIDTH)),
    "from zeros": lambda: Steps(
        lambda m, x: m.cells(x, torch.zeros(1, x.shape[0], WIDTH, dtype=x.dtype))[0],
        cells=nn.GRU(WIDTH, WIDTH, batch_first=True),
    ),
    "from two times zeros": lambda: Steps(
        lambda m, x: m.cells(x, (x.new_zeros(2, x.shape[0], WIDTH), x.new_zeros(2, x.shape[0], WIDTH)))[0],
        cells=nn.LSTM(WIDTH, WIDTH, 2, batch_first=True),
    ),
    "from what a layer makes": lambda: Steps(
        lambda m, x: m.cells(x, m.start(x.mean(1)).tanh().unsqueeze(0))[0],
        cells=nn.GRU(WIDTH, WIDTH, batch_first=True),
        start=nn.Linear(WIDTH, WIDTH),
    ),
    "from what is learned": lambda: Steps(
        lambda m, x: m.cells(x, m.start.expand(-1, x.shape[0], -1).contiguous())[0],
        cells=nn.RNN(WIDTH, WIDTH, batch_first=True),
        start=nn.Parameter(torch.randn(1, 1, WIDTH)),
    ),
    "encoder and decoder": lambda: Steps(
        decoded, reads=nn.GRU(WIDTH, WIDTH, batch_first=True), writes=nn.GRU(WIDTH, WIDTH, batch_first=True)
    ),
    "encoder and decoder of two states": lambda: Steps(
        decoded, reads=nn.LSTM(WIDTH, WIDTH, batch_first=True), writes=nn.LSTM(WIDTH, WIDTH, batch_first=True)
    ),
    "plain, by hand": lambda: Steps(plain_by_hand, reads=nn.Linear(WIDTH, WIDTH), repeats=nn.Linear(WIDTH, WIDTH)),
    "gru by hand": lambda: Steps(gru_by_hand, reads=nn.Linear(WIDTH, 3 * WIDTH), repeats=nn.Linear(WIDTH, 3 * WIDTH)),
    "convolutional lstm": lambda: Steps(convolutional, gates=nn.Conv2d(2 * WIDTH, 4 * WIDTH, 3, padding=1)),
    "convolution alone": lambda: Steps(
        convolved, reads=nn.Linear(WIDTH, WIDTH), repeats=nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
    ),
    "gates that read one tensor": lambda: Steps(partial(gated, reset=False), **gates()),
    "gates that read two tensors": lambda: Steps(partial(gated, reset=True), **gates()),
    "a norm of the state": lambda: Steps(
        normalised, reads=nn.Linear(WIDTH, WIDTH), repeats=nn.Linear(WIDTH, WIDTH), norm=nn.LayerNorm(WIDTH)
    ),
    "zeros that are read twice": lambda: Steps(
        read_twice, reads=nn.Linear(WIDTH, WIDTH), repeats=nn.Linear(WIDTH, WIDTH)
    ),
    "packed": lambda: Steps(packed, cells=nn.LSTM(WIDTH, WIDTH, batch_first=True)),
}


@pytest.mark.parametrize("name", GOES)
def test_hidden_units_go(name: str) -> None:
    torch.manual_seed(0)
    report = halved(GOES[name]())
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    for path, (before, after) in report.widths.items():
        assert after == (4 if path == "leave" else before // 2), path


class Given(Steps):
    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        return self.leave(self.cells(self.enter(x), start)[0])  # type: ignore[no-any-return]


def test_a_state_that_is_given_from_outside_keeps_all_units() -> None:
    torch.manual_seed(0)
    module = Given(unbound, cells=nn.GRU(WIDTH, WIDTH, batch_first=True))
    inputs = torch.randn(2, STEPS, 6, dtype=torch.float64), torch.randn(1, 2, WIDTH, dtype=torch.float64)
    report = halved(module, *inputs)
    assert report.widths == {"enter": (WIDTH, WIDTH // 2), "cells": (WIDTH, WIDTH), "leave": (4, 4)}
    assert "`cells` starts from a fixed state" in {frozen.reason for frozen in report.frozen}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 5]),
    st.sampled_from([0.25, 0.5, 0.8]),
)
def test_any_layer(
    kind: type[nn.RNNBase], layers: int, both: bool, bias: bool, start: bool, projected: int, ratio: float
) -> None:
    torch.manual_seed(0)
    size = projected if kind is nn.LSTM else 0
    more = {"proj_size": size} if size else {}
    cells = kind(WIDTH, 8, layers, bias=bias, bidirectional=both, batch_first=True, **more)
    out = size or 8

    def run(m: nn.Module, x: Tensor) -> Tensor:
        states = [x.new_zeros(layers * (1 + both), x.shape[0], n) for n in (out, 8)]
        given = ((tuple(states) if kind is nn.LSTM else states[0]),) if start else ()
        return m.cells(x, *given)[0]  # type: ignore[no-any-return]

    report = halved(Steps(run, out * (1 + both), cells=cells), ratio=ratio)
    assert report.widths["enter"][1] == round(WIDTH * ratio)
    assert report.widths["cells"][1] == (8 if size else round(8 * ratio))


def test_the_comparison_sees_a_state_that_starts_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the checks above: what a state starts from is cut, but not at the hidden units."""
    tie = recurrent.Coupling.tie
    monkeypatch.setattr(
        recurrent.Coupling, "tie", lambda self, a, b, why: tie(self, a, b[::-1] if "starts" in why else b, why)
    )
    with pytest.raises(PassError, match="off by"):
        halved(GOES["from what a layer makes"]())
