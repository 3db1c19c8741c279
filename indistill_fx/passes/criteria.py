"""Rank channels: scores from weights or from data, shared by all producers that feed the same channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from indistill_fx.errors import ConfigError, nearest

Criterion = Callable[[Tensor], Tensor]
"""Weights (rows, inputs, *kernel) -> one score per row; the highest are kept."""


def l1(weight: Tensor) -> Tensor:
    """Sum of absolute weights of each filter, as in the paper."""
    return weight.detach().abs().flatten(1).sum(1, dtype=torch.float64)


def l2(weight: Tensor) -> Tensor:
    """Euclidean norm of each filter."""
    return weight.detach().square().flatten(1).sum(1, dtype=torch.float64).sqrt()


def random(weight: Tensor) -> Tensor:
    """A fixed random order, the same for every filter bank of one size."""
    return torch.rand(weight.shape[0], generator=torch.Generator().manual_seed(weight.shape[0]), dtype=torch.float64)


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "random": random}
"""Criteria that look at weights alone."""


def criterion_of(wish: str | Criterion) -> Criterion:
    """The criterion of a name, or the user's own function.

    Raises:
        ConfigError: no criterion of that name.
    """
    if callable(wish):
        return wish
    if wish not in CRITERIA:
        raise ConfigError(f"There is no criterion `{wish}`.", where="criterion", got=wish, hint=nearest(wish, CRITERIA))
    return CRITERIA[wish]


def best(scores: Tensor, count: int) -> tuple[int, ...]:
    """The `count` entries with the highest scores, ascending; of equal ones the first."""
    order = torch.argsort(scores, descending=True, stable=True)[:count]
    return tuple(sorted(order.tolist()))
