"""Attention of many kinds, recurrent layers, deformable convolutions, writes into slices, filters of each sample's own.

Each network is narrowed at every tap and halved; both must compute what the whole network does.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from indistill_fx.graph.interpret import run_keeping
from indistill_fx.graph.per_sample import conv_per_sample
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.extract.instrument import instrument
from indistill_fx.passes.pruning import slice_network
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from indistill_fx.traced import TracedModel
from tests.nets import unsettle
from tests.numerics.masked_reference import run_masked

WIDTH, HEADS = 16, 4


class Tokens(nn.Module):
    """A transformer's block around some attention."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.embed, self.fc = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.first, self.attention, self.second = nn.LayerNorm(WIDTH), inner, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.first(x))
        return self.fc((x + self.mlp(self.second(x))).mean(1))  # type: ignore[no-any-return]


class Maps(nn.Module):
    """Convolutions around something on maps."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.a, self.norm, self.inner = nn.Conv2d(3, WIDTH, 3, 1, 1), nn.BatchNorm2d(WIDTH), inner
        self.b, self.fc = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.norm(self.a(x)).relu())
        return self.fc(self.b(x).relu().mean((2, 3)))  # type: ignore[no-any-return]


class Way(nn.Module):
    """A function as a module."""

    def __init__(self, way: Callable[[Tensor], Tensor]):
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.leave = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(HEADS, 1, 1) + 1)

    def parts(self, x: Tensor, *, across: bool = False) -> tuple[Tensor, ...]:
        b, n, c = x.shape
        split = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS)
        return split.permute(2, 0, 3, 4, 1).unbind(0) if across else split.permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[no-any-return]


class Cosine(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        found = (scores * self.scale.clamp(max=4.6).exp()).softmax(-1) @ v
        return self.leave(found.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class CosineByHand(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        q, k = q / q.norm(dim=-1, keepdim=True), k / torch.linalg.vector_norm(k, dim=-1, keepdim=True)
        found = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.leave(found.transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Biased(Attention):
    """A slope for each head, written as numbers (ALiBi)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        places, slopes = torch.arange(x.shape[1]), torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=x.dtype)
        far = (places[None] - places[:, None]).abs()
        scores = q @ k.transpose(-2, -1) - slopes.view(1, HEADS, 1, 1) * far
        return self.leave((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Across(Attention):
    """Channels look at channels."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x, across=True)
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        found = (scores * self.scale).softmax(-1) @ v
        return self.leave(found.permute(0, 3, 1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class AcrossMaps(nn.Module):
    """Channels of maps look at one another, the heads taken apart by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.leave = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = (part.reshape(b, HEADS, c // HEADS, h * w) for part in self.qkv(x).chunk(3, 1))
        found = (q @ k.transpose(-2, -1) / (h * w)).softmax(-1) @ v
        return self.leave(found.reshape(b, c, h, w))  # type: ignore[no-any-return]


class FewKeys(nn.Module):
    """Several heads of queries share keys and values."""

    def __init__(self, how: str, groups: int = 1):
        super().__init__()
        self.how, self.groups, width = how, groups, WIDTH // HEADS
        self.q, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, groups * width), nn.Linear(WIDTH, groups * width)

    def forward(self, x: Tensor) -> Tensor:
        (b, n, c), d, g = x.shape, WIDTH // HEADS, self.groups
        q = self.q(x).view(b, n, HEADS, d).transpose(1, 2)
        k, v = (layer(x).view(b, n, g, d).transpose(1, 2) for layer in (self.k, self.v))
        if self.how == "repeat":
            k, v = (t.repeat_interleave(HEADS // g, 1) for t in (k, v))
        elif self.how == "expand":
            k, v = (t[:, :, None].expand(b, g, HEADS // g, n, d).reshape(b, HEADS, n, d) for t in (k, v))
        if self.how == "product":
            found = (q * d**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            found = F.scaled_dot_product_attention(q, k, v)
        return self.leave(found.transpose(1, 2).reshape(b, n, c))  # type: ignore[no-any-return]


class Generator(nn.Module):
    """From a vector to a picture: linear, view, convolution."""

    def __init__(self, unflatten: bool):
        super().__init__()
        self.enter, self.norm, self.unflatten = nn.Linear(WIDTH, 16 * 4 * 4), nn.BatchNorm2d(16), unflatten
        self.up, self.out = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.Conv2d(8, 3, 3, 1, 1)
        self.look = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        y = self.enter(self.look(x)).relu()
        y = y.unflatten(1, (16, 4, 4)) if self.unflatten else y.view(-1, 16, 4, 4)
        return self.out(self.up(self.norm(y)).relu())  # type: ignore[no-any-return]


class Deformed(nn.Module):
    def __init__(self, masked: bool):
        super().__init__()
        self.offset, self.conv = nn.Conv2d(WIDTH, 18, 3, 1, 1), DeformConv2d(WIDTH, WIDTH, 3, 1, 1)
        self.mask = nn.Conv2d(WIDTH, 9, 3, 1, 1) if masked else None

    def forward(self, x: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask(x).sigmoid()
        return self.conv(x, self.offset(x), mask)  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """The columns of a picture as a sequence."""

    def __init__(
        self, kind: type[nn.RNNBase], layers: int = 1, *, both: bool = False, first: bool = True, states: bool = False
    ):
        super().__init__()
        self.embed, self.first, self.states = nn.Linear(48, WIDTH), first, states
        self.cells = kind(WIDTH, 24, layers, bidirectional=both, batch_first=first)
        self.out, self.fc = nn.Linear(24 if states else 24 * (1 + both), 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2).transpose(1, 2)).relu()
        y, h = self.cells(x if self.first else x.transpose(0, 1))
        last = (h[0] if isinstance(h, tuple) else h)[-1]
        if not self.states:
            last = y[:, -1] if self.first else y[-1]
        return self.fc(self.out(last).relu())  # type: ignore[no-any-return]


class Dynamic(nn.Module):
    """Filters mixed for each sample, in the form in which conditional convolutions are written."""

    def __init__(self, shifts: bool = False) -> None:
        super().__init__()
        self.shifts = nn.Parameter(torch.randn(3, WIDTH)) if shifts else None
        self.route, self.filters = nn.Linear(WIDTH, 3), nn.Parameter(torch.randn(3, WIDTH, WIDTH, 3, 3) / 12)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        shares = self.route(x.mean((2, 3))).softmax(1)
        mixed = torch.einsum("bk,koihw->boihw", shares, self.filters)
        shift = None if self.shifts is None else torch.mm(shares, self.shifts).view(-1)
        out = F.conv2d(x.reshape(1, b * c, h, w), mixed.reshape(b * WIDTH, c, 3, 3), shift, padding=1, groups=b)
        return out.view(b, WIDTH, out.shape[2], out.shape[3])


class Correlated(nn.Module):
    """Each channel convolved with the middle of another map of the same sample."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x[:, :, 4:10, 4:10])
        b, c = kernel.shape[:2]
        out = F.conv2d(
            x.view(1, b * c, x.size(2), x.size(3)), kernel.view(b * c, 1, kernel.size(2), kernel.size(3)), groups=b * c
        )
        return out.view(b, c, out.size(2), out.size(3)) / 16


def shifted(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :4, 1:] = x[:, :4, :-1]
    out[:, 4:8, :-1] = x[:, 4:8, 1:]
    out[:, 8:] = x[:, 8:]
    return out


def zeros_of_sizes(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1], x.shape[2], x.shape[3])
    out[:, :, ::2] = x[:, :, 1::2]
    return out


def other_order(x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], WIDTH, x.shape[2], x.shape[3], dtype=x.dtype)
    out[:, ::2] = x[:, 1::2]
    out[:, 1::2] = x[:, ::2]
    return out


def collected(x: Tensor) -> Tensor:
    out = torch.empty(0).to(x)
    for part in x.split(8, 2):
        out = torch.cat((out, part * 2), 2)
    return out


def numbers(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, :, 0] = 0.5
    out[:, 2:4] = 1.0
    return out


def one_channel(x: Tensor) -> Tensor:
    out = x.clone()
    out[:, 3] = x[:, 5] * 2
    return out


def copied(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :, 1:].copy_(x[:, :, :-1])
    return out


def half_the_height(x: Tensor) -> Tensor:
    half = (x.size(2) + 1) // 2
    return x.narrow(2, x.size(2) - half, half)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "cosine attention": (lambda: Tokens(Cosine()), 0.36),
    "cosine attention by hand": (lambda: Tokens(CosineByHand()), 0.36),
    "attention over channels": (lambda: Tokens(Across()), 0.36),
    "attention over channels of maps": (lambda: Maps(AcrossMaps()), 0.36),
    "one head of keys, by a product": (lambda: Tokens(FewKeys("product")), 0.4),
    "one head of keys, fused": (lambda: Tokens(FewKeys("fused")), 0.4),
    "two heads of keys, repeated": (lambda: Tokens(FewKeys("repeat", 2)), 0.36),
    "two heads of keys, expanded": (lambda: Tokens(FewKeys("expand", 2)), 0.36),
    "linear, view, convolution": (lambda: Generator(False), 0.45),
    "linear, unflatten, convolution": (lambda: Generator(True), 0.45),
    "deformable": (lambda: Maps(Deformed(False)), 0.4),
    "deformable with a mask": (lambda: Maps(Deformed(True)), 0.4),
    "lstm": (lambda: Recurrent(nn.LSTM), 0.4),
    "lstm of both directions": (lambda: Recurrent(nn.LSTM, 2, both=True), 0.4),
    "gru, length first": (lambda: Recurrent(nn.GRU, 2, first=False), 0.4),
    "lstm's last state": (lambda: Recurrent(nn.LSTM, 2, states=True), 0.4),
    "gru's last state": (lambda: Recurrent(nn.GRU, both=True, states=True), 0.4),
    "rnn": (lambda: Recurrent(nn.RNN), 0.5),
    "filters of each sample": (lambda: Maps(Dynamic()), 0.4),
    "filters and biases of each sample": (lambda: Maps(Dynamic(shifts=True)), 0.4),
    "numbers in the code": (lambda: Tokens(Biased()), 0.36),
    "correlated": (lambda: Maps(Correlated()), 0.4),
    "shifted": (lambda: Maps(Way(shifted)), 0.4),
    "zeros of sizes": (lambda: Maps(Way(zeros_of_sizes)), 0.4),
    "another order": (lambda: Maps(Way(other_order)), 0.4),
    "collected": (lambda: Maps(Way(collected)), 0.4),
    "numbers": (lambda: Maps(Way(numbers)), 0.4),
    "one channel": (lambda: Maps(Way(one_channel)), 0.4),
    "copied": (lambda: Maps(Way(copied)), 0.4),
    "half the height": (lambda: Maps(Way(half_the_height)), 0.4),
}


def traced(make: Callable[[], nn.Module]) -> tuple[TracedModel, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    return trace(unsettle(make()).double().eval(), x), x


def narrowed(model: TracedModel, x: Tensor) -> None:
    """All taps to a random half at once, compared with the whole network."""
    dice = random.Random(0)
    found = {
        names[0]: known
        for node, names in model.aliases.items()
        if (known := model.facts.get(node)) is not None
        and known.channel_axis is not None
        and known.batch_axis is not None
    }
    taps = [tap for tap, known in found.items() if known.channels > 1 and model.node(tap).op != "placeholder"]
    kept = {tap: sorted(dice.sample(range(n := found[tap].channels), max(1, n // 2))) for tap in taps}
    with torch.no_grad():
        _, whole = run_keeping(model.graph_module, {model.node(tap).name for tap in taps}, x)
        got, _ = instrument(narrow(model, kept=kept).value, taps)(x)
    for tap in taps:
        expected = whole[model.node(tap).name].index_select(found[tap].channel_axis or 0, torch.tensor(kept[tap]))
        assert (got[tap] - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max())), tap


def halved(model: TracedModel, x: Tensor) -> ShrinkReport:
    result = shrink(model, ratio=0.5)
    small = result.value.graph_module
    with torch.no_grad():
        expected, got = run_masked(model, result.report, x), small(x)
    assert (got - expected).abs().max() <= 1e-10 * float(expected.abs().max())
    for name, known in result.value.facts.items():
        assert trace(small, x).facts[name].shape == known.shape, name
        break
    small.train()(x).pow(2).mean().backward()
    assert not [name for name, p in small.named_parameters() if p.grad is None]
    return result.report


@pytest.mark.parametrize("name", NETWORKS)
def test_narrowing_is_exact_and_half_of_the_channels_go(name: str) -> None:
    make, most = NETWORKS[name]
    model, x = traced(make)
    narrowed(model, x)
    report = halved(model, x)
    assert report.parameters[1] / report.parameters[0] < most, report.frozen


def test_another_picture_runs_through_the_correlation_of_a_smaller_network() -> None:
    model, _ = traced(lambda: Maps(Correlated()))
    x = torch.randn(3, 3, 20, 24, dtype=torch.float64)
    assert torch.allclose(model.graph_module(x), model.module(x))
    result = shrink(model, ratio=0.5)
    assert torch.allclose(result.value.graph_module(x), run_masked(model, result.report, x))


@pytest.mark.parametrize(
    ("groups", "stride", "padding", "dilation"), [(1, 1, 0, 1), (2, 2, 1, 1), (6, (1, 2), (2, 1), 2)]
)
def test_the_convolution_per_sample_is_the_grouped_one_also_where_it_is_exported(
    groups, stride, padding, dilation, monkeypatch
):
    x, weight = torch.randn(3, 6, 9, 11), torch.randn(3, 6, 6 // groups, 3, 2)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    each = [F.conv2d(x[k : k + 1], weight[k], groups=groups, **settings) for k in range(3)]
    assert torch.allclose(conv_per_sample(x, weight, groups, **settings), torch.cat(each), atol=1e-5)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert torch.allclose(conv_per_sample(x, weight, groups, **settings), torch.cat(each), atol=1e-5)


def test_a_sequence_handed_on_as_a_whole_keeps_its_width() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cells = nn.Linear(48, 8), nn.GRU(8, 12, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            found = self.cells(self.embed(x.flatten(1, 2).transpose(1, 2)))
            return found[0].mean(1), found

    model, _ = traced(Whole)
    report = shrink(model, ratio=0.5).report
    assert report.widths == {"embed": (8, 4), "cells": (12, 12)}


def test_means_and_norms_over_what_is_left_are_listed() -> None:
    report = shrink(traced(lambda: Tokens(Cosine()))[0], ratio=0.5).report
    assert report.approximate == ("attention:first (layer_norm)", "second (layer_norm)") or {
        line.split(" ")[-1] for line in report.approximate
    } == {"(layer_norm)"}
    assert shrink(traced(lambda: Maps(Way(shifted)))[0], ratio=0.5).report.approximate == ()
    gated = shrink(traced(lambda: Maps(Way(lambda x: x * x.mean(1, keepdim=True).sigmoid())))[0], ratio=0.5).report
    assert [line.split(" ")[-1] for line in gated.approximate] == ["(mean)"]


def test_the_comparison_sees_a_hidden_unit_that_was_cut_wrongly(monkeypatch) -> None:
    """A control of the checks above."""
    monkeypatch.setattr(slice_network, "resize_recurrent", lambda module: module.weight_hh_l0.data.zero_())
    model, x = traced(lambda: Recurrent(nn.GRU))
    with pytest.raises(Exception, match="smaller network"):
        halved(model, x)
