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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from indistill_fx.data.foreign import with_last
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.errors import TrainError
from indistill_fx.evaluation.accuracy import Evaluation
from indistill_fx.graph.module_state import left_in_eval
from indistill_fx.passes.lowering.layout import laid_out
from indistill_fx.runs.directory import LAST, RunDirectory
from indistill_fx.runs.record import EpochRecord, MetricFacts
from indistill_fx.system.nested import count_of, to_device
from indistill_fx.system.random_state import reseed
from indistill_fx.system.signals import Interrupted, StopRequest
from indistill_fx.training.memory import noticing_full_memory
from indistill_fx.training.nonfinite import first_not_finite, not_finite_error
from indistill_fx.training.options.averaging import make_average
from indistill_fx.training.options.optimizers import make_optimizer
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.parallel.devices import forget_peak, peak_memory
from indistill_fx.training.parallel.fsdp import Shards
from indistill_fx.training.parallel.processes import first_says, launched_for_sharding, mean_over_processes
from indistill_fx.training.parallel.sync_batch_norm import Share, batch_norms_synced, unsynced_batch_norms
from indistill_fx.training.progress import Reporter
from indistill_fx.training.saver import Saver
from indistill_fx.training.state import Phase, State
from indistill_fx.training.step.cuda_graph import CudaRecorder
from indistill_fx.training.step.losses import Losses
from indistill_fx.training.step.recorded import why_not_recorded
from indistill_fx.training.step.step import Step
from indistill_fx.training.step.torch_compile import compiled


