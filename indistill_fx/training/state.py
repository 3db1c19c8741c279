"""What a run consists of, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from indistill_fx.curriculum import Budget
from indistill_fx.errors import ConfigError
from indistill_fx.losses.base import Criterion
from indistill_fx.runs.record import EpochRecord, MetricFacts
from indistill_fx.stages.stage import Stage


@dataclass(frozen=True, slots=True)
class Phase:
    """One part of a run, from its first to its last epoch: a stage of the warm-up, or the main stage.

    Attributes:
        name: the student's tap, or `main`.
        module: batch → scalar loss. What of it requires a gradient is trained.
        budget: how long and how.
        main: whether the run's learning rate schedule applies, and validation after every epoch.
        tap: what progress shows beside the name: the teacher's layer.
        cost: of one step, in any unit that is the same for all phases; used for the time left.
        attach: puts the teacher's features, from a cache, into a batch; None: the module computes them.
        also: what is added to the main loss, in words.
        early_stopping: it ends when so many epochs have not bettered the deciding metric; None: never.
    """

    name: str
    module: nn.Module
    budget: Budget
    main: bool = False
    tap: str = ""
    cost: float = 1.0
    attach: Callable[[Any], Any] | None = None
    also: str = ""
    early_stopping: int | None = None

    def stands_still(self, epochs: int, best: int | None) -> bool:
        """Whether the phase ends early after `epochs` epochs, given the last epoch with progress."""
        return self.early_stopping is not None and best is not None and epochs - best >= self.early_stopping

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen half of a stage, which is not saved and whose norms are not synchronised."""
        return self.module.teacher if isinstance(self.module, Stage) else None

    @property
    def channels_last(self) -> nn.Module | None:
        """The student's half, if it was lowered to channels last: its weights keep this layout during training."""
        report = self.module.report.student if isinstance(self.module, Stage) else ()
        rewritten = any(record.name == "channels_last" and record.done for record in report)
        return self.module.student if isinstance(self.module, Stage) and rewritten else None

    @property
    def criterion(self) -> Criterion | None:
        """The stage's loss, which can say more of itself than its value."""
        found = self.module.criterion if isinstance(self.module, Stage) else None
        return found if isinstance(found, Criterion) else None

    @property
    def summary(self) -> str:
        """The loss's report at the end of the phase; empty for most losses."""
        return self.criterion.summary if self.criterion is not None else ""

    def given(self, batch: Any) -> Any:
        """The batch in the form that the module takes."""
        return batch if self.attach is None else self.attach(batch)

    def to_json(self) -> dict[str, Any]:
        """Plain values for run.json: name, budget, and whether it is the main stage."""
        return {"name": self.name, "main": self.main, **asdict(self.budget)} | (
            {"also": self.also} if self.also else {}
        )


@dataclass(slots=True)
class State:
    """Where a run stands; with the tensors, all that a checkpoint holds.

    Attributes:
        phase: index of the phase under way; `leg` in files.
        epoch: finished epochs of it.
        batch: batches done in the epoch under way.
        steps: optimiser steps of the stage.
        epochs: finished epochs of the run.
        all_steps: optimiser steps of the run.
        loss_sum: of the batches done in the epoch under way.
        epoch_steps: optimiser steps of the epoch under way.
        seconds: spent training in the epoch under way.
        samples: learnt from in the epoch under way, by this process.
        waiting: seconds of the epoch under way in which it waited for batches.
        lowest: the plateau rule's lowest epoch loss.
        stale: epochs since.
        best: best value of the deciding metric.
        best_epoch: the main epoch it was measured after.
        history: every finished epoch, as `EpochRecord`.
        notes: by stage.
    """

    phase: int = 0
    epoch: int = 0
    batch: int = 0
    steps: int = 0
    epochs: int = 0
    all_steps: int = 0
    loss_sum: float = 0.0
    epoch_steps: int = 0
    seconds: float = 0.0
    samples: int = 0
    waiting: float = 0.0
    lowest: float | None = None
    stale: int = 0
    best: float | None = None
    best_epoch: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def read(cls, saved: Mapping[str, Any], path: Path) -> State:
        """Read the state from a checkpoint's entries.

        Raises:
            ConfigError: they are not a state.
        """
        known = {_IN_FILES.get(field.name, field.name): field.name for field in fields(cls)}
        wrong = [name for name, value in saved.items() if name not in known or not _fits(name, value)]
        if wrong:
            raise _unfit(path, f"its state has no fitting {wrong[0]!r}")
        return cls(**{known[name]: value for name, value in saved.items()})

    def summary_of(self, phase: Phase, metric: MetricFacts) -> str:
        """One line about the phase that has just ended."""
        epochs = [EpochRecord(**entry) for entry in self.history if entry["stage"] == phase.name]
        seconds = sum(epoch.seconds for epoch in epochs)
        value = epochs[-1].value(metric)
        metric_text = "" if value is None else f", {metric.title} {metric.text(value)}"
        losses = " → ".join(f"{epoch.loss:.4g}" for epoch in (epochs[0], *epochs[1:][-1:]))
        count = f"{_counted(len(epochs), 'epoch')}, {_counted(self.steps, 'step')}"
        return f"{phase.name}: {count}, {seconds:.1f} s, loss {losses}{metric_text}"

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {_IN_FILES.get(name, name): value for name, value in asdict(self).items()}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


