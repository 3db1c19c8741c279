"""The training loop, on one page: stages, epochs, steps; checkpoints between any two steps.

A run is a function of its seed. Batches follow from (loader's seed, epoch), everything random in model and loss from
(seed, epoch, batch, process), the learning rate from the epoch. A checkpoint needs no random state, and a resumed run
ends, on a CPU, with the same bits as one that never stopped. Devices, mixed precision and processes are Accelerate's.
"""

from __future__ import annotations

import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.errors import TrainError
from indistill_fx.runs.checkpoint import (
    load_checkpoint,
    model_tensors,
    not_finite,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
    save_checkpoint,
    save_tensors,
    state_tensors,
)
from indistill_fx.runs.directory import BEST, LAST, RunDirectory
from indistill_fx.runs.record import EpochRecord
from indistill_fx.system.random_state import reseed
from indistill_fx.training.fsdp import Shards, gathered, spread_optimizer
from indistill_fx.training.nonfinite import first_not_finite, not_finite_error
from indistill_fx.training.processes import first_says, mean_over_processes, sharding_asked
from indistill_fx.training.progress import Reporter
from indistill_fx.training.settings import Settings, make_optimizer
from indistill_fx.training.signals import Interrupted, StopRequest
from indistill_fx.training.state import Leg, State, check_parts, require_same_run
from indistill_fx.training.sync_batch_norm import batch_norms_synced, unsynced_batch_norms
from indistill_fx.training.torch_compile import compiled

_SAVING_SHARE = 20
"""Checkpoints at the ends of epochs leave so many times their own duration between them."""


