"""Does the warm-up pay? The same student three ways: on labels alone (if there are any), by the main loss alone, and after the warm-up."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor, nn

from indistill_fx.batch import split
from indistill_fx.curriculum import AUTO, Curriculum
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import View
from indistill_fx.losses.choose_task import task_of
from indistill_fx.losses.task import Task
from indistill_fx.passes.align import align
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.directory import kept_plan
from indistill_fx.runs.record import RunRecord
from indistill_fx.stages.compile import warmup_plan
from indistill_fx.stages.traced_pair import traced_pair, view_of
from indistill_fx.system.files import whole
from indistill_fx.traced import TracedModel
from indistill_fx.training.distill import distill
from indistill_fx.training.options.settings import Options
from indistill_fx.training.recipes import DEFAULT_CURRICULUM, NO_WARMUP


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training: the student it made, and the record of the run."""

    student: nn.Module
    record: RunRecord


def compare(
    teacher: nn.Module | TracedModel,
    student: nn.Module,
    train_loader: Iterable[Any],
    *,
    epochs: int = 20,
    main_epochs: int | None = None,
    curriculum: Curriculum | None = None,
    plan: AlignmentPlan | None = None,
    main: str | Callable[..., Tensor] = "kd",
    main_options: Mapping[str, Any] | None = None,
    task: str | Task | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = lambda arm: None,
    example_inputs: Any = None,
    teacher_view: View | None = None,
    val_loader: Iterable[Any] | None = None,
    logits: str | int | None = None,
    resume: bool = False,
    allow_changed: Sequence[str] = (),
    progress: bool = True,
    about: Mapping[str, Any] | None = None,
    feature_cache: str | os.PathLike[str] | None = None,
    **options: Unpack[Options],
) -> dict[str, Arm]:
    """Train copies of one student in three ways, from the same weights and seed, each for the same number of epochs in all.

    Args:
        teacher: traced, or a plain module.
        student: its copies are trained; it is not changed.
        train_loader: batches, as for `distill`.
        epochs: total of each arm. The warm-up's epochs are taken from its main stage.
        main_epochs: instead of `epochs`: length of the third arm's main stage; every arm then gets these plus the warm-up's.
        curriculum: the warm-up of the third arm, in epochs; None, or lengths of `auto`: one for each pair, three for the penultimate
            vectors.
        plan: as for `distill`.
        main: the main loss of the second and third arm.
        main_options: keyword arguments of `main`.
        task: as for `distill`.
        run_dir: every arm has its own folder in it, named after the arm; None: nothing is written.
        announce: called with the name of each arm before it begins.
        example_inputs: as for `distill`.
        teacher_view: as for `distill`.
        val_loader: as for `distill`.
        logits: as for `distill`.
        resume: as for `distill`; arms that are finished are read back.
        allow_changed: as for `distill`.
        progress: as for `distill`.
        about: as for `distill`.
        feature_cache: as for `distill`.
        options: the options of training, listed under `Settings`. `milestones` count an arm's epochs from its beginning; with
            `main_epochs` they count the third arm's main epochs, and for the other arms are as many epochs before the end.

    Returns:
        Arm by name, in this order: `labels`, if the data and the task have labels; the main loss's own name (such as `kd`); `indistill`.

    Raises:
        ConfigError: the warm-up takes all of `epochs`, or is in steps; otherwise as `distill`.

    Examples:
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> data = ifx.open_data("digits", limit=64, batch_size=32)
        >>> short = dict(epochs=4, curriculum=ifx.Curriculum(lengths=1), progress=False)
        >>> arms = ifx.compare(DigitsTeacher(), DigitsStudent(), data.train, **short)
        >>> for name, arm in arms.items():
        ...     print(name, [stage.epochs for stage in arm.record.stages])
        labels [4]
        kd [4]
        indistill [1, 1, 1, 1]
    """
    curriculum = _with_a_warmup(curriculum or DEFAULT_CURRICULUM)
    home = whole(run_dir)
    plan = plan or (kept_plan(*_arms_in(home)) if resume else None)
    shared: dict[str, Any] = {"example_inputs": example_inputs, "logits": logits}
    say = partial(print, file=sys.stderr, flush=True) if progress else lambda line: None
    models = traced_pair(teacher, student, train_loader, view=view_of(teacher_view, plan), say=say, **shared)
    plan = plan or align(*models, required=curriculum.wants_pairs)
    warmup, milestones = _epochs_of(curriculum, plan, options), options.get("milestones", ())
    if main_epochs is not None:
        epochs, milestones = main_epochs + warmup, [at + warmup for at in milestones]
    done: dict[str, Arm] = {}
    ways = _ways(main, main_options, curriculum, warmup, epochs)
    for arm, way, before in ways if _has_labels(train_loader, task, models, say) else ways[1:]:
        announce(arm)
        record = distill(
            models[0],
            copied_student := copy.deepcopy(student),
            train_loader,
            plan=plan,
            **way,
            task=task,
            epochs=epochs - before,
            val_loader=val_loader,
            teacher_view=teacher_view,
            **shared,
            run_dir=home / arm if home is not None else None,
            resume=resume,
            allow_changed=allow_changed,
            progress=progress,
            about=about,
            feature_cache=feature_cache,
            **_later_by(before, milestones, options),
        )
        done[arm] = Arm(copied_student, record)
    return done


