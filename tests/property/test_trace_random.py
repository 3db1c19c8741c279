"""Random networks, traced by every method: the graph computes what the module does, and the module stays as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest, mode, untouched
from indistill_fx.passes.capture.captured import Request
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.functionalize import functionalize
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes

WIDTH = 4


class Step(nn.Module):
    """One step of a random network: a map of width 4 in, one out; whatever real code does in between."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.act = nn.ReLU(inplace=True)
        with torch.no_grad():
            self.norm.running_mean.uniform_(-0.5, 0.5)
            self.norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return STEPS[self.kind](self, x)


def _tokens(step: Step, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    tokens = F.layer_norm(x.flatten(2).transpose(1, 2), (c,))
    return (tokens @ tokens.transpose(1, 2)).softmax(-1).bmm(tokens).transpose(1, 2).reshape(b, c, h, w)


def _decides(step: Step, x: Tensor) -> Tensor:
    if x.shape[2] > 3:
        x = step.conv(x)
    for k in range(x.shape[3] // 2):
        x = x * (1 + k)
    return x


def _writes(step: Step, x: Tensor) -> Tensor:
    y = step.conv(x)
    y += x
    z = torch.zeros_like(y)
    z[:, 1:] = y[:, :-1]
    z[:, 0] += 1
    return z


def _by_data(step: Step, x: Tensor) -> Tensor:
    return step.conv(x) if float(x.detach().mean()) > 0 else x * 0.5


STEPS: dict[str, Callable[[Step, Tensor], Tensor]] = {
    "conv": lambda s, x: s.act(s.norm(s.conv(x))),
    "residual": lambda s, x: s.act(x + s.norm(s.conv(x))),
    "twice": lambda s, x: s.conv(s.conv(x)),
    "concat": lambda s, x: s.conv(torch.cat(x.chunk(2, 1)[::-1], 1)),
    "dropout": lambda s, x: F.dropout(x, 0.3, s.training) * torch.rand(x.shape[0], 1, 1, 1, device=x.device),
    "last": lambda s, x: s.norm(x).permute(0, 2, 3, 1).mul(2).permute(0, 3, 1, 2),
    "resize": lambda s, x: F.interpolate(F.max_pool2d(x, 2, ceil_mode=True), size=x.shape[2:]),
    "tokens": _tokens,
    "decides": _decides,
    "writes": _writes,
    "by data": _by_data,
}
PURE = sorted(set(STEPS) - {"by data"})


def build(kinds: list[str]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[Step(kind) for kind in kinds], nn.Flatten(), nn.LazyLinear(3))


def largest_difference(module: nn.Module, graph_module: nn.Module, rows: int, training: bool) -> float:
    x = torch.randn(rows, WIDTH, 5, 6, generator=torch.Generator().manual_seed(rows))
    results = []
    with mode(module, training=training), torch.no_grad():
        for part in (module, graph_module):
            buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
            torch.manual_seed(1)
            results.append(part(x))
            for buffer, before in buffers:
                buffer.copy_(before)
    return float((results[0] - results[1]).abs().max() / results[0].abs().max())


quick = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.mark.filterwarnings("ignore:Lazy modules")
@quick
@given(
    st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=5),
    st.sampled_from(["teacher", "student"]),
    st.integers(1, 3),
)
def test_traces_compute_the_same(kinds, role, rows):
    module = build(kinds)
    x = torch.randn(rows, WIDTH, 5, 6)
    module(torch.randn(2, WIDTH, 5, 6))
    before = digest(module)
    traced = ifx.trace(module, x, role=role)
    assert digest(module) == before
    assert largest_difference(module, traced.graph_module, 4, role == "student") <= 1e-5
    assert (traced.report.method == "leaves") == ("by data" in kinds) or traced.report.method == "export"
    assert bool(traced.report.specialisations) == ("decides" in kinds) or traced.report.method == "export"
    assert set(traced.facts) >= set(traced.aliases)


@pytest.mark.filterwarnings("ignore:Lazy modules")
@settings(quick, max_examples=5)
@given(st.lists(st.sampled_from(PURE), min_size=1, max_size=4), st.booleans())
def test_the_later_methods_compute_the_same_on_their_own(kinds, training):
    module = build(kinds)
    module(torch.randn(2, WIDTH, 5, 6))
    module.train(training)
    for capture in (capture_shapes, capture_leaves, capture_exported):
        before = digest(module)
        with untouched(module):
            captured = functionalize(capture(Request(module, (torch.randn(2, WIDTH, 5, 6),))))
        assert digest(module) == before
        assert largest_difference(module, captured.graph_module, 4, training) <= 1e-5
