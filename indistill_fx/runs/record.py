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

from indistill_fx.version import __version__


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """The metric that decides what is best.

    Attributes:
        name: of it.
        higher_is_better: which way is up.
        share: whether its values are shares, written in per cent.
    """

    name: str = "accuracy"
    higher_is_better: bool = True
    share: bool = True

    @property
    def title(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than the best so far, if there is one."""
        return than is None or (value > than if self.higher_is_better else value < than)

    def text(self, value: float) -> str:
        """A value as people write it."""
        return f"{value:.2%}" if self.share else f"{value:.4g}"


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
        accuracy: on the validation data, where it was measured and the task has it.
        val_loss: likewise, the task's supervised loss.
        metrics: all of the task's, by name.
        average: likewise, of the moving average of the student's weights.
        samples: number of training samples, over all processes; None: an earlier version did not count them.
        waiting: seconds, of those above, in which the program waited for the next batch; likewise.
        peak_memory: the most bytes that the device held, a CPU's process since it began; None if it cannot be known.
    """

    stage: str
    epoch: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    accuracy: float | None = None
    val_loss: float | None = None
    metrics: Mapping[str, float] | None = None
    average: Mapping[str, float] | None = None
    samples: int | None = None
    waiting: float | None = None
    peak_memory: int | None = None

    @property
    def measured(self) -> Mapping[str, float] | None:
        """All metrics; runs of 0.1.0 have only the accuracy. None: nothing was measured."""
        return self.metrics or ({"accuracy": self.accuracy} if self.accuracy is not None else None)

    def value(self, metric: MetricFacts) -> float | None:
        """One metric's value."""
        return (self.measured or {}).get(metric.name)


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
        teacher_accuracy: measured before anything was trained; None without validation data or teacher, or if the task has none.
        accuracy: of the student in the end; likewise.
        best_accuracy: over the main epochs; its weights are in `files["best"]`.
        best_epoch: the main epoch after which the best was measured, from 1.
        steps: optimiser steps in all.
        seconds: spent training in all.
        digest: of the student's weights, buffers and flags: equal for equal runs.
        environment: versions, machine, device, processes.
        files: `run`, `metrics`, `plan`, `last`, `best`, `student`, `average` → path, for those that exist.
        task: what the labels mean.
        metric: which of the task's metrics decides what is best.
        metrics: all of them, of the student in the end; None without validation data.
        teacher_metrics: likewise, of the teacher.
        best: the deciding metric's best value over the main epochs.
        average: all metrics of the moving average of the student's weights, in the end; its weights are in `files["average"]`.
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
    task: str = "classification"
    metric: MetricFacts = field(default_factory=MetricFacts)
    metrics: Mapping[str, float] | None = None
    teacher_metrics: Mapping[str, float] | None = None
    best: float | None = None
    average: Mapping[str, float] | None = None

    @property
    def value(self) -> float | None:
        """The student's deciding metric at the end."""
        return (self.metrics or {}).get(self.metric.name)

    @property
    def teacher_value(self) -> float | None:
        """The deciding metric of the teacher."""
        return (self.teacher_metrics or {}).get(self.metric.name)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dump`."""
        return asdict(self)


def environment(device: str, processes: int) -> dict[str, Any]:
    """Versions and machine."""
    packages = ("torch", "torchvision", "accelerate", "safetensors", "numpy")
    # platform.platform() would start a subprocess
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "processes": processes,
        "versions": {
            "indistill-fx": __version__,
            **{name: version for name in packages if (version := _version(name))},
        },
    }


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
