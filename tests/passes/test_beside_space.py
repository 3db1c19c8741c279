"""Operations on the axes of space leave the channels alone: spectra, windows, triangles, turns, pooling with places, padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.passes.test_more_networks import WIDTH, Maps, Way, halved, narrowed, traced


class Filtered(nn.Module):
    """A filter in frequency space for each channel, or for all of them."""

    def __init__(self, channels: int):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(channels, 16, 9, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


class FourierUnit(nn.Module):
    """Real and imaginary parts as channels of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x)
        y = self.conv(torch.cat([spectrum.real, spectrum.imag], 1)).relu()
        return torch.fft.irfft2(torch.complex(*y.chunk(2, 1)), s=x.shape[-2:])


class Unpooled(nn.Module):
    """Values go back to where the maxima were."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y, places = self.pool(x)
        return self.unpool(y * 2, places) + F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)  # type: ignore[no-any-return]


GOES: dict[str, Callable[[], nn.Module]] = {
    "filter of each frequency and channel": lambda: Filtered(WIDTH),
    "filter of each frequency": lambda: Filtered(1),
    "Fourier unit": FourierUnit,
    "real part": lambda: Way(lambda x: torch.fft.fft2(x).real + torch.fft.fft(x, dim=-2).abs()),
    "as real": lambda: Way(lambda x: torch.view_as_real(torch.fft.rfft(x)).flatten(3)),
    "shifted spectrum": lambda: Way(lambda x: torch.fft.fftshift(torch.fft.fftn(x, dim=(2, 3)), dim=(-2, -1)).real),
    "unpooled": Unpooled,
    "windows": lambda: Way(lambda x: x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).amax(-1)),
    "triangles": lambda: Way(lambda x: x.tril() - x.triu(1)),
    "turned": lambda: Way(lambda x: torch.rot90(x, 1, (2, 3)) + x.rot90(-1, [3, 2])),
    "power pooling": lambda: Maps(Way(lambda x: F.lp_pool2d(x, 2, 2))).inner,
    "circular padding": lambda: nn.Sequential(nn.CircularPad2d(1), nn.ReflectionPad2d((1, 2, 0, 1)), nn.ZeroPad2d(1)),
    "padding by function": lambda: Way(lambda x: F.pad(x, (1, 1, 2, 0), mode="circular")),
}


@pytest.mark.parametrize("name", GOES)
def test_channels_go(name: str) -> None:
    model, x = traced(lambda: Maps(GOES[name]()))
    narrowed(model, x)
    report = halved(model, x)
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    assert report.widths["a"] == (WIDTH, WIDTH // 2)


ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "fft": lambda x, dim: torch.fft.fft(x, dim=dim).real,
    "roll": lambda x, dim: torch.roll(x, 2, dim),
    "flip": lambda x, dim: torch.flip(x, (dim,)),
    "unfold": lambda x, dim: x.unfold(dim, 2, 2).amax(-1).repeat_interleave(2, dim),
    "cumsum": lambda x, dim: x.cumsum(dim),
    "cumprod": lambda x, dim: (x * 0.5).cumprod(dim),
    "cummax": lambda x, dim: torch.cummax(x, dim)[0],
    "sort": lambda x, dim: x.sort(dim).values,
    "index_select": lambda x, dim: x.index_select(dim, torch.arange(x.shape[dim] - 1, -1, -1)),
    "softmax": lambda x, dim: x * x.softmax(dim),
    "normalize": lambda x, dim: F.normalize(x, dim=dim),
    "take": lambda x, dim: torch.take_along_dim(x, x.argsort(dim), dim),
}
CROSSES = ("cumsum", "softmax", "normalize", "flip", "roll", "index_select")
"""What channels are removed under also along their own axis."""


@settings(max_examples=70, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(ALONG)), st.sampled_from([1, 2, 3, -1, -2, -3]), st.sampled_from([0.25, 0.5, 0.75]))
def test_along_any_axis(name: str, dim: int, ratio: float) -> None:
    torch.manual_seed(0)
    middle = Way(lambda x: ALONG[name](x, dim))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), middle, nn.Conv2d(8, 4, 1), nn.Conv2d(4, 5, 1)).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = trace(net, x)
    narrowed(model, x)
    halved(model, x)
    before, left = shrink(model, ratio=ratio).report.widths["0"]
    assert left == (round(before * ratio) if dim % 4 != 1 or name in CROSSES else before)