def _with_a_warmup(curriculum: Curriculum) -> Curriculum:
    """Where `distill` would choose whether there is a warm-up: the default one, since there must be one to compare."""
    if curriculum.lengths != AUTO:
        return curriculum
    last = curriculum.penultimate or DEFAULT_CURRICULUM.penultimate
    return replace(curriculum, lengths=DEFAULT_CURRICULUM.lengths, penultimate=last)


def _ways(
    main: Any, options: Mapping[str, Any] | None, curriculum: Curriculum, warmup: int, epochs: int
) -> Sequence[tuple[str, dict[str, Any], int]]:
    """For every arm: name, what `distill` is given of its own, and the warm-up's epochs."""
    _check_room(warmup, epochs)
    named = main if isinstance(main, str) and ":" not in main else "main"
    shared = {"main": main, "main_options": options}
    return (
        ("labels", {"main": "labels", "curriculum": NO_WARMUP}, 0),
        (named, shared | {"curriculum": NO_WARMUP}, 0),
        ("indistill", shared | {"curriculum": curriculum}, warmup),
    )


def _has_labels(
    loader: Iterable[Any], task: str | Task | None, models: Sequence[TracedModel], say: Callable[[str], None]
) -> bool:
    """Whether there are labels to train on alone; says so if there are none."""
    parts = split(next(iter(loader)), *(model.inputs for model in models), where="The training")
    if parts.labels is not None and (task is None or task_of(task).labelled):
        return True
    say("There are no labels to train on alone, so that arm is left out.")
    return False


def _arms_in(run_dir: str | os.PathLike[str] | None) -> list[Path]:
    """Where the arms that were started have their plan. A new plan might differ, because it depends on the first batch."""
    return sorted(Path(run_dir).glob("*")) if run_dir is not None else []


def _later_by(epochs: int, milestones: Iterable[int], options: Options) -> Options:
    """The options of an arm whose main stage begins after `epochs` epochs."""
    moved = options.copy()
    moved["milestones"] = [max(at - epochs, 0) for at in milestones]
    return moved


def _check_room(warmup: int, epochs: int) -> None:
    if warmup >= epochs:
        raise ConfigError(
            f"The warm-up takes {warmup} epochs, but every arm has only {epochs} in total.",
            where="epochs",
            got=epochs,
            expected=f"more than {warmup}",
            hint="Give more epochs, or a shorter warm-up.",
        )


def _epochs_of(curriculum: Curriculum, plan: AlignmentPlan, options: Options) -> int:
    """How many epochs the whole warm-up takes."""
    if curriculum.unit != "epochs" or options.get("main_steps") is not None:
        raise ConfigError(
            "To compare at equal epochs the warm-up and the main stage must be in epochs.",
            where="curriculum",
            hint="Give lengths in epochs, not in steps.",
        )
    return sum(budget.length for budget in warmup_plan(plan, curriculum)[1].values())
