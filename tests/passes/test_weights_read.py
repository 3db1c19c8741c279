"""Parameters that operations read beside the layers that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from tests.numerics.masked_reference import run_masked


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.way = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


@torch.no_grad()
def halved(net: nn.Module, *shape: int) -> ShrinkReport:
    """Halve a network and compare it with the masked one."""
    net = net.double().eval()
    model = trace(net, torch.randn(shape, dtype=torch.float64))
    small = shrink(model, ratio=0.5)
    x = torch.randn(3, *shape[1:], dtype=torch.float64)
    torch.testing.assert_close(small.value.graph_module(x), run_masked(model, small.report, x))
    return small.report


def scaled(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.o(F.linear(y, net.l.weight / net.l.weight.norm(), net.l.bias).relu())  # type: ignore[no-any-return]


def standardised(net: Any, x: Tensor) -> Tensor:
    weight = net.c.weight
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    spread = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1)
    y = F.conv2d(net.a(x).relu(), (weight - mean) / (spread + 1e-5), net.c.bias, padding=1)
    return net.o(y.relu())  # type: ignore[no-any-return]


def prototypes(net: Any, x: Tensor) -> Tensor:
    return net.o((-torch.cdist(net.a(x), net.p)).softmax(-1) @ net.p)  # type: ignore[no-any-return]


def rotated(net: Any, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    return net.o(y @ torch.linalg.qr(net.p)[0] + y @ net.p)  # type: ignore[no-any-return]


def test_a_weight_divided_by_its_norm() -> None:
    report = halved(Net(scaled, a=nn.Linear(6, 16), l=nn.Linear(16, 16), o=nn.Linear(16, 3)), 4, 6)
    assert report.widths == {"a": (16, 16), "linear": (16, 16), "o": (3, 3)}
    assert any(frozen.reason == "`norm` (norm) reads them in a way no rule covers" for frozen in report.frozen)


def test_a_weight_standardised_by_a_view() -> None:
    parts = {"a": nn.Conv2d(3, 8, 3, padding=1), "c": nn.Conv2d(8, 16, 3, padding=1), "o": nn.Conv2d(16, 3, 1)}
    assert halved(Net(standardised, **parts), 2, 3, 8, 8).widths["conv2d"] == (16, 8)


@pytest.mark.parametrize(("forward", "width"), [(prototypes, 8), (rotated, 16)])
def test_a_parameter_that_is_read_before_it_is_multiplied(forward: Callable[[Any, Tensor], Tensor], width: int) -> None:
    """Distances are followed through both tensors; a factorisation stays."""
    parts = {"a": nn.Linear(6, 16), "p": nn.Parameter(torch.randn(16, 16)), "o": nn.Linear(16, 3)}
    assert halved(Net(forward, **parts), 4, 6).widths["a"] == (16, width)


def test_ids_with_an_offset_for_each_table() -> None:
    """The axis of tables stays; merged with the columns of the tables, it must not stand in their way (DeepFM)."""

    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.o = nn.Embedding(30, 16), nn.Linear(48, 3)
            self.register_buffer("offsets", torch.tensor([0, 10, 20]))

        def forward(self, x: Tensor) -> Tensor:
            return self.o(self.e(x + self.offsets).view(-1, 48).relu())  # type: ignore[no-any-return]

    model = trace(Tables().double().eval(), torch.randint(0, 10, (4, 3)))
    small = shrink(model, ratio=0.5)
    assert small.report.widths["e"] == (16, 8)
    x = torch.randint(0, 10, (5, 3))
    with torch.no_grad():
        torch.testing.assert_close(small.value.graph_module(x), run_masked(model, small.report, x))
