"""The record of a run: what each stage and epoch did, and where."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One epoch.

    Attributes:
        stage: name of the stage: the student's tap, or `main`.
        epoch: within the stage, from 1.
        steps: optimiser steps taken.
        loss: mean over the batches.
        learning_rate: of the epoch.
        seconds: spent training, without evaluation.
        accuracy: on the validation data, where it was measured.
        val_loss: likewise, cross-entropy.
    """

    stage: str
    epoch: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    accuracy: float | None = None
    val_loss: float | None = None


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One stage.

    Attributes:
        name: the student's tap, or `main`.
        losses: mean loss of every epoch.
        steps: optimiser steps taken.
        seconds: spent training.
        notes: what the reader should know: an early end, a compilation that failed.
    """

    name: str
    losses: tuple[float, ...]
    steps: int
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """Number of epochs."""
        return len(self.losses)


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a finished run returns.

    Attributes:
        stages: in the order trained.
        epochs: of all stages.
        teacher_accuracy: measured before anything was trained; None without validation data or teacher.
        accuracy: of the student in the end; None without validation data.
        best_accuracy: over the main epochs; its weights are in `files["best"]`.
        best_epoch: the main epoch it was measured after, from 1.
        steps: optimiser steps in all.
        seconds: spent training in all.
        digest: of the student's weights, buffers and flags: equal for equal runs.
        environment: versions, machine, device, processes.
        files: `run`, `metrics`, `plan`, `last`, `best`, `student` → path, for those that exist.
    """

    stages: tuple[StageRecord, ...]
    epochs: tuple[EpochRecord, ...]
    teacher_accuracy: float | None
    accuracy: float | None
    best_accuracy: float | None
    best_epoch: int | None
    steps: int
    seconds: float
    digest: str
    environment: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self)


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions and machine."""
    packages = ("indistill-fx", "torch", "torchvision", "accelerate", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",  # platform() runs a program for it
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": processes,
        "versions": {name: version for name in packages if (version := _version(name))},
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
