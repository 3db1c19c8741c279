"""The optimisers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn

from indistill_fx.training.options.settings import OptimizerName, require_choice

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def check_optimizer(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ConfigError: lists the legal ones.
    """
    require_choice("optimizer", name, get_args(OptimizerName))


def make_optimizer(
    name: str,
    parameters: Sequence[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    momentum: float,
    sharded: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of that name, fused where torch can (for a small model its step is most of the overhead).

    Raises:
        ConfigError: an unknown name.
    """
    check_optimizer(name)
    extra: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
    fused = not sharded and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    kind: Any = _OPTIMIZERS[name]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused, **extra
    )
    return optimizer
