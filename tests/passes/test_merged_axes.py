"""Channels that share an axis with height or width: shrunk networks compute at other sizes what the same code, built half as wide, does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
