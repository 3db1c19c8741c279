"""Modules whose inside no graph shows: each is one node, whoever captures it."""

from __future__ import annotations

from torch import nn


class Opaque(nn.Module):
    """One node in every graph: what it computes is not PyTorch's business, and has no gradients."""