class TrainingLoop:
    """Trains a student through stages.

    Args:
        student: the module whose weights the stages train.
        phases: the stages, in order.
        loader: this process's share of the whole run's batches.
        settings: how.
        accelerator: the run's.
        directory: where checkpoints and metrics go; None: nowhere.
        reporter: called for every step.
        stop: asked after every step.
        validate: measures a module on the validation data; None: no validation.
        check: looks at every batch of the run's first epoch, and raises if one cannot be right.
        metric: which of the metrics decides what is best.
        mix: what is done to batches of the main stage before they are learnt from; None: nothing.
        identity: what makes the run this run; a checkpoint of another is refused.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        phases: list[Phase],
        loader: EpochLoader,
        settings: Settings,
        accelerator: Accelerator,
        directory: RunDirectory | None,
        reporter: Reporter,
        stop: StopRequest,
        validate: Callable[[nn.Module], Evaluation] | None,
        check: Callable[[int, Any], None],
        metric: MetricFacts,
        mix: Callable[[Any], Any] | None = None,
        identity: Mapping[str, Any],
    ):
        self.state = State()
        self._student, self.phases, self._settings = student, phases, settings
        self._directory, self._reporter, self._stop = directory, reporter, stop
        self._accelerator = accelerator
        self._validate, self._check, self.metric = validate, check, metric
        self._loader = loader.to(accelerator.device)
        self._mix, self.average = mix, make_average(student, settings.average, accelerator.device)
        self._saver = Saver(student, phases, accelerator, directory, identity, self.average)
        self._losses, self._share = Losses(accelerator.device), Share()
        self._in_eval = left_in_eval(student)
        self._records = why_not_recorded(settings, accelerator.device.type, accelerator.num_processes) is None
        self._sharded = (settings.shard or launched_for_sharding()) and accelerator.num_processes > 1
        self._since = time.monotonic()

    def run(self) -> None:
        """Train all stages, starting from the current state.

        Raises:
            TrainError: a loss or a weight is not finite, or the disk is full. The last checkpoint is intact.
            Interrupted: SIGINT or SIGTERM arrived. A checkpoint was saved.
        """
        if not self._saver.resumed:
            self._save(None, None)
        with self._saver.started(self.state):
            for index in range(self.state.phase, len(self.phases)):
                self._train_phase(index, self.phases[index])

    def _train_phase(self, index: int, phase: Phase) -> None:
        together = self._settings.sync_batch_norm and self._accelerator.num_processes > 1
        with batch_norms_synced(phase.module) if together else nullcontext(Share()) as self._share:
            if together and (alone := unsynced_batch_norms(phase.module, without=phase.teacher)):
                self._note(phase, f"{alone} batch norms are not torch.nn's: each process has its own statistics")
            half = phase.channels_last if not self._sharded else None
            with laid_out(half) if half is not None else nullcontext():
                step = self._prepare(phase)
                self._reporter.open(phase.name, self.state.steps, tap=phase.tap)
                with self._saver.shards or nullcontext():
                    while self.state.phase == index:
                        self._train_epoch(phase, step)
                        self._close_epoch(phase, step)
            self._saver.shards, step.recorded = None, None  # a recording holds its memory until it is deleted
        self._accelerator.unwrap_model(step.module, keep_fp32_wrapper=False)

    def _train_epoch(self, phase: Phase, step: Step) -> None:
        settings, group = self._settings, 0
        for index, batch, last in self._batches(phase):
            boundary = last or (index + 1) % settings.accumulate == 0
            reseed(settings.seed, self.state.epochs, index, self._accelerator.process_index)
            samples = count_of(batch)
            self._share.counts = samples > 0 or self._accelerator.num_processes == 1
            batch = self._mix(batch) if self._mix is not None and phase.main and samples else batch
            step.set_rate(self._rate(phase))
            if phase.criterion is not None:
                phase.criterion.at_step(self.state.steps)
            with self._noticing(phase, batch), nullcontext() if boundary else self._accelerator.no_sync(step.module):
                loss = step.learn(batch, samples) if step.recorded is None else step.recorded(batch)
            self.state.batch += 1
            self._look(phase, self._losses.add(loss), batch)
            group += 1
            if boundary:
                if step.recorded is None:  # a recorded step includes the update
                    with self._noticing(phase, batch):  # an optimiser allocates its state at its first step
                        step.update(group)  # the last group of an epoch may have fewer batches
                group = 0
                self._after_step(phase, step)
                if self._used_up(phase):
                    break
        self._look(phase, self._losses.rest())

    def _after_step(self, phase: Phase, step: Step) -> None:
        """Count and report the step; save if it is time; stop if a signal asks for it."""
        state, settings = self.state, self._settings
        state.steps, state.all_steps, state.epoch_steps = state.steps + 1, state.all_steps + 1, state.epoch_steps + 1
        self._reporter.step(state.steps, state.epoch + 1, self._mean_loss())
        if state.all_steps % settings.log_every_steps == 0:
            self._log("step", stage=phase.name, epoch=state.epoch + 1, loss=self._mean_loss(), learning_rate=step.rate)
        stop, save = self._asked()
        every = settings.checkpoint_every_steps
        if stop or save or (every and state.all_steps % every == 0):
            self._save(phase, step.optimizer)
        if save and not stop:
            self._reporter.say(f"Saved after {state.all_steps} steps, because of a signal.")
        if stop:
            raise self._interrupted(phase)

    def _close_epoch(self, phase: Phase, step: Step) -> None:
        self._tick()
        with self._saver.whole() if phase.main and self._validate is not None else nullcontext():
            self._record_epoch(phase, self._rate(phase) if step.rate is None else step.rate)
        over = self._finished(phase)
        if over:
            self._next_phase(phase, step)
        if self.state.phase == len(self.phases) or first_says(self._accelerator, self._saver.due):
            # The last save includes the optimiser as well: the run may be given more epochs.
            self._save(None if over and self.state.phase < len(self.phases) else phase, step.optimizer)
        self._since = time.monotonic()

    def _record_epoch(self, phase: Phase, rate: float) -> None:
        state = self.state
        loss = mean_over_processes(self._accelerator, self._mean_loss())
        measured = phase.main and self._validate is not None and self._accelerator.is_main_process
        found = self._validate(self._student) if measured and self._validate else None
        samples = round(mean_over_processes(self._accelerator, state.samples) * self._accelerator.num_processes)
        record = EpochRecord(
            phase.name, state.epoch + 1, state.epoch_steps, loss, rate, state.seconds,
            samples=samples, waiting=state.waiting, peak_memory=peak_memory(self._accelerator.device),
        )  # fmt: skip
        if found and self._validate:
            average = self._validate(self.average.module).values if self.average else None
            record = replace(
                record, accuracy=found.accuracy, val_loss=found.loss, metrics=found.values, average=average
            )
        state.history.append(asdict(record))
        state.epoch, state.epochs = state.epoch + 1, state.epochs + 1
        state.batch, state.epoch_steps, state.loss_sum = 0, 0, 0.0
        state.seconds, state.samples, state.waiting = 0.0, 0, 0.0
        fell = state.lowest is None or loss < state.lowest - abs(state.lowest) * phase.budget.progress
        state.lowest, state.stale = (loss, 0) if fell else (state.lowest, state.stale + 1)
        self._log("epoch", **asdict(record))
        value = record.value(self.metric)
        self._reporter.epoch(phase.name, state.steps, loss, value)
        if value is not None and self.metric.better(value, state.best):
            state.best, state.best_epoch = value, state.epoch
            self._saver.save_best(self.metric.name, value, state.epoch)

    # Helpers of the loop above.

    def _batches(self, phase: Phase) -> Iterator[tuple[int, Any, bool]]:
        if self._used_up(phase):  # a signal stopped the run between the epoch's last step and its end
            return
        self._loader.set_epoch(self.state.epochs)
        self._loader.skip(self.state.batch)
        forget_peak(device := self._accelerator.device)
        batches = with_last(iter(self._loader), known=self._settings.accumulate == 1)  # each is a group of its own
        for index, (batch, last) in enumerate(self._awaited(batches), start=self.state.batch):
            if self.state.epochs == 0:
                self._check(index, batch)
            yield index, to_device(phase.given(batch), device, non_blocking=True), last
        if self._loader.left_out and self.state.epoch == 0:
            self._note(phase, f"batches of fewer than {self._loader.least} samples are left out: batch norms need more")
        if self._loader.longer and self.state.epochs == 0:
            self._note(phase, self._loader.longer)

    def _awaited(self, batches: Iterator[tuple[Any, bool]]) -> Iterator[tuple[Any, bool]]:
        """The batches of a loader; the time spent waiting for each is recorded."""
        while True:
            began = time.monotonic()
            found = next(batches, None)
            waited = time.monotonic() - began
            self.state.waiting += waited
            if found is None:
                return
            samples = count_of(found[0])
            self.state.samples += samples
            self._reporter.batch(samples * self._accelerator.num_processes, waited)
            yield found

    def _used_up(self, phase: Phase) -> bool:
        return phase.budget.unit == "steps" and phase.budget.spent(self.state.epoch, self.state.steps)

    def _finished(self, phase: Phase) -> bool:
        if phase.budget.patience is not None and self.state.stale >= phase.budget.patience:
            return True
        if phase.early_stopping and first_says(
            self._accelerator, phase.stands_still(self.state.epoch, self.state.best_epoch)
        ):
            return True
        return phase.budget.spent(self.state.epoch, self.state.steps)

    def _next_phase(self, phase: Phase, step: Step) -> None:
        state = self.state
        if state.epoch < phase.budget.length and phase.budget.unit == "epochs":
            quantity = self.metric.title if phase.main else "loss"
            self._note(phase, f"ended after {state.epoch} of {phase.budget.length} epochs: {quantity} has stalled")
        for text in (phase.summary, step.recorded.note if step.recorded is not None else ""):
            if text:
                self._note(phase, text)
        self._reporter.close(phase.name, state.summary_of(phase, self.metric))
        state.phase, state.epoch, state.steps, state.lowest, state.stale = state.phase + 1, 0, 0, None, 0

    def _rate(self, phase: Phase) -> float:
        if phase.main:
            return self._settings.rate(self.state.epoch, phase.budget.length, self.state.steps)
        return phase.budget.learning_rate or self._settings.learning_rate

    def _prepare(self, phase: Phase) -> Step:
        """Put the stage on the device and in train mode, wrap it for several processes and the precision, and make its optimiser."""
        settings, budget = self._settings, phase.budget
        self._accelerator.free_memory()  # otherwise it would unscale the previous stage's gradients as well
        phase.module.train()
        self._student.train()  # last, because a model's own train() may keep some norms frozen
        for part in self._in_eval:
            part.training = False
        phase.module.to(self._accelerator.device)
        self._saver.restore_phase(phase)
        if self._sharded:
            self._saver.shards = Shards(phase.module, phase.teacher)
        # Parameters are moved in place, so the optimiser's parameters are still the student's.
        optimizer = make_optimizer(
            budget.optimizer or settings.optimizer,
            [parameter for parameter in phase.module.parameters() if parameter.requires_grad],
            learning_rate=budget.learning_rate or settings.learning_rate,
            weight_decay=settings.weight_decay if phase.main else 0.0,
            momentum=settings.momentum,
            nesterov=settings.nesterov and phase.main,
            decay_norms=settings.decay_norms,
            sharded=self._sharded,
            recordable=self._records,
        )
        if note := self._saver.restore_optimizer(optimizer):
            self._note(phase, note)
        module = self._compiled(phase) if settings.compile else phase.module
        with warnings.catch_warnings():
            # Accelerate does not know the new name of this option yet.
            warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
            sharded = self._saver.shards is not None  # no DDP around sharded modules: `evaluation_mode` skips it
            prepared = self._accelerator.prepare_model(module, evaluation_mode=sharded)
        self._since = time.monotonic()
        average = partial(self.average.update_parameters, self._student) if self.average and phase.main else None
        return Step(
            self._accelerator,
            prepared,
            self._accelerator.prepare_optimizer(optimizer),
            clip_norm=settings.clip_norm,
            after_update=average,
            average=self.average,
            recorder=CudaRecorder(self._accelerator.device) if self._records else None,
        )

    def _compiled(self, phase: Phase) -> nn.Module:
        def trial(stage: nn.Module) -> Any:
            self._loader.set_epoch(self.state.epochs)
            with self._accelerator.autocast():
                return stage(to_device(phase.given(next(iter(self._loader))), self._accelerator.device))

        module, note = compiled(phase.module, trial, self._settings.compile_mode)
        self._note(phase, note)
        return module

    def _noticing(self, phase: Phase, batch: Any) -> AbstractContextManager[None]:
        kept = self._directory is not None and self._directory.has_checkpoint
        return noticing_full_memory(phase.name, batch, accumulate=self._settings.accumulate, kept=kept)

    def _look(self, phase: Phase, losses: list[float], batch: Any = None) -> None:
        """Add up the losses that have arrived; stop the run at one that is not finite. On a CPU this happens before the step's update."""
        first = self.state.batch - self._losses.unread - len(losses) + 1
        for number, value in enumerate(losses, start=first):
            if not math.isfinite(value):
                # only the last batch is still there to be looked at
                known = batch is not None and number == self.state.batch and self._saver.shards is None
                origin = first_not_finite(phase.module, batch) if known else ""
                raise self._failed(phase.name, f"the loss is {value}{f', {origin}' if origin else ''}", number)
            self.state.loss_sum += value

    def _mean_loss(self) -> float:
        return self.state.loss_sum / max(self.state.batch - self._losses.unread, 1)

    def _failed(self, stage: str, problem: str, batch: int | None = None) -> TrainError:
        kept = self._directory is not None and self._directory.has_checkpoint
        where = f"stage `{stage}`, epoch {self.state.epoch + 1}, step {self.state.batch if batch is None else batch}"
        return not_finite_error(where, problem, kept=kept)

    def resume(self, path: Path, allowed: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Continue from a checkpoint; reports what differs (see `Saver.read`).

        Raises:
            ConfigError: it is unreadable, or of another run; names what differs.
        """
        self.state, found = self._saver.read(path, allowed)
        return found

    def _save(self, phase: Phase | None, optimizer: Any) -> None:
        if phase is not None:
            self._look(phase, self._losses.rest())
            # Within an epoch all processes save; a resumed process starts from this state.
            if self.state.batch:
                self.state.loss_sum = mean_over_processes(self._accelerator, self.state.loss_sum)
            self._tick()
        bad = self._saver.save(self.state, phase, optimizer)
        if bad is not None:
            name = phase.name if phase else self.phases[max(self.state.phase - 1, 0)].name
            raise self._failed(name, f"`{bad}` is not finite")

    def _asked(self) -> tuple[bool, bool]:
        """Whether a signal in any process asks to stop, or to save and continue; all processes then do it after the same step."""
        asked = [self._stop.number is not None, self._stop.save]
        self._stop.save = False
        if self._accelerator.num_processes > 1:
            found = torch.tensor([int(flag) for flag in asked], device=self._accelerator.device)
            asked = [bool(count) for count in self._accelerator.reduce(found, "sum").tolist()]
        return asked[0], asked[1]

    def _interrupted(self, phase: Phase) -> Interrupted:
        place = f"stage `{phase.name}`, epoch {self.state.epoch + 1}, step {self.state.batch}"
        kept = self._directory.path / LAST if self._directory else "nowhere"
        message = f"Stopped in {place}. Saved to {kept}; continue with resume=True (--resume)."
        self._reporter.say(message)  # click does not print the message of a KeyboardInterrupt
        return Interrupted(message, self._stop.number or signal.SIGTERM)

    def _log(self, kind: str, **entry: Any) -> None:
        if self._directory is not None:
            self._directory.log({"kind": kind, "epochs": self.state.epochs, "step": self.state.all_steps, **entry})

    def _note(self, phase: Phase, text: str) -> None:
        self.state.notes.setdefault(phase.name, []).append(text)
        self._reporter.say(f"{phase.name}: {text}")

    def _tick(self) -> None:
        before, self._since = self._since, time.monotonic()
        self.state.seconds += self._since - before