_IN_FILES = {"phase": "leg"}
"""Names of 0.1.0 that files keep."""


def placed(state: State, before: Sequence[str], phases: Sequence[Phase], path: Path) -> State:
    """The state of a checkpoint among the phases of the resumed run, which may differ from the saved ones.

    A finished run whose main stage is to have more epochs stands in that stage again.

    Args:
        state: of the checkpoint.
        before: names of the phases of its run.
        phases: those now.
        path: the checkpoint.

    Raises:
        ConfigError: the phase it stands in is gone.
    """
    names = [phase.name for phase in phases]
    if state.phase < len(before):
        name = before[state.phase]
        if name not in names:
            raise ConfigError(
                f"{path} is in stage `{name}`, which this run does not have ({', '.join(names)}).",
                where=name,
                hint="Resume with the stages that the run was started with, or start a new run in another directory.",
            )
        state = replace(state, phase=names.index(name))
        budget = phases[state.phase].budget
        over = budget.unit == "epochs" and state.epoch >= budget.length
        return replace(state, phase=len(names), epoch=0, steps=0) if over and phases[state.phase].main else state
    done = [entry for entry in state.history if phases and entry["stage"] == names[-1]]
    still = bool(phases) and phases[-1].stands_still(len(done), state.best_epoch)
    steps = sum(entry["steps"] for entry in done)
    if phases and phases[-1].main and not phases[-1].budget.spent(len(done), steps) and not still:
        return replace(state, phase=len(names) - 1, epoch=len(done), steps=steps)
    return replace(state, phase=len(names))


def check_parts(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The parts of a checkpoint's header, those that may be absent filled in.

    Raises:
        ConfigError: one that may not is.
    """
    parts = {"optimizer": None, "optimizer_form": None, "scaler": None, "phases": None, **saved}
    if not all(isinstance(parts.get(name), dict) for name in ("identity", "state")):
        raise _unfit(path, "it does not say of which run it is, or where that stood")
    if not all(parts[name] is None or isinstance(parts[name], dict) for name in ("optimizer", "scaler")):
        raise _unfit(path, "its optimiser has no state")
    phases = parts["phases"]
    if phases is not None and not (isinstance(phases, list) and all(isinstance(name, str) for name in phases)):
        raise _unfit(path, "it does not say which stages its run has")
    return parts


def _fits(name: str, value: object) -> bool:
    if name == "history":
        return isinstance(value, list) and all(map(_is_epoch, value))
    if name == "notes":
        return isinstance(value, dict) and all(
            isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in value.values()
        )
    if name in ("lowest", "best", "best_epoch") and value is None:
        return True
    return is_number(value) and (
        name in ("lowest", "best", "loss_sum", "seconds", "waiting") or (isinstance(value, int) and value >= 0)
    )


def _is_epoch(entry: object) -> bool:
    """Whether an entry has the fields of `EpochRecord`."""
    if not isinstance(entry, dict) or not _NEEDED <= entry.keys() <= _NEEDED | _MEASURED:
        return False
    metrics, average = (entry.get(name) or {} for name in ("metrics", "average"))
    if not isinstance(metrics, dict) or not isinstance(average, dict) or not isinstance(entry["stage"], str):
        return False
    measured = [*(entry.get(name) for name in _MEASURED - {"metrics", "average"}), *metrics.values(), *average.values()]
    counts_valid = all(
        isinstance(entry[name], int) and is_number(entry[name]) and entry[name] >= 0 for name in ("epoch", "steps")
    )
    return (
        counts_valid
        and all(is_number(entry[name]) for name in _NEEDED - {"stage"})
        and all(value is None or is_number(value) for value in measured)
    )


_MEASURED = {"accuracy", "val_loss", "metrics", "average", "samples", "waiting", "peak_memory"}
_NEEDED = {"stage", "epoch", "steps", "loss", "learning_rate", "seconds"}


_MOST = 1 << 100


def is_number(value: object) -> bool:
    """Whether a value from a file is a number that one of ours can be; not a number is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_MOST < value < _MOST


def _unfit(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a checkpoint of a run: {why}.", where=str(path), hint="Start a new run in another directory."
    )
