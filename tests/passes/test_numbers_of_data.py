"""Numbers that a forward takes out of its input (`lengths.max().item()`) are computed anew by the graph, and decide nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import FrontendError
from indistill_fx.passes.capture.trace import trace


def by_int_of_item(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(torch.max(lengths).item())  # as torchaudio's Conformer has it
    return x, torch.arange(longest, dtype=lengths.dtype).expand(len(x), longest) >= lengths.unsqueeze(1)


def by_item(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    longest = lengths.max().long().item()  # as SpeechBrain has it
    return x, torch.arange(longest)[None].repeat(x.shape[0], 1) >= lengths[:, None]


def by_int(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(lengths.max())
    return x, torch.arange(0, longest)[None] >= lengths[:, None]


def by_shares(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    shares = lengths / lengths.max()  # relative lengths, as SpeechBrain's batches have them
    whole = torch.round(shares * x.shape[1]).long()
    return x, torch.arange(int(whole.max()))[None] >= whole[:, None]


def cut(x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(lengths.max())
    return x[:, :longest], torch.arange(longest)[None] >= lengths[:, None]


class Encoder(nn.Module):
    """An encoder of padded sequences (batch, time, 8) of known lengths."""

    def __init__(self, padding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 16), nn.BatchNorm1d(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)
        self.padding = padding

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x, mask = self.padding(x, lengths)
        h = self.norm(self.first(x).relu().transpose(1, 2)).transpose(1, 2)
        h = h + self.attention(h, h, h, key_padding_mask=mask)[0]
        return self.head(h.masked_fill(mask[..., None], 0).sum(1) / lengths[:, None])  # type: ignore[no-any-return]


EXAMPLE = (torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 12, 9, 12]))
OTHER = (torch.randn(3, 9, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([4, 9, 1]))


@pytest.mark.parametrize("padding", [by_int_of_item, by_item, by_int, by_shares, cut])
def test_lengths_are_read_anew(padding: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    module = Encoder(padding).eval()
    nn.init.normal_(module.norm.running_mean), nn.init.uniform_(module.norm.running_var, 0.5, 2)
    traced = trace(module, EXAMPLE)
    assert traced.report.leaves == traced.report.specialisations == ()
    torch.testing.assert_close(traced.graph_module(*OTHER), module(*OTHER))
    small = ifx.shrink(traced, ratio=0.5).value
    assert small.macs < 0.4 * traced.macs
    torch.testing.assert_close(source_of(small).build().eval()(*OTHER), small.graph_module(*OTHER), rtol=0, atol=0)


def test_an_encoder_of_padded_sequences_is_exported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = ifx.export_onnx(Encoder(by_int_of_item).eval(), tmp_path / "a.onnx", EXAMPLE)
    assert {row.batch_size for row in written.parity} == {
        1,
        7,
        64,
    }  # row 1 is the longest, to which all others are padded


class Between(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.head, self.function = nn.Linear(8, 16), nn.Linear(16, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.first(x)))  # type: ignore[no-any-return]


def written_later(h: Tensor) -> Tensor:
    largest = h.abs().max()
    number = int(largest.item() * 100)
    largest.mul_(2)
    return h / number + largest


FINE: list[Callable[[Tensor], Tensor]] = [
    lambda h: h / h.abs().max().item(),
    lambda h: h / float(h.detach().abs().max()),
    lambda h: h * round(h.abs().max().item(), 2),
    lambda h: h * (float(h.detach().mean()) > 0),
    lambda h: h + int(h.sum()) % 3,
    written_later,
]


@pytest.mark.parametrize("function", FINE, ids=map(str, range(len(FINE))))
@pytest.mark.parametrize("inside", [False, True])
def test_numbers_are_computed_anew(function: Callable[[Tensor], Tensor], inside: bool) -> None:
    torch.manual_seed(0)
    module = (nn.Sequential(Between(function), nn.Linear(5, 5)) if inside else Between(function)).eval()
    traced = trace(module, torch.randn(4, 8))
    assert traced.report.leaves == traced.report.specialisations == ()
    for scale in (0.1, 3.0):
        x = scale * torch.randn(6, 8)
        torch.testing.assert_close(traced.graph_module(x), module(x))


def branch(h: Tensor) -> Tensor:
    return h.relu() if h.max().item() > 0.1 else h


def loop(h: Tensor) -> Tensor:
    for _ in range(int(h.abs().max()) + 1):
        h = h + 1
    return h


def chosen(h: Tensor) -> Tensor:
    return h * {0: 1.0}.get(int(h.sum()), 2.0)


@pytest.mark.parametrize("function", [branch, loop, chosen])
def test_a_number_that_decides_stays_refused(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    with pytest.raises(FrontendError, match=rf"decides by the data at {Path(__file__).name}:\d+: `"):
        trace(Between(function), torch.randn(4, 8))
    traced = trace(nn.Sequential(Between(function), nn.Linear(5, 5)), torch.randn(4, 8))
    assert traced.report.leaves == ("0",)


def test_sizes_as_real_numbers_stay_sizes() -> None:
    """`float(n)` was the example's number."""
    module = Between(lambda h: h / float(h.shape[0]) ** 0.5).eval()
    traced = trace(module, torch.randn(4, 8))
    x = torch.randn(9, 8)
    torch.testing.assert_close(traced.graph_module(x), module(x))
    assert traced.report.leaves == () and traced.report.specialisations == ()


class Doubles(nn.Module):
    """Code that needs Python's own `float`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(x.shape[1], dtype=float).to(x) / float(x.shape[1])


def test_code_that_needs_pythons_own_float_is_no_leaf() -> None:
    module = nn.Sequential(nn.Linear(8, 16), Doubles(), nn.Linear(16, 5)).eval()
    traced = trace(module, torch.randn(4, 8))
    x = torch.randn(9, 8)
    torch.testing.assert_close(traced.graph_module(x), module(x))
    assert traced.report.leaves == ()
