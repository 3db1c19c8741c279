"""The checkpoint of a run: written between any two steps, read back, and put into the phase that continues."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from indistill_fx.errors import IndistillError
from indistill_fx.runs.checkpoint import (
    load_checkpoint,
    model_tensors,
    not_finite,
    optimizer_form,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    state_tensors,
)
from indistill_fx.runs.directory import BEST, LAST, RunDirectory
from indistill_fx.system.tensor_files import save_tensors
from indistill_fx.training.identity import changes
from indistill_fx.training.parallel.fsdp import Shards, gathered, spread_optimizer
from indistill_fx.training.state import Phase, State, check_parts, placed

_SHARE = 20
"""Checkpoints at the ends of epochs leave so many times their own duration between them."""


class Saver:
    """Keeps a run's checkpoint, and knows what one read back still has to restore.

    Args:
        student: the module whose weights the run trains.
        phases: of the run, in order.
        accelerator: the run's.
        directory: where checkpoints go; None: nowhere.
        identity: what makes the run this run; a checkpoint of another is refused.
        average: a moving average of the student's weights, saved too.

    Attributes:
        shards: of the phase under way, where it is spread over processes.
        resumed: whether there is a checkpoint read that waits for its phase.
    """

    def __init__(
        self,
        student: nn.Module,
        phases: Sequence[Phase],
        accelerator: Accelerator,
        directory: RunDirectory | None,
        identity: Mapping[str, Any],
        average: nn.Module | None = None,
    ):
        self.shards: Shards | None = None
        self._student, self._phases, self._accelerator = student, phases, accelerator
        self._directory, self._identity = directory, dict(identity)
        self._average = {f"average/{name}": value for name, value in (average.state_dict() if average else {}).items()}
        self._read: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._saved_at, self._took = 0.0, 0.0
        # non-finite values from the start are intended, such as masks of -inf
        self._infinite = set(not_finite(model_tensors(student, None)))

    @property
    def resumed(self) -> bool:
        """Whether a checkpoint was read that lies within a phase."""
        return self._read is not None

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint at the end of an epoch."""
        return time.monotonic() - self._saved_at > _SHARE * self._took

    def whole(self) -> AbstractContextManager[None]:
        """Within the block, the student's tensors are complete, even if it is sharded."""
        return nullcontext() if self.shards is None else self.shards.whole()

    def read(self, path: Path, allowed: Sequence[str]) -> tuple[State, dict[str, tuple[Any, Any]]]:
        """Read a checkpoint: its tensors go into the student, or are stored for the phase that continues.

        Args:
            path: the checkpoint.
            allowed: settings that may differ from the checkpoint's run (see `identity.changes`).

        Returns:
            The state, and the settings that differ.

        Raises:
            ConfigError: it is unreadable, or of another run; names what differs.
        """
        tensors, saved = load_checkpoint(path)
        saved = check_parts(saved, path)
        average = {name: tensors.pop(name) for name in list(tensors) if name.startswith("average/")}
        found = changes(self._identity, saved["identity"], path, allowed=allowed)
        before = State.read(saved["state"], path)
        state = placed(before, saved["phases"] or [phase.name for phase in self._phases], self._phases, path)
        if average and self._average:
            restore_model(self._average, average)
        self._read = (tensors, saved)
        # the checkpoint lies between two phases, or at the end
        if saved["optimizer"] is None or state.phase == len(self._phases):
            student_tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("student/")}
            restore_model(model_tensors(self._student, None), student_tensors)
            if state.epoch:
                state.notes.setdefault(self._phases[state.phase].name, []).append(
                    "continues with a new optimiser: the checkpoint has none"
                )
            self._read = None if state == State() else (tensors, saved | {"optimizer": None})
        return state, found

    def restore_phase(self, phase: Phase) -> None:
        """Write the checkpoint's tensors into the phase that continues."""
        if self._read is not None and self._read[1]["optimizer"] is not None:
            restore_model(model_tensors(self._student, phase.module, without=phase.teacher), self._read[0])

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> str:
        """Give the phase's optimiser the state from the checkpoint, if there is one, and release what was read.

        Returns:
            A note if the checkpoint's state is of another optimiser, so that this one begins anew; otherwise nothing.
        """
        tensors, saved = self._read or ({}, {"optimizer": None})
        self._read = None
        if saved["optimizer"] is None:
            return ""
        if self._accelerator.scaler is not None and saved["scaler"]:
            self._accelerator.scaler.load_state_dict(saved["scaler"])
        if saved["optimizer_form"] not in (None, optimizer_form(optimizer)):
            return (
                "continues with a new optimiser: the checkpoint's is of another kind or groups its parameters otherwise"
            )
        if self.shards is not None:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            tensors = spread_optimizer(tensors, parameters)
        restore_optimizer(optimizer, tensors, saved["optimizer"])
        return ""

    def save(self, state: State, phase: Phase | None, optimizer: Any) -> str | None:
        """Write a checkpoint; between two phases it has no module and no optimiser.

        Returns:
            The name of a tensor that is not finite, in which case nothing is written; otherwise None.

        Raises:
            TrainError: the disk is full.
        """
        began = time.monotonic()
        with self.whole():
            module, teacher = (phase.module, phase.teacher) if phase is not None else (None, None)
            tensors, values, form = model_tensors(self._student, module, without=teacher) | self._average, None, None
            if phase is not None:
                entries, values = optimizer_tensors(optimizer)
                form = optimizer_form(getattr(optimizer, "optimizer", optimizer))  # without Accelerate's wrapper
                tensors |= {name: gathered(tensor) for name, tensor in entries.items()}
            bad = [name for name in not_finite(tensors) if name not in self._infinite or tensors[name].isnan().any()]
            if bad:
                return bad[0].partition("/")[2]
            if self._directory is not None and self._directory.writes:
                scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None
                parts = {"identity": self._identity, "state": state.to_json(), "optimizer": values, "scaler": scaler}
                parts |= {"optimizer_form": form, "phases": [entry.name for entry in self._phases]}
                save_checkpoint(self._directory.path / LAST, tensors, parts)
                self._saved_at = time.monotonic()
                self._took = self._saved_at - began
        return None

    @contextmanager
    def started(self, state: State) -> Iterator[None]:
        """Within the block, an error before the first step deletes the checkpoint, so that the run can be restarted in its directory."""
        try:
            yield
        except IndistillError:
            if not state.all_steps and self._directory is not None:
                self._directory.clear()
            raise

    def save_best(self, metric: str, value: float, epoch: int) -> None:
        """Write the student's weights as the best so far."""
        if self._directory is not None and self._directory.writes:
            header = {metric: str(value), "epoch": str(epoch)}
            save_tensors(self._directory.path / BEST, state_tensors(self._student), header)
