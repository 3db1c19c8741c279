"""Networks as people write them, each a usual thing in words of its own: traced in both modes, narrowed, halved, written as source."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import DeformConv2d

from indistill_fx.compression.write_source import source_of
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.nets import unsettle
from tests.passes.test_more_networks import Maps, Recurrent, Way, halved, narrowed, traced

WIDTH = 16


@functools.cache
def grid(height: int, width: int) -> Tensor:
    sides = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return torch.stack(torch.meshgrid(*sides, indexing="ij"))


class Places(nn.Module):
    """Coordinates out of a cache, keyed by the size of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(WIDTH + 2, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        where = grid(x.shape[2], x.shape[3])[None].to(x.dtype).expand(x.shape[0], -1, -1, -1)
        return self.mix(torch.cat([x, where], 1))  # type: ignore[no-any-return]


class Halves(nn.Module):
    """Half of the channels are worked on, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        x = torch.cat([self.one(x[:, :half]), x[:, half:]], 1)
        b, c, h, w = x.shape
        return x.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Body(nn.Module):
    """Blocks inside a long sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.PReLU(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return x - y


class Steps(nn.Module):
    """A list of parts, each added to the last one's result (Res2Net), joined in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, 1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(torch.split(x, 4, 1))
        found = [parts[0]]
        for conv, part in zip(self.convs, parts[1:], strict=True):
            found.append(conv(part + found[-1]))
        return torch.cat(found[::-1], dim=1)


class Depth(nn.Module):
    """Stochastic depth and dropout by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for k, block in enumerate(self.blocks):
            gone = 0.3 * (k + 1) / len(self.blocks)
            if self.training:
                stays = (torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= gone).to(x.dtype)
                x = x + block(x) * stays / (1 - gone)
            else:
                x = x + block(x)
        return F.dropout2d(x, 0.1, self.training)


class Norm(nn.Module):
    """A batch norm by hand, statistics of its own in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("mean", torch.randn(WIDTH))
        self.register_buffer("var", torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean.detach())
                self.var.mul_(0.9).add_(0.1 * var.detach())
        else:
            mean, var = self.mean, self.var
        x = (x - mean[None, :, None, None]) * torch.rsqrt(var + 1e-5)[None, :, None, None]
        return x * self.scale[:, None, None] + self.shift[:, None, None]


class Heads(nn.Module):
    """Attention on maps in einops' words."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (rearrange(t, "b (h d) y x -> b h (y x) d", h=4) for t in self.qkv(x).chunk(3, 1))
        seen = torch.einsum("bhid,bhjd->bhij", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
        found = torch.einsum("bhij,bhjd->bhid", seen, v)
        return x + self.out(rearrange(found, "b h (y x) d -> b (h d) y x", y=x.shape[2]))  # type: ignore[no-any-return]


class Chosen(nn.Module):
    """Two branches, and a softmax that says how much of each."""

    def __init__(self) -> None:
        super().__init__()
        self.near, self.far = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Conv2d(WIDTH, WIDTH, 5, 1, 2)
        self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, 2 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack([self.near(x), self.far(x)], 1)
        share = self.up(self.down(both.sum(1).mean((2, 3))).relu()).view(x.shape[0], 2, -1).softmax(1)
        return (both * share[..., None, None]).sum(1)


class Looking(nn.Module):
    """A deformable convolution in groups, of channels and of places to look at."""

    def __init__(self, groups: int, places: int):
        super().__init__()
        self.where = nn.Conv2d(WIDTH, 2 * 9 * places, 3, padding=1)
        self.conv = DeformConv2d(WIDTH, WIDTH, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.where(x))  # type: ignore[no-any-return]


class Standardised(nn.Module):
    """A convolution whose filters are centred when it runs: over the channels that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(WIDTH, WIDTH, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.filters - self.filters.mean((1, 2, 3), keepdim=True), None, 1, 1)


def share_of_channels(x: Tensor) -> Tensor:
    return x * x.mean((2, 3)).softmax(1)[:, :, None, None]


def unit_length(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + 1e-6)


def flipped(x: Tensor) -> Tensor:
    return x.flip(2, 1) + torch.flip(x, (3,))


def largest(x: Tensor) -> Tensor:
    rows, both = x.max(dim=2, keepdim=True)[0], x.flatten(2).min(-1)
    return x * rows + both.values[:, :, None, None] * (both.indices > 3).to(x.dtype)[..., None, None]


class Patches(nn.Module):
    """Places of a patch as channels, mixed, and put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.back = nn.Conv2d(WIDTH * 4, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = F.unfold(x, 2, stride=2).view(b, c * 4, h // 2, w // 2)
        y = F.fold(self.back(self.mix(y).relu()).flatten(2), (h, w), 2, stride=2)
        return x + y


def normed() -> nn.Module:
    found = Maps(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)), nn.ELU()))
    parametrizations.spectral_norm(found.b)
    return found


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "places": lambda: Maps(Places()),
    "halves": lambda: Maps(Halves()),
    "body": lambda: Maps(Body()),
    "steps": lambda: Maps(Steps()),
    "depth": lambda: Maps(Depth()),
    "norm": lambda: Maps(Norm()),
    "heads": lambda: Maps(Heads()),
    "chosen": lambda: Maps(Chosen()),
    "share of channels": lambda: Maps(Way(share_of_channels)),
    "unit length": lambda: Maps(Way(unit_length)),
    "weight norm": normed,
    "deformable, two groups": lambda: Maps(Looking(2, 1)),
    "deformable, two places": lambda: Maps(Looking(1, 2)),
    "deformable, both": lambda: Maps(Looking(4, 2)),
    "deformable, a filter each": lambda: Maps(Looking(WIDTH, 1)),
    "standardised": lambda: Maps(Standardised()),
    "flipped": lambda: Maps(Way(flipped)),
    "largest": lambda: Maps(Way(largest)),
    "patches": lambda: Maps(Patches()),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU, both=True, states=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_narrowed_and_halved(name: str) -> None:
    model, x = traced(NETWORKS[name])
    narrowed(model, x)
    report = halved(model, x)
    assert report.parameters[1] < 0.45 * report.parameters[0], report.frozen


@pytest.mark.parametrize("name", NETWORKS)
def test_written_as_source_code(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    small = shrink(trace(unsettle(NETWORKS[name]()).eval(), x), ratio=0.5).value
    assert torch.equal(source_of(small).build().eval()(x), small.graph_module.eval()(x))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_students_graph_computes_the_same_in_both_modes(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    module = unsettle(NETWORKS[name]()).double().train()
    graph = trace(module, x, role="student").graph_module
    for training in (True, False):
        module.train(training)
        before = copy.deepcopy(module.state_dict())
        found = []
        for part in (module, graph):
            torch.manual_seed(1)
            found.append(part(x).detach())
            module.load_state_dict(before)
        assert torch.allclose(*found, rtol=1e-9, atol=1e-9), training


def test_what_a_softmax_says_of_fewer_channels_is_reported() -> None:
    model, _ = traced(NETWORKS["share of channels"])
    assert any("softmax" in line for line in shrink(model, ratio=0.5).report.approximate)


class Whole(nn.Module):
    """Besides its output, what `how` makes of a layer that another one reads."""

    def __init__(self, how: Callable[[Tensor], object]):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
        self.how = how

    def forward(self, x: Tensor) -> object:
        x = self.second(self.first(x).relu())
        return self.last(x), self.how(x)


def neighbours(x: Tensor) -> Tensor:
    """Efficient channel attention: a convolution over channels, of which none may go."""
    mixed = F.conv1d(x.mean((2, 3))[:, None], torch.ones(1, 1, 3, dtype=x.dtype), padding=1)
    return mixed[:, 0]


FROZEN: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "parts": (lambda x: x.chunk(2, 1), "an output"),
    "parts of another axis": (lambda x: x.unbind(-1), "an output"),
    "maximum and place": (lambda x: x.max(-1), "an output"),
    "place of the maximum over channels": (lambda x: x.max(1)[1].to(x.dtype), "numbers them"),
    "windows": (lambda x: x.unfold(1, 3, 1).mean((2, 3, 4)), "unfold"),
    "neighbours": (neighbours, "conv"),
}


def test_windows_along_the_channels_of_an_exported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor's own `unfold`, which torch.export calls as a function, is not `F.unfold`."""
    monkeypatch.setattr("indistill_fx.passes.capture.trace._METHODS", {"export": capture_exported})
    model = trace(Whole(lambda x: x.unfold(1, 2, 2).mean(-1)).double().eval(), torch.randn(2, 3, 8, 8).double())
    assert model.report.method == "export"
    report = shrink(model, ratio=0.5).report
    assert any("unfold" in frozen.reason for frozen in report.frozen)


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_lose_channels_keeps_them_and_says_why(name: str) -> None:
    how, reason = FROZEN[name]
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    result = shrink(trace(unsettle(Whole(how)).double().eval(), x), ratio=0.5)
    assert result.report.widths["first"] == (8, 4)
    assert result.report.widths["second"] == (8, 8)
    assert any(reason in frozen.reason for frozen in result.report.frozen)
