"""What every layer costs: by hand for a small network, and in sum for networks of every kind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Product(nn.Module):
    """An operation on tokens (batch, 5, 6) with weights."""

    def __init__(self, operation: Callable[[Product, Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.vector, self.table = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(4, 6))
        self.experts = nn.Parameter(torch.randn(3, 6, 8))
        self.both = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, x)


def expert_of_each(net: Product, x: Tensor) -> Tensor:
    """The first of three experts for all tokens: each token is multiplied by one matrix only."""
    rows = x.reshape(-1, 6)[:, :4].contiguous()
    ends = torch.tensor([1, 1, 1], dtype=torch.int32) * rows.shape[0]
    return torch._grouped_mm(rows, net.experts[:, :4].contiguous(), offs=ends).reshape(x.shape[0], 5, 8)


PRODUCTS = {
    "matrix and vector": (lambda net, x: x @ net.vector, 5 * 6),
    "linear with a vector": (lambda net, x: F.linear(x, net.vector), 5 * 6),
    "bilinear": (lambda net, x: net.both(x, x), 5 * 3 * 6 * 6),
    "distances": (lambda net, x: torch.cdist(x, net.table.expand(len(x), 4, 6)), 5 * 4 * 6),
    "experts": (expert_of_each, 5 * 4 * 8),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_that_are_no_matrix_products_count(name):
    operation, macs = PRODUCTS[name]
    assert trace(Product(operation), torch.randn(2, 5, 6)).macs == macs
