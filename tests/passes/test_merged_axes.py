"""Channels that share an axis with height or width: shrunk networks compute at other sizes what the same code, built half as wide, does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import PassError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from indistill_fx.traced import TracedModel
from tests.numerics.masked_reference import run_masked

Operation = Callable[[Any, Tensor], Tensor]


class Between(nn.Module):
    """Two convolutions and something between them."""

    def __init__(self, operation: Operation, width: int = 8):
        super().__init__()
        self.a, self.b, self.operation = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 4, 1), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self, self.a(x).relu()))  # type: ignore[no-any-return]


def halves(operation: Operation, *, example: tuple[int, ...] = (2, 3, 8, 8)) -> tuple[TracedModel, Any, nn.Module]:
    """A network, its half (filters 0, 3, 4 and 6 go), and the same code built half as wide with the weights that stay."""
    torch.manual_seed(0)
    net = Between(operation).double().eval()
    with torch.no_grad():
        net.a.weight[[0, 3, 4, 6]] *= 0.1
    model = trace(net, torch.randn(example, dtype=torch.float64))
    small = shrink(model, ratio=0.5)
    assert small.report.layers[0].kept == (1, 2, 5, 7)
    half = Between(operation, 4).double().eval()
    half.load_state_dict(small.value.graph_module.state_dict())
    return model, small, half


def rows_and_channels(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.permute(0, 2, 3, 1).reshape(b, h, -1)
    return (z / z.norm(dim=-1, keepdim=True)).view(b, h, w, c).permute(0, 3, 1, 2)


def channels_and_rows(net: Any, y: Tensor) -> Tensor:
    return F.normalize(y.flatten(1), dim=1).view(y.shape)


@pytest.mark.parametrize("operation", [rows_and_channels, channels_and_rows])
@torch.no_grad()
def test_the_masked_network_at_other_sizes(operation: Operation) -> None:
    model, small, half = halves(operation)
    for size in ((2, 3, 8, 8), (3, 3, 8, 16), (1, 3, 12, 6)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(run_masked(model, small.report, x), half(x))


@torch.no_grad()
def test_the_masked_network_on_more_axes_is_refused() -> None:
    model = trace(nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3)).eval(), torch.randn(4, 6))
    report: ShrinkReport = shrink(model, ratio=0.5).report
    with pytest.raises(PassError, match="has 3 axes here, and 2 in the example"):
        run_masked(model, report, torch.randn(3, 5, 6))


@torch.no_grad()
def test_the_masked_network_where_the_example_does_not_say_which_entries_stay() -> None:
    def both_ends(net: Any, y: Tensor) -> Tensor:
        z = torch.cat([y.flatten(1), y.mean((2, 3))], 1)
        return y * z.softmax(1).amax(1).view(-1, 1, 1, 1)

    model, small, _ = halves(both_ends)
    with pytest.raises(PassError, match="does not follow from the example"):
        run_masked(model, small.report, torch.randn(2, 3, 4, 4, dtype=torch.float64))


def softmax(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.reshape(-1, c * h, w).softmax(1).view(b, c, h, w)


def normalized(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return F.normalize(y.view(-1, c * h * w), dim=1).view(b, c, h, w)


def last_first(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.permute(0, 2, 3, 1).reshape(-1, w * c)
    return (z / z.norm(dim=-1, keepdim=True)).view(b, h, w, c).permute(0, 3, 1, 2)


def standardised(net: Any, y: Tensor) -> Tensor:
    z = y.view(-1, y.size(1) * y.size(2) * y.size(3))
    return ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-5)).view(y.shape)


def counted(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return F.normalize(y.view(b, y.numel() // b), dim=1).view(b, c, h, w)


def by_hand(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return F.normalize(y.reshape(-1, net.a.out_channels * h * w), dim=1).view(b, c, h, w)


def expanded(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return (y.view(b, c * h, w) * y.mean((1, 2)).unsqueeze(1).expand(b, c * h, w)).view(b, c, h, w)


def repeated(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return (y.view(b, c * h, w) * y.mean((1, 2)).unsqueeze(1).repeat(1, c * h, 1)).view(b, c, h, w)


def filled(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return (y.reshape(b, c * h, w) + torch.full((b, c * h, w), 0.1)).view(b, c, h, w)


def unflattened(net: Any, y: Tensor) -> Tensor:
    _, c, h, w = y.shape
    return y.flatten(1).softmax(1).unflatten(1, (c * h, w)).unflatten(1, (c, h))


def rows_with_channels(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.permute(0, 2, 1, 3).reshape(b, h, c * w).view(b, h, c, w).permute(0, 2, 1, 3)


def layer_norm(net: Any, y: Tensor) -> Tensor:
    z = y.tanh()
    return F.layer_norm(y, y.shape[1:]) + F.layer_norm(z, z.size()[-3:])


def read_back(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.reshape(b, c * h, w).softmax(1)
    return z.reshape(z.shape[0], z.shape[1] // h, h, z.size(2))


def read_whole(net: Any, y: Tensor) -> Tensor:
    z = y.flatten(1).softmax(1)
    return z.view(-1, z.shape[1]).reshape(y.shape)


MERGED = [
    layer_norm, read_back, read_whole,
    softmax, normalized, last_first, standardised, counted, by_hand, expanded, repeated, filled, unflattened, rows_with_channels,
]  # fmt: skip


@pytest.mark.parametrize("operation", MERGED)
@torch.no_grad()
def test_sizes_of_channels_and_places(operation: Operation) -> None:
    _, small, half = halves(operation)
    source = source_of(small.value).build().double().eval()
    for size in ((2, 3, 8, 8), (2, 3, 16, 8), (3, 3, 8, 16), (1, 3, 6, 10)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(small.value.graph_module(x), half(x))
        torch.testing.assert_close(source(x), half(x))


@pytest.mark.parametrize("operation", MERGED)
@torch.no_grad()
def test_sizes_of_five_channels_of_eight(operation: Operation) -> None:
    """A share that is no whole number."""
    small = shrink(trace(Between(operation).eval(), torch.randn(2, 3, 8, 8)), widths={"a": 5}).value.graph_module
    narrow = Between(operation, 5).eval()
    narrow.load_state_dict(small.state_dict())
    for size in ((2, 3, 8, 8), (3, 3, 6, 10)):
        x = torch.randn(size)
        torch.testing.assert_close(small(x), narrow(x))


def test_sizes_of_channels_and_places_with_a_large_example() -> None:
    halves(rows_with_channels, example=(2, 3, 64, 64))  # it is compared on crops


def test_channels_that_are_left_flow_into_a_size() -> None:
    code = halves(normalized)[1].value.graph_module.code
    assert "4 * getitem_2" in code and "8" not in code


def every_second(net: Any, y: Tensor) -> Tensor:
    return y * y.flatten(1, 2)[:, ::2].mean((1, 2)).view(-1, 1, 1, 1)


def two_parts(net: Any, y: Tensor) -> Tensor:
    first, second = y.flatten(1, 2).relu().chunk(2, 1)
    return y * (first * second).mean((1, 2)).view(-1, 1, 1, 1)


def one_entry(net: Any, y: Tensor) -> Tensor:
    return y * y.flatten(1)[:, 70].view(-1, 1, 1, 1)


def shuffled(net: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.flatten(1).view(b, c, h * w).transpose(1, 2).reshape(b, -1)
    return y * F.normalize(z.cumsum(1), dim=1).amax(1).view(-1, 1, 1, 1)


def written(net: Any, y: Tensor) -> Tensor:
    z = y.flatten(1).clone()
    z[:, :40] = 0
    return z.view(y.shape)


@pytest.mark.parametrize("operation", [every_second, two_parts, one_entry, shuffled, written])
@torch.no_grad()
def test_parts_of_channels_and_places_keep_the_channels(operation: Operation) -> None:
    torch.manual_seed(0)
    model = trace(Between(operation).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
    small = shrink(model, ratio=0.5)
    assert small.report.widths["a"] == (8, 8)
    assert any("beside places" in frozen.reason for frozen in small.report.frozen)
    x = torch.randn(2, 3, 16, 10, dtype=torch.float64)
    torch.testing.assert_close(small.value.graph_module(x), model.graph_module(x))


@torch.no_grad()
def test_parts_of_channels_beside_heads_of_known_width_go() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            b, n, _ = x.shape
            y = self.a(x)
            heads = y.view(b, n, 4, y.shape[2] // 4).transpose(1, 2).softmax(-1)
            first, second = heads.transpose(1, 2).reshape(b, n, 16).chunk(2, -1)
            return self.b(first * second)  # type: ignore[no-any-return]

    model = trace(Halves().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64))
    assert shrink(model, ratio=0.5).report.widths["a"] == (16, 8)
