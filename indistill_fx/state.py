"""What a run consists of, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from indistill_fx.curriculum import Budget


@dataclass(frozen=True, slots=True)
class Leg:
    """One stage of a run.

    Attributes:
        name: the student's tap, or `main`.
        module: batch → scalar loss. What of it requires a gradient is trained.
        budget: how long and how.
        main: whether the run's learning rate schedule applies, and validation after every epoch.
    """

    name: str
    module: nn.Module
    budget: Budget
    main: bool = False


@dataclass(slots=True)
class State:
    """Where a run stands; with the tensors, all that a checkpoint holds.

    Attributes:
        leg: index of the stage under way.
        epoch: finished epochs of it.
        batch: batches done in the epoch under way.
        steps: optimiser steps of the stage.
        epochs: finished epochs of the run.
        all_steps: optimiser steps of the run.
        loss_sum: of the batches done in the epoch under way.
        epoch_steps: optimiser steps of the epoch under way.
        seconds: spent training in the epoch under way.
        lowest: the plateau rule's lowest epoch loss.
        stale: epochs since.
        best: highest validation accuracy.
        best_epoch: the main epoch it was measured after.
        history: every finished epoch, as `EpochRecord`.
        notes: by stage.
    """

    leg: int = 0
    epoch: int = 0
    batch: int = 0
    steps: int = 0
    epochs: int = 0
    all_steps: int = 0
    loss_sum: float = 0.0
    epoch_steps: int = 0
    seconds: float = 0.0
    lowest: float | None = None
    stale: int = 0
    best: float | None = None
    best_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
