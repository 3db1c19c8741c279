"""Attention whose number of heads, width of a head, and widths of input and output are free of each other.

`nn.MultiheadAttention` and torchvision's window attention tie them (heads x head = width), so neither can lose channels. These two
compute the same from weights of any width. They take the place of the originals in narrowed and shrunk graphs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """Multi-head attention made of four linear layers.

    Args:
        query: makes heads * head_dim features of the queries.
        key: the same for the keys.
        value: the same for the values.
        out: joins the heads.
        heads: number of heads.
        dropout: of the attention weights, in training.
        batch_first: (batch, sequence, features) rather than (sequence, batch, features).
    """

    def __init__(
        self,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        out: nn.Linear,
        *,
        heads: int,
        dropout: float = 0.0,
        batch_first: bool = True,
    ):
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.heads, self.dropout, self.batch_first = heads, dropout, batch_first

    @property
    def head_dim(self) -> int:
        """Width of one head, from which the softmax's scale follows."""
        return self.query.out_features // self.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`."""
        if not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        bias = _bias(attn_mask, key_padding_mask, q, self.heads)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
            mixed = F.dropout(weights, dropout, self.training) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        result = self.out(mixed.transpose(1, 2).flatten(2))
        return (result if self.batch_first else result.transpose(0, 1)), weights

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


def _bias(mask: Tensor | None, padding: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """Both masks as one tensor to add to the scores; True in a mask means that the position is ignored."""
    total: Tensor | None = None
    if mask is not None:
        total = _addend(mask, like)
        if total.dim() == 3:
            total = total.unflatten(0, (-1, heads))
    if padding is not None:
        padded = _addend(padding, like)[:, None, None, :]
        total = padded if total is None else total + padded
    return total


def _addend(mask: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


def window_attention(
    input: Tensor,  # torchvision's name for this parameter
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """Attention within shifted windows, as torchvision's `shifted_window_attention`, for weights of any width.

    Args:
        input: (batch, height, width, channels).
        qkv_weight: (3 * heads * head, channels).
        proj_weight: (channels out, heads * head).
        relative_position_bias: (1, heads, window, window), added to the scores.
        window_size: height and width of a window.
        num_heads: number of heads.
        shift_size: how far the windows are shifted.
        attention_dropout: of the attention weights, in training.
        dropout: of the result, in training.
        qkv_bias: (3 * heads * head,).
        proj_bias: (channels out,).
        logit_scale: (heads, 1, 1): cosine attention, as in version 2.
        training: whether dropout is on.

    Returns:
        (batch, height, width, channels out).

    Source: Liu et al., "Swin Transformer", arXiv:2103.14030; version 2: arXiv:2111.09883.
    """
    (wh, ww), (height, width) = window_size, (input.shape[1], input.shape[2])
    x = F.pad(input, (0, 0, 0, -width % ww, 0, -height % wh))
    rows, columns = x.shape[1] // wh, x.shape[2] // ww
    down, right = (shift_size[0] if rows > 1 else 0), (shift_size[1] if columns > 1 else 0)
    x = torch.roll(x, (-down, -right), (1, 2))
    windows = x.unflatten(2, (columns, ww)).unflatten(1, (rows, wh)).transpose(2, 3).flatten(3, 4)
    if qkv_bias is not None and logit_scale is not None:  # cosine attention sets the keys' bias to zero
        low, _, high = qkv_bias.chunk(3)
        qkv_bias = torch.cat([low, torch.zeros_like(low), high])
    qkv = F.linear(windows, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
    q, k, v = (part.transpose(3, 4) for part in qkv.unbind(-3))
    scale = q.shape[-1] ** -0.5
    if logit_scale is not None:
        q, k, scale = F.normalize(q, dim=-1) * logit_scale.clamp(max=math.log(100.0)).exp(), F.normalize(k, dim=-1), 1.0
    scores = q @ k.transpose(-2, -1) * scale + relative_position_bias
    if down or right:
        scores = scores + _apart(x, (rows, wh, down), (columns, ww, right))[:, :, None]
    weights = F.dropout(F.softmax(scores, dim=-1), attention_dropout, training)
    mixed = (weights @ v).transpose(3, 4).flatten(-2)
    mixed = F.dropout(F.linear(mixed, proj_weight, proj_bias), dropout, training)
    mixed = mixed.unflatten(3, (wh, ww)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    mixed = torch.roll(mixed, (down, right), (1, 2))
    return mixed[:, :height, :width].contiguous()


def _apart(like: Tensor, *axes: tuple[int, int, int]) -> Tensor:
    """(rows, columns, window, window): -100 for two positions of one window that come from opposite ends of the map."""
    ends = []
    for count, size, shift in axes:
        place = torch.arange(count * size, device=like.device)
        ends.append(
            (place >= count * size - size).long() + (place >= count * size - shift).long() if shift else place * 0
        )
    region = 3 * ends[0][:, None] + ends[1][None, :]
    (rows, wh, _), (columns, ww, _) = axes
    region = region.unflatten(1, (columns, ww)).unflatten(0, (rows, wh)).transpose(1, 2).flatten(2)
    other = region[..., :, None] != region[..., None, :]
    masked: Tensor = other.to(like.dtype) * -100.0
    return masked
