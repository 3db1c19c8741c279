"""Channels that are taken apart into pieces (maxout, real and imaginary parts) go whole: every channel that stays keeps its pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "maxout": lambda y: y.view(y.shape[0], 8, 2, 8, 8).max(2)[0],
    "maxout by values": lambda y: y.view(y.shape[0], -1, 2, 8, 8).max(2).values,
    "amax": lambda y: y.unflatten(1, (8, 2)).amax(2),
    "the last axis": lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], 8, 8, 8, 2).amin(-1).permute(0, 3, 1, 2),
    "by number": lambda y: torch.mul(*(y.view(y.shape[0], 8, 2, 8, 8)[:, :, k] for k in (0, 1))),
    "unbind": lambda y: torch.mul(*y.view(y.shape[0], 8, 2, 8, 8).unbind(2)),
    "select": lambda y: torch.mul(*(y.view(y.shape[0], 8, 2, 8, 8).select(2, k) for k in (0, 1))),
    "moved": lambda y: torch.mul(*(y.view(y.shape[0], 8, 2, 8, 8).permute(0, 1, 3, 4, 2)[..., k] for k in (0, 1))),
}


class Pieces(nn.Module):
    def __init__(self, way: Callable[[Tensor], Tensor]):
        super().__init__()
        self.a, self.b, self.way = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 3, 1), way

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.way(self.a(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_pieces_stay_together(name: str) -> None:
    torch.manual_seed(0)
    net = Pieces(WAYS[name]).double().eval()
    net.a.weight[[2, 3, 8, 9, 12, 13, 14, 15]] *= 0.1
    small = shrink(trace(net, torch.randn(2, 3, 8, 8, dtype=torch.float64)), ratio=0.5)
    layer = small.report.layers[0]
    assert (layer.path, layer.each) == ("a", 2)
    assert layer.kept == (0, 1, 4, 5, 6, 7, 10, 11)
    assert small.value.graph_module.b.weight.shape == (3, 4, 1, 1)
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    kept = torch.tensor([1, 0, 1, 1, 0, 1, 0, 0])
    torch.testing.assert_close(small.value.graph_module(x), net.b(net.way(net.a(x)) * kept.view(-1, 1, 1)))
