"""Set a run up, train, finish it: what `distill` and `train` have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from indistill_fx.data.foreign import require_whole
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.readers import noticing_dead_readers
from indistill_fx.errors import ConfigError, PassError
from indistill_fx.evaluation.accuracy import Evaluation, evaluate
from indistill_fx.graph.edit import forget_sources
from indistill_fx.graph.module_state import device_of, digest, left_in_eval, moved
from indistill_fx.runs.checkpoint import state_tensors
from indistill_fx.runs.directory import AVERAGE, LAST, STUDENT, RunDirectory
from indistill_fx.runs.record import EpochRecord, MetricFacts, RunRecord, StageRecord, environment
from indistill_fx.system.random_state import own_randomness
from indistill_fx.system.signals import StopRequest
from indistill_fx.system.tensor_files import save_tensors
from indistill_fx.target import old_driver
from indistill_fx.training.identity import described_task, identity_of
from indistill_fx.training.loop import TrainingLoop
from indistill_fx.training.memory import noticing_full_memory_elsewhere
from indistill_fx.training.nonfinite import require_finite
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.parallel.devices import computing_on, device_facts, peak_memory
from indistill_fx.training.parallel.processes import make_accelerator, noticing_dead_peers
from indistill_fx.training.progress import Reporter
from indistill_fx.training.state import Phase, State, is_number
from indistill_fx.training.step.recorded import why_not_recorded
from indistill_fx.training.task import RunTask

_NO_END = (
    "the loader does not say how many batches an epoch has, so an epoch lasts until it ends; if it never does, give lengths in steps"
    ' (main_steps, --main-steps; Curriculum(unit="steps"), --warmup-steps)'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is to be trained.

    Attributes:
        phases: the stages, in order; those of length 0 are left out.
        task: what the labels mean, and their check.
        save: writes what belongs to the run into its directory, before training.
        models: for run.json: role → name, parameters, and MACs where they are known.
        remarks: said with the schedule.
        identity: what makes the run this run, beside settings, data and stages (see `identity`).
        teacher_reading: arguments of `evaluate` for the teacher: its view of the batches, and which of its outputs the logits are.
        unmeasured: why the teacher cannot be measured; empty where it can.
        mix: what is done to batches of the main stage before they are learnt from; None: nothing.
    """

    phases: list[Phase]
    task: RunTask
    save: Callable[[RunDirectory], None] = lambda directory: None
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    remarks: Sequence[str] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    teacher_reading: Mapping[str, Any] = field(default_factory=dict)
    unmeasured: str = ""
    mix: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """One run.

    Attributes:
        student: the module to train, in place.
        teacher: the module that must not change; None where there is none.
        loader: training batches.
        val_loader: validation batches, or None.
        settings: how.
        run_dir: where the run is kept; None: nowhere.
        resume: continue the run in `run_dir`, if there is one.
        allow_changed: what may then be other than it was.
        progress: show how it is getting on.
        logits: which entry of the student's output the logits are, if it has several.
        about: further facts for run.json.
    """

    student: nn.Module
    teacher: nn.Module | None
    loader: EpochLoader
    val_loader: Iterable[Any] | None
    settings: Settings
    run_dir: str | os.PathLike[str] | None
    resume: bool
    allow_changed: Sequence[str]
    progress: bool
    logits: str | int | None
    about: Mapping[str, Any] | None

    def run(self, set_up: Callable[[RunDirectory | None, Accelerator], Setup]) -> RunRecord:
        """Run the training.

        Args:
            set_up: makes the stages for the accelerator's device. Its random draws are part of the run.

        Raises:
            ConfigError: options, models, data or directory are at fault.
            TrainError: training cannot continue.
            Interrupted: a signal arrived; a checkpoint was saved.
        """
        forget_sources()  # drop the sources of earlier runs
        require_whole(self.val_loader, "validation loader")
        accelerator = make_accelerator(device=self.settings.device, precision=self.settings.mixed_precision)
        directory = self._directory(accelerator)
        for model, role in ((self.teacher, "teacher"), (self.student, "student")):
            if model is not None:
                require_finite(model, role)
        teacher = digest(self.teacher) if self.teacher is not None else None
        with (
            own_randomness(self.settings.seed),
            computing_on(accelerator.device, self.settings.tf32),
            noticing_full_memory_elsewhere(),
        ):
            setup = set_up(directory, accelerator)
            with directory or nullcontext():
                with noticing_dead_readers(), _as_found(self.student):
                    loop, taught = self._train(setup, directory, accelerator, teacher)
                if self.teacher is not None and digest(self.teacher) != teacher:
                    raise PassError("Training changed the teacher, which is a bug in indistill-fx.", where="teacher")
                return self._finish(loop, setup.task, taught, directory, accelerator)

    def _directory(self, accelerator: Accelerator) -> RunDirectory | None:
        if self.allow_changed and not self.resume:
            raise ConfigError(
                "allow_changed is for resumed runs, but this is a new run.",
                where="allow_changed",
                got=list(self.allow_changed),
                hint="Give resume=True (--resume), or leave allow_changed out.",
            )
        if self.run_dir is not None:
            writes, trackers = accelerator.is_main_process, self.settings.trackers
            return RunDirectory(self.run_dir, resume=self.resume, writes=writes, trackers=trackers)
        if self.resume or self.settings.checkpoint_every_steps or self.settings.trackers:
            raise ConfigError(
                "Without a run directory nothing can be saved or resumed.", where="run_dir", hint="Give run_dir=DIR."
            )
        return None

    def _train(
        self, setup: Setup, directory: RunDirectory | None, accelerator: Accelerator, teacher: str | None
    ) -> tuple[TrainingLoop, Mapping[str, float] | None]:
        """Run the loop; returns it together with the teacher's metrics."""
        self._require_validation(setup)
        phases = [phase for phase in setup.phases if phase.budget.length]
        more = ({"teacher": teacher} if teacher is not None else {}) | dict(setup.identity)
        more["task"] = described_task(setup.task.task)
        identity = identity_of(phases, self.loader, self.settings, more)
        least = _least_samples(self.student, accelerator.num_processes, together=self.settings.sync_batch_norm)
        if self.loader.numbered:
            least = max(least, accelerator.num_processes)  # so that every process gets at least one sample
        loader = self.loader.at_least(least).shard(accelerator.process_index, accelerator.num_processes)
        with (
            self._reporter(phases, setup.task.metric, accelerator) as reporter,
            StopRequest(enabled=bool(directory)) as stop,
        ):
            loop = TrainingLoop(
                student=self.student,
                phases=phases,
                loader=loader,
                settings=self.settings,
                accelerator=accelerator,
                directory=directory,
                reporter=reporter,
                stop=stop,
                validate=partial(self._measured, setup.task, accelerator.device) if self._validates(setup) else None,
                check=setup.task.check,
                metric=setup.task.metric or MetricFacts(),
                mix=setup.mix,
                identity=identity,
            )
            resumed = directory is not None and directory.resumes
            changed = self._resume(loop, directory, reporter) if directory is not None and resumed else []
            taught = self._teacher_metrics(setup, directory if resumed else None, accelerator, reporter)
            schedule = self._schedule(setup, phases, loader, accelerator.device)
            reporter.say(*filter(None, (setup.task.said, *schedule)))
            accelerator.wait_for_everyone()  # until every process has looked for a checkpoint to resume
            if directory is not None:
                directory.begin(
                    resumed=resumed,
                    changes=changed,
                    about={**(self.about or {}), "labels": setup.task.facts},
                    models=setup.models,
                    settings=self.settings.to_json(),
                    schedule=schedule,
                    phases=[phase.to_json() for phase in phases],
                    task=setup.task.task.name,
                    metric=asdict(setup.task.metric) if setup.task.metric is not None else None,
                    teacher_metrics=taught,
                    teacher_accuracy=(taught or {}).get("accuracy"),
                    environment=self._environment(accelerator),
                )
                setup.save(directory)
            with noticing_dead_peers(accelerator):
                loop.run()
        return loop, taught

    def _reporter(self, phases: Sequence[Phase], metric: MetricFacts | None, accelerator: Accelerator) -> Reporter:
        return Reporter(
            shown=self.progress and accelerator.is_main_process,
            steps=self._steps(phases),
            costs={phase.name: phase.cost for phase in phases},
            metric=metric,
            memory=partial(peak_memory, accelerator.device),
        )

    def _environment(self, accelerator: Accelerator) -> dict[str, Any]:
        device = accelerator.device
        found = environment(str(device), accelerator.num_processes) | device_facts(device, self.settings.tf32)
        unrecorded = why_not_recorded(self.settings, device.type, accelerator.num_processes)
        return found | {"graphs": f"off: {unrecorded}" if unrecorded is not None else "on"}

    def _require_validation(self, setup: Setup) -> None:
        """Refuse early stopping without validation data, and a moving average of sharded weights."""
        if self.settings.early_stopping is not None and not self._validates(setup):
            raise ConfigError(
                "early_stopping needs validation data that can be measured, but there are none.",
                where="early_stopping",
                hint="Give val_loader=LOADER, or leave early_stopping (--early-stopping) out.",
            )
        if self.settings.average and self.settings.shard:
            raise ConfigError(
                "A moving average needs the whole weights, but shard=True divides them among the processes.",
                where="average",
                hint="Leave average (--moving-average) or shard (--shard) out.",
            )

    def _schedule(self, setup: Setup, phases: Sequence[Phase], loader: EpochLoader, device: torch.device) -> list[str]:
        """The schedule and remarks on it, in lines."""
        lines = [f"{phase.name}: {self._described(phase)}" for phase in phases]
        lines += [
            f"the GPU is not used: {why}" for why in [old_driver() if self.settings.device == "auto" else ""] if why
        ]
        lines += [*setup.remarks, *loader.remarks]
        main = next(iter(self._steps([phase for phase in phases if phase.main]).values()), None)
        lines += self.settings.unused([phase.budget for phase in phases], loader.world, device.type, main)
        if loader.length is None and any(phase.budget.unit == "epochs" for phase in phases):
            lines.append(_NO_END)
        if self.val_loader is not None and not self._validates(setup):
            lines.append("no validation: nothing says what the labels mean")
        elif self.val_loader is not None and self.teacher is not None and setup.unmeasured:
            lines.append(f"the teacher is not measured: {setup.unmeasured}")
        return lines

    def _resume(self, loop: TrainingLoop, directory: RunDirectory, reporter: Reporter) -> list[Any]:
        """Continue from the last checkpoint; returns all changed settings, for run.json."""
        found = loop.resume(directory.path / LAST, self.allow_changed)
        directory.rewind(loop.state.epochs, loop.state.all_steps)
        reporter.say(f"Resumed after {loop.state.all_steps} steps.")
        for name, (before, now) in found.items():
            reporter.say(f"Changed since the run began: {name}, from {before} to {now}.")
        _recall(reporter, loop.state, loop.phases, loop.metric)
        earlier = directory.reported().get("changes")
        new = [
            {"after_steps": loop.state.all_steps, "what": name, "from": a, "to": b} for name, (a, b) in found.items()
        ]
        return (earlier if isinstance(earlier, list) else []) + new

    def _steps(self, phases: Sequence[Phase]) -> dict[str, int | None]:
        batches = self.loader.length
        per_epoch = None if batches is None else -(-batches // self.settings.accumulate)
        lengths = {
            phase.name: (phase.budget.length, 1 if phase.budget.unit == "steps" else per_epoch) for phase in phases
        }
        return {name: None if steps is None else length * steps for name, (length, steps) in lengths.items()}

    def _described(self, phase: Phase) -> str:
        main = self.settings.describe() if phase.main else ""
        return f"{phase.budget}{main}{f', plus {phase.also}' if phase.also else ''}"

    def _validates(self, setup: Setup) -> bool:
        return self.val_loader is not None and setup.task.metric is not None

    def _measured(self, task: RunTask, device: torch.device, module: nn.Module, **how: Any) -> Evaluation:
        data = self.val_loader if self.val_loader is not None else ()  # a stream has no truth value
        data = data.to(device) if isinstance(data, EpochLoader) else data
        with moved(module, device):
            return evaluate(module, data, task=task.task, **{"logits": self.logits, **how})

    def _teacher_metrics(
        self, setup: Setup, before: RunDirectory | None, accelerator: Accelerator, reporter: Reporter
    ) -> Mapping[str, float] | None:
        """Measure the teacher before training; a resumed run reads the values from its first start."""
        metric = setup.task.metric
        asked = self.teacher is not None and not setup.unmeasured and self._validates(setup)
        if self.teacher is None or not asked or not accelerator.is_main_process or metric is None:
            return None
        reported = before.reported() if before is not None else {}
        known = reported.get("teacher_metrics") or {"accuracy": reported.get("teacher_accuracy")}
        if isinstance(known, dict) and all(map(is_number, known.values())) and metric.name in known:
            found: Mapping[str, float] = known
        else:
            measured = self._measured(setup.task, accelerator.device, self.teacher, **setup.teacher_reading)
            found = measured.values
            if measured.no_better_than_chance:
                reporter.say(
                    f"The teacher classifies no better than chance ({measured.guesses} classes): are its trained weights loaded?"
                    " Where only its features are compared, as by pkt, it needs no classifier."
                )
        reporter.teacher(found[metric.name])
        return found

    def _finish(
        self,
        loop: TrainingLoop,
        task: RunTask,
        taught: Mapping[str, float] | None,
        directory: RunDirectory | None,
        accelerator: Accelerator,
    ) -> RunRecord:
        state = loop.state
        epochs = tuple(EpochRecord(**entry) for entry in state.history)
        metric = task.metric or MetricFacts()
        metrics = epochs[-1].measured if epochs else None
        if metrics is None and self.val_loader is not None and task.metric is not None and accelerator.is_main_process:
            metrics = self._measured(task, accelerator.device, self.student).values
        if directory is not None and directory.writes:
            save_tensors(directory.path / STUDENT, state_tensors(self.student))
            if loop.average is not None:
                save_tensors(directory.path / AVERAGE, state_tensors(loop.average.module))
        names = dict.fromkeys(epoch.stage for epoch in epochs)
        record = RunRecord(
            stages=tuple(_stage_record(name, epochs, state) for name in names),
            epochs=epochs,
            teacher_accuracy=(taught or {}).get("accuracy"),
            accuracy=(metrics or {}).get("accuracy"),
            best_accuracy=state.best if metric.name == "accuracy" else None,
            best_epoch=state.best_epoch,
            steps=state.all_steps,
            seconds=sum(epoch.seconds for epoch in epochs),
            digest=digest(self.student),
            environment=self._environment(accelerator),
            files=directory.files() if directory is not None else {},
            task=task.task.name,
            metric=metric,
            metrics=metrics,
            teacher_metrics=taught,
            best=state.best,
            average=epochs[-1].average if epochs else None,
        )
        if directory is not None:
            directory.report(status="done", result=record.to_json())
        return record


def _least_samples(student: nn.Module, processes: int, *, together: bool) -> int:
    """How many samples a batch needs: two for a batch norm's statistics, and in every process if they are not synchronised."""
    still = set(left_in_eval(student))
    norms = any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in {*student.modules()} - still)
    return (2 if together else 2 * processes) if norms else 1


