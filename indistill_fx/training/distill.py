"""`distill`: a teacher into a student, stage by stage. The loop is in `loop`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from indistill_fx.curriculum import AUTO, Curriculum
from indistill_fx.data.foreign import repeatable
from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.same_samples import same_samples
from indistill_fx.graph.module_state import uncompiled
from indistill_fx.graph.view import View
from indistill_fx.losses.registry import asked_of_the_data, cut_short, options_without_labels
from indistill_fx.losses.stage_losses import Kept
from indistill_fx.losses.task import Task
from indistill_fx.passes.align import align
from indistill_fx.passes.ensemble import member_views
from indistill_fx.passes.lowering.fake_quantize import fake_quantize
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.directory import PLAN, RunDirectory, plan_of_run
from indistill_fx.runs.record import RunRecord
from indistill_fx.runs.saved_outputs import check_outputs
from indistill_fx.stages.checks import check_classes
from indistill_fx.stages.compile import compile_stages, joint_teachers, seeing, warmup_plan
from indistill_fx.stages.stage import Stage
from indistill_fx.stages.traced_pair import traced_pair, view_of
from indistill_fx.system.files import whole
from indistill_fx.traced import TracedModel
from indistill_fx.training.feature_cache import FeatureStore, stores_of
from indistill_fx.training.identity import code_digest, described_loss, named_loss
from indistill_fx.training.options.mixing import check_unmixed, make_mixing
from indistill_fx.training.options.optimizers import check_optimizer
from indistill_fx.training.options.settings import Options, Settings
from indistill_fx.training.parallel.processes import target_of
from indistill_fx.training.recipes import DEFAULT_CURRICULUM, default_curriculum, kept_curriculum
from indistill_fx.training.state import Phase
from indistill_fx.training.supervised import check_epochs, model_facts
from indistill_fx.training.task import RunTask, task_of_run, without_labels
from indistill_fx.training.trainer import Setup, Trainer
from indistill_fx.training.trial import require_loss, untrained, users_own


def distill(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    train_loader: Iterable[Any],
    *,
    plan: AlignmentPlan | None = None,
    curriculum: Curriculum | None = None,
    main: str | Callable[..., Tensor] | None = "kd",
    main_options: Mapping[str, Any] | None = None,
    task: str | Task | None = None,
    epochs: int = 20,
    val_loader: Iterable[Any] | None = None,
    example_inputs: Any = None,
    teacher_view: View | None = None,
    logits: str | int | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    feature_cache: str | os.PathLike[str] | None = None,
    int8: bool = False,
    **options: Unpack[Options],
) -> RunRecord:
    """Distil a teacher into a student: the warm-up layer by layer, then the main loss.

    The student's own module is trained, in place. It keeps its device and training flags, and ends with the last epoch's
    weights. The teacher is not changed. Under `torchrun` every process calls this; each takes its share of every batch.

    The same call with `resume=True` continues after an interruption, in the middle of an epoch if need be, and on a CPU the
    result is bit-identical. That holds for loaders of `open_data`, and for any other whose batches depend on nothing
    but the global random state and its own `generator` at the start of the epoch (which those of a DataLoader with
    `persistent_workers` and random transforms do not).

    Args:
        teacher: traced, or a plain module; combine several into one with `ensemble`.
        student: likewise.
        train_loader: batches (inputs, labels) or (inputs, labels, indices), or dicts of inputs by name with `labels`
            and `indices`; the first dimension is the batch. Without labels the student learns from the teacher alone.
        plan: the pairs; None: those of the run that is resumed, else those that `align` finds.
        curriculum: the warm-up; `Curriculum(lengths=[])` is none, `Curriculum()` the paper's; None, or `Curriculum(lengths="auto", …)`:
            what was measured to help such pairs, or none; a line says which, and why.
        main: the main loss: a name, `file.py:loss`, or a function (student, teacher, labels) → scalar; None: warm-up only.
        main_options: keyword arguments of the main loss.
        task: what the labels mean: `classification`, `multilabel`, `regression`, `segmentation`, `language`, `embedding`,
            `file.py:task` or a `Task`; None: inferred from the first batch, if that is unambiguous.
        epochs: length of the main stage.
        val_loader: batches to validate on after every main epoch, by the task's metrics; the teacher is measured on them first. They need
            labels, also where the training batches have none.
        example_inputs: to trace plain modules with; by name, each model gets what it takes; None: taken from the first batch.
        teacher_view: how the teacher sees a batch: another size, normalisation or dtype, and which of its outputs are the student's
            classes. None: as in the plan, else as known for its weights (see `load`; timm's `pretrained_cfg`), which is reported.
            The dtype and size that a traced model needs are determined automatically.
        logits: key or index of the logits, for models that return several outputs; None: the one called `logits` or `out`.
        run_dir: folder for checkpoints, metrics, plan and result; None: nothing is written.
        resume: continue the run in `run_dir`; begin if there is none. A finished run that is asked for more epochs trains them.
        allow_changed: what may differ from when the run began, by name (`main loss`, `data`, `batch size`, `code of the student`, …);
            any other change that affects the result is refused, with its name. run.json records what was changed.
        progress: show progress on standard error.
        about: further facts to keep in run.json, such as the specs of models and data.
        feature_cache: a folder for the teacher's features, which are then computed once and not in every epoch. Only for loaders of
            `open_data` without augmentation. The space it takes on disk is reported before it starts.
        int8: train the student as its int8 file will compute (quantisation-aware training): for students that lose too much when exported
            to int8. Begin with trained weights. Validation measures the float weights, which are what is saved.
        options: the options of training, listed under `Settings`.

    Returns:
        The record of the run.

    Raises:
        ConfigError: options, models, plan, data or directory are at fault.
        MatchError: no `plan` is given, a warm-up is asked for, and no layers can be paired.
        TrainError: a loss is not finite, or the disk is full; the last checkpoint is intact.
        Interrupted: SIGINT or SIGTERM while `run_dir` is given; a checkpoint was saved. It is a KeyboardInterrupt.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32)
        >>> student = DigitsStudent()
        >>> record = ifx.distill(DigitsTeacher(), student, data.train, epochs=2, curriculum=ifx.Curriculum(lengths=1), progress=False)
        >>> [(stage.name, stage.epochs) for stage in record.stages]
        [('blocks.0', 1), ('blocks.1', 1), ('blocks.2', 1), ('main', 2)]
    """
    settings, run_dir, feature_cache = Settings.of(options), whole(run_dir), whole(feature_cache)
    check_epochs(epochs)
    loader = _known_samples(teacher, repeatable(train_loader, settings.seed, "train loader"), feature_cache)
    loader, main_options = _with_what_is_asked(main, main_options or {}, loader)
    distillation = Distillation(
        teacher=teacher,
        student=student,
        int8=int8,
        loader=loader,
        plan=plan,
        curriculum=curriculum or Curriculum(lengths=AUTO),
        main=main,
        main_options=main_options,
        task=task,
        val_loader=val_loader,
        epochs=epochs,
        example_inputs=example_inputs,
        teacher_view=teacher_view,
        logits=logits,
        feature_cache=feature_cache,
        settings=settings,
        progress=progress,
    )
    return Trainer(
        student=distillation.modules[1],
        teacher=distillation.modules[0],
        loader=loader,
        val_loader=val_loader,
        settings=settings,
        run_dir=run_dir,
        resume=resume,
        allow_changed=allow_changed,
        progress=progress,
        logits=student.chosen if isinstance(student, TracedModel) else logits,
        about=about,
    ).run(distillation.set_up)


_NO_LABELS = "the data have no labels: the student learns from the teacher's answers alone (weight_labels=0)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What `distill` was asked for; see there. `set_up` makes a run's phases of it."""

    teacher: nn.Module | TracedModel
    student: nn.Module | TracedModel
    int8: bool
    loader: EpochLoader
    plan: AlignmentPlan | None
    curriculum: Curriculum
    main: str | Callable[..., Tensor] | None
    main_options: Mapping[str, Any]
    task: str | Task | None
    val_loader: Iterable[Any] | None
    epochs: int
    example_inputs: Any
    teacher_view: View | None
    logits: str | int | None
    feature_cache: str | os.PathLike[str] | None
    settings: Settings
    progress: bool

    @property
    def modules(self) -> tuple[nn.Module, nn.Module]:
        """The user's own teacher and student."""
        models = (self.teacher, self.student)
        first, second = (model.module if isinstance(model, TracedModel) else uncompiled(model) for model in models)
        return first, second

    def set_up(self, directory: RunDirectory | None, accelerator: Accelerator) -> Setup:
        """Compile the stages for the accelerator's device.

        Args:
            directory: the run's; a resumed run reuses its plan.
            accelerator: the run's.
        """
        target = target_of(accelerator, self.modules[1], compiled=self.settings.compile)
        plan = plan_of_run(directory, self.plan)
        remarks: list[str] = []
        models = traced_pair(
            self.teacher,
            self.student,
            self.loader,
            example_inputs=self.example_inputs,
            logits=self.logits,
            view=view_of(self.teacher_view, plan),
            say=remarks.append,
        )
        plan = plan or align(*models, required=self.curriculum.wants_pairs)
        task = self._task(*models)
        options, told = self._options(task)
        curriculum, why = self._warmup(*models, plan, directory, task.task.name)
        remarks += filter(None, (told, why, cut_short(options, self._main_steps())))
        if self.int8:
            rounded = fake_quantize(models[1])
            models = (models[0], rounded.value)
            remarks.append(f"int8: {len(rounded.report.done)} layers and what they read are rounded")
            remarks += [f"int8: {line}" for line in rounded.report.skipped]
        plan = plan.model_copy(update={"view": models[0].view, "views": member_views(models[0].module)})
        plan = plan.model_copy(update={"view": seeing(*models, plan).view})
        stages = compile_stages(
            *models,
            plan,
            curriculum=curriculum,
            main=self.main,
            main_options=options,
            target=target,
            say=remarks.append,
            task=task.task,
        )
        main = [stage for stage in stages if stage.budget is None]
        same_classes = check_classes(*models, plan.view, [stage.logits for stage in main])
        unmeasured = "" if same_classes else "its classes are not the student's"
        if models[0].inputs.by_number:
            unmeasured = "it has outputs of the training data alone"
        if not any(stage.logits[1] is not None for stage in main):  # no loss reads labels
            task = replace(task, check=lambda number, batch: None)
        mix = self._mixing(task, *models)
        remarks += (*self._try(main, task, mix, late=len(stages) > len(main)), *untrained(models[1], stages))
        stores: list[FeatureStore | None] = [None] * len(stages)
        if self.feature_cache is not None:
            warm, _ = warmup_plan(plan, curriculum)
            joint = partial(joint_teachers, *models, warm, target=target)
            stores = stores_of(stages, self.loader, self.feature_cache, joint, accelerator, self.progress)
        return Setup(
            phases=_phases(stages, self.epochs, self.settings, stores),
            task=task,
            save=lambda where: plan.save(where.path / PLAN) if where.writes else None,
            models={model.role: model_facts(model) for model in models},
            remarks=(*remarks, *_remarks(curriculum, plan)),
            teacher_reading={"view": plan.view, "logits": models[0].chosen},
            unmeasured=unmeasured,
            identity=self._identity(*models, plan, curriculum, described_loss(self.main, options)),
            mix=mix,
        )

    def _options(self, task: RunTask) -> tuple[Mapping[str, Any], str]:
        """The main loss's options, and what is to be said of them."""
        if self.main is None or task.labelled:
            return self.main_options, ""
        found = options_without_labels(self.main, self.main_options)
        return found, _NO_LABELS if found is not self.main_options else ""

    def _main_steps(self) -> int | None:
        budget, batches = self.settings.main_budget(self.epochs), self.loader.length
        if budget.unit == "steps" or batches is None:
            return budget.length if budget.unit == "steps" else None
        return budget.length * -(-batches // self.settings.accumulate)

    def _try(self, main: Sequence[Stage], task: RunTask, mix: Callable[[Any], Any] | None, *, late: bool) -> list[str]:
        """Run the main stage on the first batch, so that its errors appear now and not after the warm-up; returns remarks."""
        if self.feature_cache is not None or not (late or users_own(self.main, task.task)):
            return []
        first = next(iter(self.loader))
        task.check(0, first)
        with torch.random.fork_rng(devices=[]):
            first = mix(first) if mix is not None else first
        found = [require_loss(stage, first, f"The main loss `{named_loss(self.main)}`") for stage in main]
        return list(filter(None, found))

    def _mixing(self, task: RunTask, *models: TracedModel) -> Callable[[Any], Any] | None:
        found = make_mixing(self.settings, task.task.name, task.outputs, *(model.inputs for model in models))
        if self.feature_cache is not None or models[0].inputs.by_number:
            check_unmixed(self.settings)
        return found

    def _task(self, teacher: TracedModel, student: TracedModel) -> RunTask:
        """What the labels mean; where only the data to measure on have labels, theirs."""
        ours = isinstance(self.main, str) and ":" not in self.main
        asked: dict[str, Any] = {"logits": student.chosen, "required": self.val_loader is not None or ours}
        found = task_of_run(self.task, self.loader, student.module, teacher.inputs, student.inputs, **asked)
        if not found.labelled and self.val_loader is not None:
            measured = task_of_run(self.task, self.val_loader, student.module, student.inputs, **asked)
            if measured.labelled:
                return replace(measured, check=found.check, labelled=False)
        return without_labels(found, student, self.main) if self.task is None else found

    def _warmup(
        self, teacher: TracedModel, student: TracedModel, plan: AlignmentPlan, directory: RunDirectory | None, task: str
    ) -> tuple[Curriculum, str]:
        """The requested curriculum; if its lengths are `auto`, with the stages of the resumed run or those that suit the pair, and why."""
        asked = self.curriculum
        if asked.lengths != AUTO:
            return asked, ""
        budget = self.settings.main_budget(self.epochs)
        if self.main is None or not budget.length:  # the run consists of the warm-up only
            stages = DEFAULT_CURRICULUM
            return replace(asked, lengths=stages.lengths, penultimate=asked.penultimate or stages.penultimate), ""
        kept = kept_curriculum(directory.path) if directory is not None and directory.resumes else None
        stages, why = kept or default_curriculum(teacher, student, plan, budget, self.loader.length, task)
        return replace(asked, lengths=stages.lengths, unit=stages.unit, together=stages.together), why

    def _identity(
        self, teacher: TracedModel, student: TracedModel, plan: AlignmentPlan, curriculum: Curriculum, main: str | None
    ) -> dict[str, Any]:
        warm = bool(warmup_plan(plan, curriculum)[1] or curriculum.keep or curriculum.keep_features)
        return {
            "main loss": main,
            "warm-up loss": described_loss(curriculum.loss, {}) if warm else None,
            "warm-up feed": curriculum.feed if warm else None,
            "plan": hashlib.sha256(plan.model_dump_json(exclude={"view", "views"}).encode()).hexdigest()[:16],
            "what the teacher sees": "; ".join(plan.described_views).removeprefix("teacher: ") or None,
            "code of the teacher": code_digest(teacher.graph_module),
            "code of the student": code_digest(student.graph_module),
        }


def _known_samples(teacher: nn.Module | TracedModel, loader: EpochLoader, cache: object) -> EpochLoader:
    """The loader with sample indices, if the teacher's outputs are read from a cache or a file of saved outputs."""
    module = teacher.module if isinstance(teacher, TracedModel) else teacher
    loader = check_outputs(module, loader, cached=cache is not None)
    return same_samples(loader, "The feature cache", views=True) if cache is not None else loader


def _with_what_is_asked(
    main: str | Callable[..., Tensor] | None, options: Mapping[str, Any], loader: EpochLoader
) -> tuple[EpochLoader, Mapping[str, Any]]:
    """Add sample indices to the loader, and their number to the main loss's options, if the loss needs them and the loader has them."""
    asked = asked_of_the_data(main) if main is not None else frozenset()
    if not loader.numbered:
        return loader, options
    if "samples" in asked:
        options = {"samples": loader.samples, **options}
    return loader.indexed() if "indices" in asked else loader, options


def _remarks(curriculum: Curriculum, plan: AlignmentPlan) -> tuple[str, ...]:
    """Remarks for the user: the teacher's view, and why requested penultimate vectors get no stage of their own."""
    seen = plan.described_views
    if not curriculum.penultimate or plan.with_penultimate() is not plan:
        return seen
    why = "the plan has none" if plan.embedding is None else "a pair has them"
    return (*seen, f"penultimate vectors: no warm-up stage of their own, because {why}")


def _phases(
    stages: Sequence[Stage], epochs: int, settings: Settings, stores: Sequence[FeatureStore | None]
) -> list[Phase]:
    budget = settings.main_budget(epochs)
    warm = [stage.name for stage in stages if stage.budget is not None]
    phases = []
    for stage, store in zip(stages, stores, strict=True):
        if stage.budget is not None:
            check_optimizer(stage.budget.optimizer or settings.optimizer)
        main = stage.budget is None
        module = stage.without_teacher() if store is not None else stage
        phases.append(
            Phase(
                "main stage" if main and "main" in warm else stage.name,  # the warm-up may have a layer named "main"
                module,
                stage.budget or budget,
                main=main,
                tap="" if main else _shortened([pair.teacher for pair in stage.pairs]),
                cost=module.macs[0] + 3 * module.macs[1],  # a backward pass costs as much as two forward passes
                attach=store.attach if store is not None else None,
                also=stage.criterion.described if isinstance(stage.criterion, Kept) else "",
                early_stopping=settings.early_stopping if main else None,
            )
        )
    return phases


def _shortened(taps: Sequence[str]) -> str:
    return ", ".join(taps) if len(taps) <= 3 else f"{len(taps)} of the teacher's layers"
