"""Operations that torch has under several names, or for convenience: channels go beside and along them as for the basic ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from tests.nets import unsettle
from tests.numerics.masked_reference import run_masked
from tests.passes.test_more_networks import narrowed


class Around(nn.Module):
    """Convolutions around an operation on two maps, which are read elsewhere as well."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.a, self.other, self.way = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), way
        self.b, self.first, self.second = nn.LazyConv2d(5, 1), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.a(x), self.other(x)
        out = self.b(self.way(x, y)).relu().mean((2, 3))
        return out + self.first(x.mean((2, 3))) + self.second(y.mean((2, 3)))  # type: ignore[no-any-return]


def pieces(parts: tuple[Tensor, ...], dim: int) -> Tensor:
    return torch.cat([parts[1] * 2, parts[0]], dim)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


def two_rows(x: Tensor, y: Tensor) -> Tensor:
    return x.index_copy(dim=2, index=torch.tensor([0, 3]), source=y[:, :, :2])


def entry_by_entry(x: Tensor, y: Tensor) -> Tensor:
    """Functions of one entry each that are seldom used, and conversions that leave all as it is."""
    z = x.sigmoid()
    special = torch.special.expit(z) + torch.special.ndtr(z) + torch.special.entr(z) + torch.special.xlog1py(z, z)
    rare = (
        torch.lgamma(z + 1)
        + torch.digamma(z + 1)
        + torch.i0(z)
        + torch.deg2rad(z)
        + torch.ldexp(z, z)
        + torch.nextafter(z, y)
    )
    same = torch.as_tensor(x).cpu() + x.resolve_conj().resolve_neg() + x.to_dense()
    compared = z.greater(0.4) | z.less_equal(0.1) | torch.isclose(z, y) | z.not_equal(z)
    return (
        special
        + rare
        + same
        + torch.float_power(z, 2)
        + compared
        + (4 * z).byte()
        + (4 * z).char().short()
        + torch.fill(y, 0.5) * z
    )


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "entry by entry": entry_by_entry,
    "expand to a shape": lambda x, y: x * pooled(y).expand(x.shape),
    "expand to a size, alone": lambda x, y: pooled(y).expand(x.size()),
    "broadcast_to a shape": lambda x, y: x * pooled(y).broadcast_to(x.shape),
    "broadcast_to sizes": lambda x, y: x * torch.broadcast_to(pooled(y), (x.shape[0], 8, 4, 4)),
    "broadcast_to named sizes": lambda x, y: torch.broadcast_to(pooled(y), size=(-1, 8, 4, 4)),
    "swapdims": lambda x, y: x.swapdims(1, 3).swapdims(dim0=-1, dim1=1) + y,
    "unsafe_chunk": lambda x, y: pieces(torch.unsafe_chunk(x, 2, 1), 1) + y,
    "unsafe_split": lambda x, y: pieces(x.unsafe_split(2, dim=2), 2) + y,
    "unsafe_split_with_sizes": lambda x, y: pieces(torch.unsafe_split_with_sizes(x, [3, 5], 1), 1) * 2,
    "narrow_copy": lambda x, y: torch.narrow_copy(x, 2, 1, 2) + torch.narrow_copy(y, 1, 0, 8)[:, :, :2],
    "hsplit": lambda x, y: pieces(torch.hsplit(x, [3]), 1) + 1,
    "dsplit": lambda x, y: pieces(x.dsplit(2), 2) + y,
    "vsplit": lambda x, y: torch.cat([torch.vsplit(x, 1)[0], y], 1),
    "hstack": lambda x, y: torch.hstack((x, y * 2)),
    "dstack": lambda x, y: torch.dstack([x, y]),
    "vstack": lambda x, y: torch.vstack([x, y]).unflatten(0, (2, -1)).sum(0),
    "column_stack": lambda x, y: torch.column_stack([x, pooled(y).expand_as(x)]),
    "tile": lambda x, y: torch.tile(x, (2, 1)) + x.tile(1, 1, 2, 1),
    "slice_scatter of rows": lambda x, y: x.slice_scatter(y[:, :, :2] * 2, -2, 1, 3),
    "slice_scatter of channels": lambda x, y: torch.slice_scatter(x, y[:, :3], dim=1, start=2, end=8, step=2),
    "select_scatter of a row": lambda x, y: torch.select_scatter(x, y[:, :, 3], 2, index=-1),
    "select_scatter of a channel": lambda x, y: x.select_scatter(y.mean(1), 1, 2),
    "roll of rows": lambda x, y: torch.roll(x, (1, -2), (2, 3)) + y,
    "roll of channels": lambda x, y: x.roll(3, 1) + y,
    "roll of both": lambda x, y: torch.roll(x, shifts=(-5, 1), dims=(1, -1)) * y,
    "diff": lambda x, y: x.diff() + torch.diff(y, 1, 3),
    "diff with a row before": lambda x, y: torch.diff(x, dim=2, prepend=y[:, :, :1]),
    "index_copy": two_rows,
    "nanmean": lambda x, y: x - y.nanmean((2, 3), keepdim=True),
    "tensordot over channels": lambda x, y: torch.tensordot(x, torch.ones(8, 3, dtype=x.dtype), ([1], [0])).permute(
        0, 3, 1, 2
    ),
    "tensordot over rows": lambda x, y: torch.tensordot(x, torch.arange(16.0, dtype=x.dtype).view(4, 4), dims=1) + y,
}


def traced(way: Callable[[Tensor, Tensor], Tensor]) -> tuple[ifx.TracedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    net = Around(way).double()
    net(x)  # the layer behind the operation takes as many channels as come
    return ifx.trace(unsettle(net).eval(), x), x


@pytest.mark.parametrize("name", WAYS)
def test_half_of_the_channels_go(name: str) -> None:
    model, x = traced(WAYS[name])
    narrowed(model, x)
    small = ifx.shrink(model, ratio=0.5)
    assert [frozen.reason for frozen in small.report.frozen] == ["an output of the network"]
    assert small.report.widths["a"] == small.report.widths["other"] == (8, 4)
    with torch.no_grad():
        expected, got = run_masked(model, small.report, x), small.value.graph_module(x)
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert torch.equal(source_of(small.value).build().eval()(x), got)