def _recall(reporter: Reporter, state: State, phases: Sequence[Phase], metric: MetricFacts) -> None:
    """Report the epochs before the run was resumed."""
    steps: dict[str, int] = {}
    for entry in state.history:
        steps[entry["stage"]] = steps.get(entry["stage"], 0) + entry["steps"]
        reporter.epoch(entry["stage"], steps[entry["stage"]], entry["loss"], EpochRecord(**entry).value(metric))
    for phase in phases[: state.phase]:
        reporter.close(phase.name, f"{phase.name}: done before")


def _stage_record(name: str, epochs: tuple[EpochRecord, ...], state: State) -> StageRecord:
    stage_epochs = [epoch for epoch in epochs if epoch.stage == name]
    return StageRecord(
        name=name,
        losses=tuple(epoch.loss for epoch in stage_epochs),
        steps=sum(epoch.steps for epoch in stage_epochs),
        seconds=sum(epoch.seconds for epoch in stage_epochs),
        notes=tuple(state.notes.get(name, ())),
    )


@contextmanager
def _as_found(student: nn.Module) -> Iterator[None]:
    """Restore training flags and device at the end of the block, and clear the gradients."""
    flags = [(part, part.training) for part in student.modules()]
    device = device_of(student)
    try:
        yield
    finally:
        student.zero_grad()
        student.to(device)
        for part, flag in flags:
            part.training = flag
