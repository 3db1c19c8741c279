"""The optimisers by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from indistill_fx.training.options.option import require_choice
from indistill_fx.training.options.settings import OptimizerName

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
    nesterov: bool = False,
    decay_norms: bool = True,
    sharded: bool = False,
    recordable: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of that name, fused where torch can (for a small model its step is most of the overhead).

    Without `decay_norms` a second group has what is not decayed: parameters of one axis, which are norms' and biases. One that is
    `recordable` has its learning rate as a tensor beside the parameters, and all else that changes: a recorded step reads it there.

    Raises:
        ConfigError: an unknown name.
    """
    check_optimizer(name)
    extra: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov} if name == "sgd" else {}
    fused = not sharded and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    kind: Any = _OPTIMIZERS[name]
    groups: Any = parameters
    if weight_decay and not decay_norms:
        flat = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": flat, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
    rate: float | Tensor = learning_rate
    if recordable:
        rate = torch.tensor(learning_rate, dtype=torch.float32, device=parameters[0].device)
        extra |= {"capturable": True} if name != "sgd" else {}
    optimizer: torch.optim.Optimizer = kind(groups, lr=rate, weight_decay=weight_decay, fused=fused, **extra)
    if name == "sgd" and momentum:
        # A fused optimiser reads uninitialised momentum if the first step is skipped, as float16's gradient scaler
        # often does.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer
