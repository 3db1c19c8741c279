"""The latest blocks of the random networks: what is computed over channels, constant places, cells, products of ranks, spectra."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _spatial_attention(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)
    largest, _ = torch.max(y, dim=1, keepdim=True)
    return x + y * torch.sigmoid(b.spatial(torch.cat([y.mean(1, keepdim=True), largest], 1)))


def _channel_softmax(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)
    return x + y * y.softmax(1) + F.log_softmax(y, dim=-3) / 8


def _channel_spread(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)
    spread, mean = torch.var_mean(y, 1, unbiased=False, keepdim=True)
    return x + b.act((y - mean) / (spread + 1).sqrt() - y.logsumexp(1, keepdim=True) / 8)  # type: ignore[no-any-return]


def _places(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)[:, b.order]
    return torch.cat([y[:, ::2], x[:, [*range(1, x.shape[1], 2)]] + y[:, 1::2]], 1)


def _best_places(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x).flatten(2)
    best = y.mean(1, keepdim=True).topk(3, dim=2).indices
    gate = y.gather(2, best.expand(-1, y.shape[1], -1)).amax(2) + y.sort(2).values[..., -2:].sum(2)
    return x + torch.sigmoid(gate)[:, :, None, None] * x


def _gru_cell(b: Any, x: Tensor) -> Tensor:
    h = b.cell(x.mean((2, 3)))
    for step in (x.amax((2, 3)), x.amin((2, 3))):
        h = b.cell(step, h)
    return x + h[:, :, None, None]  # type: ignore[no-any-return]


def _lstm_cell(b: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], x.shape[1])
    h, c = b.cell(x.mean((2, 3)), (h, torch.zeros_like(h)))
    h, c = b.cell(x.amax((2, 3)), (h, c))
    return x + torch.tanh(h + c)[:, :, None, None]


def _started(b: Any, x: Tensor) -> Tensor:
    rows = x.mean(3).transpose(1, 2)
    y, _ = b.rows(rows, b.start(x.mean((2, 3))).tanh()[None])
    return x + y.transpose(1, 2).unsqueeze(3)  # type: ignore[no-any-return]


def _weight_left(b: Any, x: Tensor) -> Tensor:
    y = b.act(b.matrix @ x.flatten(2))
    return x + torch.einsum("...cn,cd->...dn", y, b.matrix).view_as(x)


def _spectrum(b: Any, x: Tensor) -> Tensor:
    y = torch.fft.rfft2(b.conv(x), norm="ortho")
    return x + torch.fft.irfft2(torch.complex(y.real * 0.5, y.imag), s=x.shape[-2:], norm="ortho")


def _patch_places(b: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    patches = F.unfold(b.conv(x), 3, padding=1).view(n, c, 9, h, w)
    return x + (patches * patches.softmax(2)).sum(2)


def _windows(b: Any, x: Tensor) -> Tensor:
    y = F.pad(b.conv(x), (1, 1, 1, 1), mode="circular")
    return x + y.unfold(2, 3, 1).unfold(3, 3, 1).amax((-1, -2)) - x.cumsum(3).tril() / 16


LATER_BLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "spatial attention": _spatial_attention,
    "channel softmax": _channel_softmax,
    "channel spread": _channel_spread,
    "constant places": _places,
    "best places": _best_places,
    "gru cell": _gru_cell,
    "lstm cell": _lstm_cell,
    "started": _started,
    "weight on the left": _weight_left,
    "spectrum": _spectrum,
    "places of patches": _patch_places,
    "windows": _windows,
}
LATER_USES = {
    "spatial attention": "conv spatial",
    "channel softmax": "conv",
    "channel spread": "conv act",
    "constant places": "conv",
    "best places": "conv",
    "gru cell": "cell",
    "lstm cell": "cell",
    "started": "rows start",
    "weight on the left": "matrix act",
    "spectrum": "conv",
    "places of patches": "conv",
    "windows": "conv",
}


def add_parts(block: Any, kind: str, width: int) -> None:
    """Give a block of these kinds its own layers. Others get none, so that earlier networks draw the weights that they drew."""
    if kind == "spatial attention":
        block.spatial = nn.Conv2d(2, 1, 7, padding=3)
    elif kind == "constant places":
        block.register_buffer("order", torch.randperm(width))
    elif kind in ("gru cell", "lstm cell"):
        block.cell = (nn.GRUCell if kind == "gru cell" else nn.LSTMCell)(width, width)
    elif kind == "started":
        block.rows, block.start = nn.GRU(width, width, batch_first=True), nn.Linear(width, width)
    elif kind == "weight on the left":
        block.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)