class Engine:
    """Trains a student through stages.

    Args:
        student: the module whose weights the stages train.
        legs: the stages, in order.
        loader: the whole run's batches; every process takes its share of each.
        settings: how.
        accelerator: the run's.
        directory: where checkpoints and metrics go; None: nowhere.
        reporter: told of every step.
        stop: asked after every step.
        validate: the student's (accuracy, loss) on the validation data; None: no validation.
        check: looks at every batch of the run's first epoch, and raises if one cannot be right.
        identity: what makes the run this run; a checkpoint of another is refused.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        legs: list[Leg],
        loader: EpochLoader,
        settings: Settings,
        accelerator: Accelerator,
        directory: RunDirectory | None,
        reporter: Reporter,
        stop: StopRequest,
        validate: Callable[[], tuple[float, float]] | None,
        check: Callable[[int, Any], None],
        identity: Mapping[str, Any],
    ):
        self.state = State()
        self._student, self._legs, self._settings = student, legs, settings
        self._directory, self._reporter, self._stop = directory, reporter, stop
        self._accelerator = accelerator
        self._validate, self._check, self._identity = validate, check, dict(identity)
        self._loader = loader.shard(accelerator.process_index, accelerator.num_processes)
        self._saved: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._pending: list[Tensor] = []
        self._shards: Shards | None = None
        self._since, self._saved_at, self._save_took = time.monotonic(), 0.0, 0.0
        # Reading a loss waits for the device; a CPU is never behind, so there every step is checked before it is taken.
        self._check_every = 1 if accelerator.device.type == "cpu" else 50
        self._infinite = set(not_finite(model_tensors(student, None)))  # masks of -inf, for example, are meant

    def run(self) -> None:
        """Train every stage from where the state stands.

        Raises:
            TrainError: a loss or a weight is not finite, or the disk is full. The last checkpoint is good.
            Interrupted: SIGINT or SIGTERM arrived. A checkpoint was saved.
        """
        if self._saved is None:
            self._save(None, None)
        for index in range(self.state.leg, len(self._legs)):
            self._train_leg(index, self._legs[index])

    def _train_leg(self, index: int, leg: Leg) -> None:
        together = self._settings.sync_batch_norm and self._accelerator.num_processes > 1
        with batch_norms_synced(leg.module) if together else nullcontext():
            if together and (alone := unsynced_batch_norms(leg.module)):
                self._note(leg, f"{alone} batch norms are not torch.nn's: each process has its own statistics for them")
            module, optimizer = self._prepare(leg)
            self._reporter.open(leg.name, self.state.steps, tap=leg.tap)
            with self._shards or nullcontext():
                while self.state.leg == index:
                    self._set_rate(leg, optimizer)
                    self._train_epoch(leg, module, optimizer)
                    self._close_epoch(leg, optimizer)
            self._shards = None
        self._accelerator.unwrap_model(module, keep_fp32_wrapper=False)

    def _train_epoch(self, leg: Leg, module: nn.Module, optimizer: Any) -> None:
        settings, group = self._settings, 0
        for index, batch in self._batches(leg):
            boundary = (index + 1) % settings.accumulate == 0 or index + 1 == len(self._loader)
            reseed(settings.seed, self.state.epochs, index, self._accelerator.process_index)
            with nullcontext() if boundary else self._accelerator.no_sync(module):
                loss = module(batch)
                self._watch(leg, loss, batch)
                self._accelerator.backward(loss)
            group += 1
            if boundary:
                self._step(optimizer, group)
                group = 0
                self._after_step(leg, optimizer)
                if self._used_up(leg):
                    break
        self._read_losses(leg)

    def _step(self, optimizer: Any, group: int) -> None:
        parameters = [parameter for entry in optimizer.param_groups for parameter in entry["params"]]
        if group > 1:  # the mean over the batches there were: at an epoch's end they may be fewer
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(group)
        if self._settings.clip_norm is not None:
            self._accelerator.clip_grad_norm_(parameters, self._settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        self.state.steps += 1
        self.state.all_steps += 1
        self.state.epoch_steps += 1

    def _after_step(self, leg: Leg, optimizer: Any) -> None:
        """Report; save if it is time; stop if asked."""
        state, settings = self.state, self._settings
        self._reporter.step(state.steps, state.epoch + 1, self._mean_loss())
        if state.all_steps % settings.log_every_steps == 0:
            rate = float(optimizer.param_groups[0]["lr"])
            self._log("step", stage=leg.name, epoch=state.epoch + 1, loss=self._mean_loss(), learning_rate=rate)
        stop = self._asked_to_stop()
        if stop or (settings.checkpoint_every_steps and state.all_steps % settings.checkpoint_every_steps == 0):
            self._save(leg, optimizer)
        if stop:
            raise self._interrupted(leg)

    def _close_epoch(self, leg: Leg, optimizer: Any) -> None:
        self._tick()
        with self._whole() if leg.main and self._validate is not None else nullcontext():
            self._record_epoch(leg, float(optimizer.param_groups[0]["lr"]))
        over = self._finished(leg)
        if over:
            self._next_leg(leg)
        due = time.monotonic() - self._saved_at > _SAVING_SHARE * self._save_took
        if self.state.leg == len(self._legs) or first_says(self._accelerator, due):
            self._save(None if over else leg, optimizer)
        self._since = time.monotonic()

    def _record_epoch(self, leg: Leg, rate: float) -> None:
        state = self.state
        loss = mean_over_processes(self._accelerator, self._mean_loss())
        measured = leg.main and self._validate is not None and self._accelerator.is_main_process
        accuracy, val_loss = self._validate() if measured and self._validate else (None, None)
        record = EpochRecord(
            leg.name, state.epoch + 1, state.epoch_steps, loss, rate, state.seconds, accuracy, val_loss
        )
        state.history.append(asdict(record))
        state.epoch, state.epochs = state.epoch + 1, state.epochs + 1
        state.batch, state.epoch_steps, state.loss_sum, state.seconds = 0, 0, 0.0, 0.0
        fell = state.lowest is None or loss < state.lowest * (1 - leg.budget.progress)
        state.lowest, state.stale = (loss, 0) if fell else (state.lowest, state.stale + 1)
        self._log("epoch", **asdict(record))
        self._reporter.epoch(leg.name, state.steps, loss, accuracy)
        if accuracy is not None and (state.best is None or accuracy > state.best):
            state.best, state.best_epoch = accuracy, state.epoch
            self._save_best()

    def _batches(self, leg: Leg) -> Iterator[tuple[int, Any]]:
        if self._used_up(leg):  # stopped by a signal between the last step and the end of the epoch
            return
        self._loader.set_epoch(self.state.epochs)
        self._loader.skip(self.state.batch)
        device = self._accelerator.device
        for index, batch in enumerate(self._loader, start=self.state.batch):
            if self.state.epochs == 0:
                self._check(index, batch)
            yield index, send_to_device(leg.given(batch), device, non_blocking=True)

    def _used_up(self, leg: Leg) -> bool:
        return leg.budget.unit == "steps" and self.state.steps >= leg.budget.length

    def _finished(self, leg: Leg) -> bool:
        if leg.budget.patience is not None and self.state.stale >= leg.budget.patience:
            return True
        return self._used_up(leg) or (leg.budget.unit == "epochs" and self.state.epoch >= leg.budget.length)

    def _next_leg(self, leg: Leg) -> None:
        state = self.state
        epochs = [EpochRecord(**entry) for entry in state.history if entry["stage"] == leg.name]
        if state.epoch < leg.budget.length and leg.budget.unit == "epochs":
            self._note(leg, f"ended after {state.epoch} of {leg.budget.length} epochs: the loss stood still")
        if said := getattr(getattr(leg.module, "criterion", None), "said", ""):
            self._note(leg, said)
        seconds = sum(epoch.seconds for epoch in epochs)
        accuracy = "" if epochs[-1].accuracy is None else f", accuracy {epochs[-1].accuracy:.2%}"
        losses = " → ".join(f"{epoch.loss:.4g}" for epoch in dict.fromkeys((epochs[0], epochs[-1])))
        count = f"{len(epochs)} epoch{'s' if len(epochs) > 1 else ''}, {state.steps} steps"
        self._reporter.close(leg.name, f"{leg.name}: {count}, {seconds:.1f} s, loss {losses}{accuracy}")
        state.leg, state.epoch, state.steps, state.lowest, state.stale = state.leg + 1, 0, 0, None, 0

    def _set_rate(self, leg: Leg, optimizer: Any) -> None:
        rate = leg.budget.learning_rate or self._settings.learning_rate
        if leg.main:
            rate = self._settings.rate(self.state.epoch, leg.budget.length)
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _prepare(self, leg: Leg) -> tuple[nn.Module, Any]:
        """The stage on the device, in train mode, wrapped for processes and precision; and its optimiser."""
        settings, budget = self._settings, leg.budget
        self._accelerator.free_memory()  # else it would unscale the gradients of the last stage's optimiser too
        leg.module.train()
        self._student.train()  # last, so that a model's own train(), which may keep a norm frozen, has the say
        leg.module.to(self._accelerator.device)
        if self._saved is not None and self._saved[1]["optimizer"] is not None:
            restore_model(model_tensors(self._student, leg.module), self._saved[0])
        if sharding_asked(settings) and self._accelerator.num_processes > 1:
            self._shards = Shards(leg.module)
        # Parameters are moved in place, so the optimiser's are the student's wherever it was.
        optimizer = make_optimizer(
            budget.optimizer or settings.optimizer,
            [parameter for parameter in leg.module.parameters() if parameter.requires_grad],
            learning_rate=budget.learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay if leg.main else 0.0,
            momentum=settings.momentum,
            sharded=self._shards is not None,
        )
        if self._saved is not None:
            self._restore(optimizer)
        module = self._compiled(leg) if settings.compile else leg.module
        with warnings.catch_warnings():
            # Accelerate knows no other name for it yet.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            sharded = self._shards is not None  # then it is not wrapped again: `evaluation_mode` leaves DDP out
            prepared = self._accelerator.prepare_model(module, evaluation_mode=sharded)
        self._since = time.monotonic()
        return prepared, self._accelerator.prepare_optimizer(optimizer)

    def _whole(self) -> AbstractContextManager[None]:  # in it the student's tensors can be read, sharded or not
        return nullcontext() if self._shards is None else self._shards.whole()

    def _compiled(self, leg: Leg) -> nn.Module:
        def trial(stage: nn.Module) -> Any:
            self._loader.set_epoch(self.state.epochs)
            with self._accelerator.autocast():
                return stage(send_to_device(leg.given(next(iter(self._loader))), self._accelerator.device))

        module, note = compiled(leg.module, trial)
        self._note(leg, note)
        return module

    def _watch(self, leg: Leg, loss: Tensor, batch: Any) -> None:
        self._pending.append(loss.detach())
        self.state.batch += 1
        if len(self._pending) >= self._check_every:
            self._read_losses(leg, batch)

    def _read_losses(self, leg: Leg, batch: Any = None) -> None:
        first = self.state.batch - len(self._pending) + 1
        for number, loss in enumerate(self._pending, start=first):
            value = float(loss)
            if not math.isfinite(value):
                known = batch is not None and number == self.state.batch and self._shards is None
                origin = first_not_finite(leg.module, batch) if known else ""  # of the last batch only
                raise self._failed(leg.name, f"the loss is {value}{f', {origin}' if origin else ''}", number)
            self.state.loss_sum += value
        self._pending.clear()

    def _mean_loss(self) -> float:
        return self.state.loss_sum / max(self.state.batch - len(self._pending), 1)

    def _failed(self, stage: str, what: str, batch: int | None = None) -> TrainError:
        kept = self._directory is not None and self._directory.has_checkpoint
        where = f"stage `{stage}`, epoch {self.state.epoch + 1}, step {self.state.batch if batch is None else batch}"
        return not_finite_error(where, what, kept=kept)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: it is unreadable, or of another run; names what differs.
        """
        tensors, saved = load_checkpoint(path)
        saved = check_parts(saved, path)
        require_same_run(self._identity, saved["identity"], path)
        self.state, self._saved = State.read(saved["state"], path), (tensors, saved)
        if saved["optimizer"] is None:  # between two stages
            restore_model(model_tensors(self._student, None), tensors)
            self._saved = None if self.state == State() else (tensors, saved)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        tensors, saved = self._saved or ({}, {})
        if saved["optimizer"] is not None:
            if self._shards is not None:
                tensors = spread_optimizer(tensors, optimizer.param_groups[0]["params"])
            restore_optimizer(optimizer, tensors, saved["optimizer"])
            if self._accelerator.scaler is not None and saved["scaler"]:
                self._accelerator.scaler.load_state_dict(saved["scaler"])
        self._saved = None

    def _save(self, leg: Leg | None, optimizer: Any) -> None:
        """Save everything; between two stages there is no optimiser worth saving."""
        with self._whole():
            self._save_whole(leg, optimizer)

    def _save_whole(self, leg: Leg | None, optimizer: Any) -> None:
        began = time.monotonic()
        tensors, values = model_tensors(self._student, leg.module if leg else None), None
        if leg is not None:
            self._read_losses(leg)
            if self.state.batch:  # within an epoch all processes save; a resumed one starts from what is saved here
                self.state.loss_sum = mean_over_processes(self._accelerator, self.state.loss_sum)
            self._tick()
            entries, values = optimizer_tensors(optimizer)
            tensors |= {name: gathered(tensor) for name, tensor in entries.items()}
        bad = [name for name in not_finite(tensors) if name not in self._infinite]
        if bad:
            name = leg.name if leg else self._legs[max(self.state.leg - 1, 0)].name
            raise self._failed(name, f"`{bad[0].partition('/')[2]}` is not finite")
        if self._directory is not None and self._directory.writes:
            scaler = self._accelerator.scaler.state_dict() if self._accelerator.scaler is not None else None
            state = {"identity": self._identity, "state": asdict(self.state), "optimizer": values, "scaler": scaler}
            save_checkpoint(self._directory.path / LAST, tensors, state)
            self._saved_at = time.monotonic()
            self._save_took = self._saved_at - began

    def _save_best(self) -> None:
        if self._directory is not None and self._directory.writes:
            header = {"accuracy": str(self.state.best), "epoch": str(self.state.best_epoch)}
            save_tensors(self._directory.path / BEST, state_tensors(self._student), header)

    def _asked_to_stop(self) -> bool:
        """Whether a signal arrived, in any of the processes: they stop after the same step."""
        if self._accelerator.num_processes == 1:
            return self._stop.number is not None
        if self._stop.number is not None:
            self._accelerator.set_trigger()
        return bool(self._accelerator.check_trigger())

    def _interrupted(self, leg: Leg) -> Interrupted:
        place = f"stage `{leg.name}`, epoch {self.state.epoch + 1}, step {self.state.batch}"
        kept = self._directory.path / LAST if self._directory else "nowhere"
        message = f"Stopped in {place}. Saved to {kept}; go on with resume=True (--resume)."
        self._reporter.say(message)  # click swallows what a KeyboardInterrupt says
        return Interrupted(message, self._stop.number or signal.SIGTERM)

    def _log(self, kind: str, **entry: Any) -> None:
        if self._directory is not None:
            self._directory.log({"kind": kind, "epochs": self.state.epochs, "step": self.state.all_steps, **entry})

    def _note(self, leg: Leg, text: str) -> None:
        self.state.notes.setdefault(leg.name, []).append(text)
        self._reporter.say(f"{leg.name}: {text}")

    def _tick(self) -> None:
        before, self._since = self._since, time.monotonic()
        self.state.seconds += self._since - before
