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


def _decoder(b: Any, x: Tensor) -> Tensor:
    """A decoder's attention: RMS norm, grouped heads, positions as rotations of complex numbers."""
    tokens = x.flatten(2).transpose(1, 2)
    n, steps, _ = tokens.shape
    normed = b.root(tokens)
    query, key, value = (z(normed).view(n, steps, -1, 4).transpose(1, 2) for z in (b.query, b.key, b.value))
    turns = torch.polar(torch.ones_like(b.angles), b.angles)[:steps]
    query, key = (
        torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2)) * turns).flatten(3)
        for z in (query, key)
    )
    y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    tokens = tokens + b.merge(y.transpose(1, 2).reshape(n, steps, -1))
    return tokens.transpose(1, 2).reshape(x.shape)


def _by_hand(b: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[0], b.repeats.in_features)
    for step in (x.mean((2, 3)), x.amax((2, 3)), x.amin((2, 3))):
        of_x, of_h = b.reads(step).chunk(2, -1), b.repeats(h).chunk(2, -1)
        update = (of_x[0] + of_h[0]).sigmoid()
        h = update * h + (1 - update) * (of_x[1] + of_h[1]).tanh()
    return x + b.writes(h)[:, :, None, None]  # type: ignore[no-any-return]


def _bilinear(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)
    return x + torch.sigmoid(b.both(x.mean((2, 3)), y.amax((2, 3))))[:, :, None, None] * y


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
    "decoder": _decoder,
    "recurrence by hand": _by_hand,
    "bilinear": _bilinear,
}
LAST_BLOCKS = {"decoder", "recurrence by hand", "bilinear"}
"""Of seeds from 20 on."""
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
    "decoder": "query key value merge root",
    "recurrence by hand": "reads repeats writes",
    "bilinear": "conv both",
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
    elif kind == "decoder":
        block.root, block.query, block.merge = nn.RMSNorm(width), nn.Linear(width, 16), nn.Linear(16, width)
        block.key, block.value = nn.Linear(width, 8), nn.Linear(width, 8)
        block.register_buffer("angles", torch.outer(torch.arange(1024.0), torch.tensor([1.0, 0.1])))
    elif kind == "recurrence by hand":
        block.reads, block.repeats, block.writes = nn.Linear(width, 12), nn.Linear(6, 12), nn.Linear(6, width)
    elif kind == "bilinear":
        block.both = nn.Bilinear(width, width, width)
