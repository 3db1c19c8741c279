"""Fused convolutions compute the same, take in exactly what the rules say, and step aside where they do not apply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.fused_conv import FusedConv, fuse_convolutions
from tests.nets import Residual, images, seeded


def frozen(module: nn.Module, taps: list[str], x: torch.Tensor):
    traced = ifx.trace(module.eval(), x, role="teacher")
    return fold(cut(traced, taps).value).value, traced.facts


def fused(graph) -> list[FusedConv]:
    return [part for part in graph.modules() if isinstance(part, FusedConv)]


def test_a_residual_network_keeps_its_features():
    x, taps = images(4), ["layer1", "layer2", "layer3"]
    graph, facts = frozen(seeded(Residual), taps, x)
    with torch.no_grad():
        before = graph(x)[0]
        relus = sum(type(part) is nn.ReLU for part in graph.modules())
        result = fuse_convolutions(graph, facts)
        done, graph = result.report.done, result.value
        after = graph(x)[0]
    taken = [name for entry in done for name in entry.partition(" one call with ")[2].split(", ") if name]
    assert len(taken) > relus > 0
    assert not [part for part in graph.modules() if type(part) in (nn.Conv2d, nn.ReLU)]
    sums = [node for node in graph.graph.nodes if node.op == "call_module" and len(node.args) == 2]
    assert len(sums) == sum(name.startswith("add") for name in taken) == 6
    for tap in taps:
        torch.testing.assert_close(after[tap], before[tap], rtol=1e-4, atol=1e-5)
        assert after[tap].is_contiguous()


@pytest.mark.parametrize("how", ["gradient", "double", "autocast"])
def test_elsewhere_the_stock_operations_run(how, monkeypatch):
    x = images(2)
    graph, facts = frozen(seeded(Residual), ["layer3"], x)
    plain, _ = frozen(seeded(Residual), ["layer3"], x)
    graph = fuse_convolutions(graph, facts).value
    monkeypatch.setattr(
        FusedConv, "_applies", lambda self, x, own=FusedConv._applies: own(self, x) and pytest.fail(how)
    )
    if how == "double":
        graph, plain, x = graph.double(), plain.double(), x.double()
    x.requires_grad_(how == "gradient")
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        torch.testing.assert_close(graph(x)[0]["layer3"], plain(x)[0]["layer3"])


class Joined(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1, **options), nn.Conv2d(4, 1, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        first = self.first(x)
        return self.relu(self.second(self.relu(first)) + first)


@pytest.mark.parametrize(
    ("options", "convolutions"),
    [({}, ["first", "second"]), ({"padding_mode": "reflect"}, ["second"])],
)
def test_sums_that_broadcast_and_values_that_others_read_stay(options, convolutions):
    x = images(2)
    graph, facts = frozen(seeded(lambda: Joined(**options)), ["relu@2"], x)
    with torch.no_grad():
        before = graph(x)[0]["relu@2"]
        result = fuse_convolutions(graph, facts)
        graph = result.value
        assert sorted(result.report.done) == [f"{name}: one oneDNN call" for name in convolutions]
        assert len(fused(graph)) == len(convolutions)
        torch.testing.assert_close(graph(x)[0]["relu@2"], before)


def test_a_convolution_that_still_learns_is_left_alone():
    traced = ifx.trace(seeded(Residual), images(2), role="student")
    result = fuse_convolutions(cut(traced, ["layer1"]).value, traced.facts)
    assert result.report.done == ()
    assert not fused(result.value)
