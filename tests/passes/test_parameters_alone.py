"""Widths that no layer makes: tables of vectors that the code itself reads, multiplies and adds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked


class Graph(nn.Module):
    """LightGCN: the tables of users and items, spread over their graph; no layer has weights."""

    near: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(6, 16), nn.Embedding(9, 16)
        self.register_buffer("near", torch.rand(15, 15).softmax(1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        first = torch.cat([self.users.weight, self.items.weight])
        second = self.near @ first
        users, items = torch.split((first + second + self.near @ second) / 3, [6, 9])
        return (users[user] * items[item]).sum(-1, keepdim=True)


class Additive(nn.Module):
    """A small network of its own for each of ten columns, all in three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(10, 16)), nn.Parameter(torch.randn(10, 16))
        self.middle = nn.Parameter(torch.randn(10, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(torch.einsum("bfd,fde->bfe", torch.relu(x[..., None] * self.first), self.middle))
        return torch.einsum("bfd,fd->bf", hidden, self.last).sum(1, keepdim=True)


class Latents(nn.Module):
    """Six learned queries, stored with their number last: it is no width."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.enter, self.head = nn.Parameter(torch.randn(1, 16, 6)), nn.Linear(5, 16), nn.Linear(16, 3)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, queries = self.enter(x), self.queries.mT.expand(len(x), -1, -1)
        return self.head(self.attend(queries, x, x)[0].mean(1))  # type: ignore[no-any-return]


def test_tables_without_layers_are_narrowed_together() -> None:
    traced = trace(Graph().eval(), (torch.tensor([0, 1, 5]), torch.tensor([2, 8, 3])))
    result = shrink(traced, ratio=0.25)
    assert result.report.widths == {"users.weight": (16, 4), "items.weight": (16, 4)}
    shapes = {name: tuple(p.shape) for name, p in result.value.graph_module.named_parameters()}
    assert shapes == {"users.weight": (6, 4), "items.weight": (9, 4)}
    other = torch.tensor([4, 4, 2, 0]), torch.tensor([0, 7, 6, 5])
    torch.testing.assert_close(result.value.graph_module(*other), run_masked(traced, result.report, *other))


def test_the_channels_of_greatest_weight_stay() -> None:
    net = Graph().eval()
    with torch.no_grad():
        for table in (net.users, net.items):
            table.weight.copy_(torch.arange(1.0, 17).flip(0).expand_as(table.weight))
    report = shrink(trace(net, (torch.tensor([0]), torch.tensor([2]))), ratio=0.25).report
    assert {layer.kept for layer in report.layers} == {(0, 1, 2, 3)}


def test_a_width_between_a_parameter_and_a_product() -> None:
    x = torch.randn(4, 10)
    traced = trace(Additive().eval(), x)
    result = shrink(traced, ratio=0.5)
    shapes = {name: tuple(p.shape) for name, p in result.value.graph_module.named_parameters()}
    assert shapes == {"first": (10, 8), "middle": (10, 8, 8), "last": (10, 8)}
    torch.testing.assert_close(result.value.graph_module(x + 1), run_masked(traced, result.report, x + 1))


def test_numbers_of_queries_are_no_width() -> None:
    traced = trace(Latents().eval(), torch.randn(2, 7, 5))
    result = shrink(traced, ratio=0.5)
    assert dict(result.value.graph_module.named_parameters())["queries"].shape == (1, 16, 6)
    assert "queries" not in result.report.widths
