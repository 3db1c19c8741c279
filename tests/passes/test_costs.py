"""What every layer costs: by hand for a small network, and in sum for networks of every kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.structure.costs import LayerCost, layer_costs


class Shared(nn.Module):
    """A convolution that is called twice, one with the same weight, a parameter, and a product without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.tied = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.tied.weight = self.first.weight
        self.mix = nn.Parameter(torch.randn(3, 4))
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        x = self.tied(self.first(self.first(x)))
        return self.out((x.flatten(2).transpose(1, 2) @ self.mix).mean(1))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_layer_counts_all_its_calls_and_what_it_shares_once(role):
    assert layer_costs(trace(Shared(), torch.randn(2, 3, 6, 6), role=role)) == [
        LayerCost("first", "conv", (3, 6, 6), 81, 2 * 81 * 36),
        LayerCost("tied", "conv", (3, 6, 6), 0, 81 * 36),
        LayerCost("mix", "parameter", (3, 4), 12, 0),
        LayerCost("matmul", "matmul", (36, 4), 0, 36 * 12),
        LayerCost("out", "linear", (5,), 25, 20),
    ]


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.recurrent = nn.GRU(8, 4, batch_first=True)
        self.out = nn.Linear(4, 5)

    def forward(self, x):
        return self.out(self.recurrent(self.block(x))[0][:, -1])


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_together_the_layers_have_what_the_network_has(role):
    module = Attending()
    traced = trace(module, torch.randn(2, 6, 8), role=role)
    costs = layer_costs(traced)
    assert sum(cost.parameters for cost in costs) == sum(parameter.numel() for parameter in module.parameters())
    assert sum(cost.macs for cost in costs) == traced.macs
