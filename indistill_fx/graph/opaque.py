"""Modules whose inside no graph shows: each is one node, whoever captures it."""

from __future__ import annotations

from torch import nn


class Opaque(nn.Module):
    """One node in every graph: what it computes is not PyTorch's business, and has no gradients.

    Attributes:
        channel_axis: of its output, if it is known and no surrounding graph shows it; else None.
    """

    channel_axis: int | None = None
