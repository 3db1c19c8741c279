"""More blocks of the random networks: reversals, places of maxima, patches, deformed filters, recurrent layers, factors of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _flipped(b: Any, x: Tensor) -> Tensor:
    return x + b.act(b.conv(x).flip(1, 2))  # type: ignore[no-any-return]


def _places(b: Any, x: Tensor) -> Tensor:
    values, at = b.conv(x).flatten(2).max(dim=2)
    least = x.flatten(2).min(2)
    found = x.flatten(2).gather(2, at.unsqueeze(-1)).squeeze(-1)
    return x + b.act(values + found - least.values)[:, :, None, None]  # type: ignore[no-any-return]


def _patches(b: Any, x: Tensor) -> Tensor:
    columns = F.unfold(b.conv(x), 3, padding=1)
    return x + F.fold(b.act(columns), x.shape[2:], 3, padding=1) / 9


def _deformed(b: Any, x: Tensor) -> Tensor:
    return x + b.act(b.deform(x, b.offset(x)))  # type: ignore[no-any-return]


def _gru(b: Any, x: Tensor) -> Tensor:
    tokens = b.layer_norm(x.flatten(2).transpose(1, 2))
    y, _ = b.gru(tokens)
    return x + b.down(y).transpose(1, 2).reshape(x.shape)  # type: ignore[no-any-return]


def _lstm(b: Any, x: Tensor) -> Tensor:
    tokens = b.layer_norm(x.flatten(2).permute(2, 0, 1))  # (length, batch, channels)
    y, (last, _) = b.lstm(tokens)
    return x + b.down(y + last[-1]).permute(1, 2, 0).reshape(x.shape)  # type: ignore[no-any-return]


def _statistics(b: Any, x: Tensor) -> Tensor:
    y = b.conv(x)
    mean = y.mean(dim=(2, 3), keepdim=True)
    y = (y - mean) * torch.rsqrt(y.var((2, 3), unbiased=False, keepdim=True) + 1e-5)
    return b.act(y * b.factor.view(-1, 1, 1)) + x  # type: ignore[no-any-return]


def _factors(b: Any, x: Tensor) -> Tensor:
    return x.mul(b.factor.unsqueeze(-1).unsqueeze(-1)) + b.factor.view(1, x.shape[1], 1, 1) * b.act(b.conv(x))  # type: ignore[no-any-return]


MORE_BLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "flipped": _flipped,
    "places of maxima": _places,
    "patches": _patches,
    "deformed": _deformed,
    "gru": _gru,
    "lstm": _lstm,
    "statistics": _statistics,
    "factors": _factors,
}
MORE_USES = {
    "flipped": "conv act",
    "places of maxima": "conv act",
    "patches": "conv act",
    "deformed": "offset deform act",
    "gru": "layer_norm gru down",
    "lstm": "layer_norm lstm down",
    "statistics": "conv act factor",
    "factors": "conv act factor",
}
