"""Heads and channels that a reshape folds into the batch, as in `x.reshape(b * heads, n, d)`: they can be removed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.extract.instrument import instrument
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from tests.nets import unsettle
from tests.numerics.masked_reference import run_masked
from tests.passes.test_more_networks import HEADS, WIDTH, Maps, Tokens, Way, narrowed


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.leave = (nn.Linear(WIDTH, WIDTH) for _ in range(4))


class LengthFirst(Projections):
    """Fairseq's: (length, batch, channels) to (batch * heads, length, width of a head), with a mask."""

    def forward(self, x: Tensor) -> Tensor:
        mask = x.mean(2) > 0.2
        x = x.transpose(0, 1)
        n, b, c = x.size()
        d = c // HEADS
        q = (self.q(x) * d**-0.5).contiguous().view(n, b * HEADS, d).transpose(0, 1)
        k, v = (layer(x).contiguous().view(-1, b * HEADS, d).transpose(0, 1) for layer in (self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n)
        scores = scores.masked_fill(mask[:, None, None], -1e4).view(b * HEADS, n, n)
        found = torch.bmm(F.softmax(scores, -1), v)
        return self.leave(found.transpose(0, 1).contiguous().view(n, b, c)).transpose(0, 1)  # type: ignore[no-any-return]


class BatchFirst(Projections):
    """Old BERT's, with scores that are added to an empty tensor (Bloom)."""

    def fold(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        return x.reshape(b, n, HEADS, c // HEADS).permute(0, 2, 1, 3).reshape(b * HEADS, n, c // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.fold(layer(x)) for layer in (self.q, self.k, self.v))
        nothing = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
        found = torch.bmm(torch.baddbmm(nothing, q, k.mT, beta=0, alpha=0.5).softmax(-1), v)
        bh, n, d = found.shape
        found = found.reshape(bh // HEADS, HEADS, n, d).permute(0, 2, 1, 3).reshape(bh // HEADS, n, d * HEADS)
        return self.leave(found)  # type: ignore[no-any-return]


def blurred(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x - F.conv2d(x.reshape(b * c, 1, h, w), x.new_ones(1, 1, 3, 3) / 9, padding=1).view(b, c, h, w)


NETWORKS = {
    "length first": lambda: Tokens(LengthFirst()),
    "batch first": lambda: Tokens(BatchFirst()),
    "a filter for every channel": lambda: Maps(Way(blurred)),
}


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_they_are_removed_for_any_batch(name: str, samples: int) -> None:
    torch.manual_seed(0)
    net, x = unsettle(NETWORKS[name]()).double().eval(), torch.randn(5, 3, 16, 16, dtype=torch.float64)
    model = trace(net, x[:samples])
    narrowed(model, x[:samples])
    result = shrink(model, ratio=0.5)
    assert [frozen.reason for frozen in result.report.frozen if frozen.channels > 1] == ["an output of the network"]
    assert {after / before for path, (before, after) in result.report.widths.items() if path != "fc"} == {0.5}
    small, taken = result.value.graph_module, x if samples > 1 else x[:samples]
    torch.testing.assert_close(small(taken), run_masked(model, result.report, taken))
    torch.testing.assert_close(small(x), torch.cat([small(row[None]) for row in x]))


@torch.no_grad()
def test_all_channels_in_another_order_are_not_taken_by_the_examples_batch() -> None:
    def flipped(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return (x.reshape(b * c, 1, h, w).tanh().view(b, c, h, w) + 1).flip(1)[:, :8]

    torch.manual_seed(0)
    model = trace(Maps(Way(lambda x: F.pad(flipped(x), (0, 0, 0, 0, 0, 8)))).eval(), torch.randn(2, 3, 16, 16))
    narrow(model, kept={"inner:flip": range(WIDTH)})
    small, x = narrow(model, kept={"inner:flip": range(0, WIDTH, 2)}).value, torch.randn(5, 3, 16, 16)
    whole, got = (instrument(m, ["inner:flip"])(x)[0]["inner:flip"] for m in (model, small))
    torch.testing.assert_close(got, whole[:, ::2])
