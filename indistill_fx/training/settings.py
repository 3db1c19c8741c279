"""How a run is trained: the options that `distill`, `train`, `compare` and `distill_chain` share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from indistill_fx.errors import ConfigError, nearest

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "step", "cosine"]
Precision = Literal["no", "fp16", "bf16"]


class Options(TypedDict, total=False):
    """The keyword arguments that become `Settings`; see there."""

    seed: int
    learning_rate: float
    optimizer: OptimizerName
    weight_decay: float
    momentum: float
    schedule: ScheduleName
    milestones: Sequence[int]
    gamma: float
    clip_norm: float | None
    accumulate: int
    mixed_precision: Precision | None
    compile: bool
    device: Literal["auto", "cpu"]
    sync_batch_norm: bool
    shard: bool
    checkpoint_every_steps: int | None
    log_every_steps: int
    tensorboard: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a run is trained.

    Attributes:
        seed: of everything random in the model and the loss; a loader of `open_data` has its own.
        learning_rate: of the main stage.
        optimizer: of the main stage: `adam`, `adamw` or `sgd`. The warm-up's is the curriculum's.
        weight_decay: of the main stage.
        momentum: of `sgd`.
        schedule: of the main stage's learning rate, epoch by epoch: `constant`; `step`: times `gamma` at every one of
            `milestones`; `cosine`: 0.5 * (1 + cos(pi * epoch / epochs)).
        milestones: main epochs (counted from 0) at which `step` lowers the rate.
        gamma: factor of `step`.
        clip_norm: gradients are scaled down to this L2 norm; None: not.
        accumulate: batches per optimiser step; the gradient is their mean.
        mixed_precision: `bf16` or `fp16`; None: whatever `accelerate launch` says, else full precision.
        compile: torch.compile every stage. Where that fails the stage runs as it is, and the record says so.
        device: `auto` is Accelerate's choice; `cpu`.
        sync_batch_norm: with several processes, batch norms take their statistics over the whole batch, not over each
            process's share of it. False: as fast as DDP alone; the statistics kept are the first process's.
        shard: with several processes, parameters (the teacher's too), gradients and optimiser state are spread over
            them between steps, by torch's `fully_shard` (FSDP2), instead of each process having all (DDP). So does
            `accelerate launch --use_fsdp`.
        checkpoint_every_steps: optimiser steps between checkpoints; there is one after an epoch too, unless it would take
            more than a twentieth of the time.
        log_every_steps: optimiser steps between lines in metrics.jsonl; of several processes these tell the first one's loss.
        tensorboard: write the metrics for TensorBoard too.
    """

    seed: int = 0
    learning_rate: float = 1e-3
    optimizer: OptimizerName = "adam"
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: ScheduleName = "constant"
    milestones: Sequence[int] = ()
    gamma: float = 0.1
    clip_norm: float | None = None
    accumulate: int = 1
    mixed_precision: Precision | None = None
    compile: bool = False
    device: Literal["auto", "cpu"] = "auto"
    sync_batch_norm: bool = True
    shard: bool = False
    checkpoint_every_steps: int | None = None
    log_every_steps: int = 50
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer)
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("mixed_precision", self.mixed_precision, (None, "no", "fp16", "bf16"))
        _choice("device", self.device, ("auto", "cpu"))
        for name in ("learning_rate", "gamma"):
            _require(name, getattr(self, name), lambda v: math.isfinite(v) and v > 0, "a number above 0")
        for name in ("weight_decay", "momentum"):
            _require(name, getattr(self, name), lambda v: math.isfinite(v) and v >= 0, "a number, 0 or more")
        for name in ("accumulate", "log_every_steps"):
            _require(name, getattr(self, name), lambda v: v >= 1, "an integer, 1 or more")
        for name in ("clip_norm", "checkpoint_every_steps"):
            _require(name, getattr(self, name), lambda v: v is None or v > 0, "a number above 0, or None")
        _require("seed", self.seed, lambda v: 0 <= v < 1 << 63, "an integer, 0 or more")
        if (self.schedule == "step") != bool(self.milestones):
            raise ConfigError(
                f"schedule={self.schedule!r} with milestones={list(self.milestones)}.",
                where="schedule",
                hint="`step` lowers the learning rate at the epochs in milestones, and no other schedule reads them.",
            )

    @classmethod
    def of(cls, options: Options) -> Settings:
        """The settings that keyword arguments name.

        Raises:
            ConfigError: an unknown or an illegal one.
        """
        legal = [field.name for field in fields(cls)]
        for name in options:
            if name not in legal:
                raise ConfigError(
                    f"There is no option {name!r}.", where=name, expected=legal, hint=nearest(name, legal)
                )
        return cls(**options)

    def rate(self, epoch: int, epochs: int) -> float:
        """The main stage's learning rate in an epoch (from 0) of so many."""
        return self.learning_rate * SCHEDULES[self.schedule](self, epoch, max(epochs, 1))

    def describe(self) -> str:
        """The main stage's schedule, as an addition to its budget."""
        if self.schedule == "step":
            return f", times {self.gamma:g} from epoch {', '.join(str(at + 1) for at in self.milestones)}"
        return "" if self.schedule == "constant" else f", {self.schedule}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self) | {"milestones": list(self.milestones)}


SCHEDULES: dict[str, Callable[[Settings, int, int], float]] = {
    "constant": lambda settings, epoch, epochs: 1.0,
    "step": lambda settings, epoch, epochs: settings.gamma ** sum(epoch >= at for at in settings.milestones),
    "cosine": lambda settings, epoch, epochs: 0.5 * (1 + math.cos(math.pi * epoch / epochs)),
}

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def check_optimizer(name: str) -> None:
    """Refuse an unknown name.

    Raises:
        ConfigError: lists the legal ones.
    """
    _choice("optimizer", name, OPTIMIZERS)


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
    kind: Any = OPTIMIZERS[name]
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=learning_rate, weight_decay=weight_decay, fused=fused, **extra
    )
    return optimizer


def _choice(name: str, value: object, legal: Any) -> None:
    if value not in legal:
        names = [str(choice) for choice in legal]
        raise ConfigError(
            f"{name} is {value!r}.", where=name, got=value, expected=names, hint=nearest(str(value), names)
        )


def _require(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    try:
        fine = holds(value)
    except TypeError:
        fine = False
    if not fine:
        raise ConfigError(f"{name} is {value!r}; it must be {expected}.", where=name, got=value, expected=expected)
