"""`indistill-fx distill`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, pictures, training
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from indistill_fx.curriculum import Curriculum
    from indistill_fx.data.dataset import Data
    from indistill_fx.graph.view import View
    from indistill_fx.loading.load import Source
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.traced import TracedModel


_SECTIONS = {
    "Data and models": (*training.SECTIONS["Data and models"], "more_teachers", "plan_file", *pictures.TEACHER_NAMES),
    "The warm-up": (
        "warmup", "warmup_steps", "no_warmup", "layers", "warmup_loss", "warmup_lr", "warmup_optimizer", "patience",
        "penultimate", "keep", "keep_features", "feed", "together",
    ),
    "The main stage": ("main", "main_options", "main_weights"),
    "Ways of training": ("recipe", "compare", "assistant", "assistant_epochs", "qat"),
    "Training": training.SECTIONS["Training"],
    "The run": training.SECTIONS["The run"],
}  # fmt: skip


def _use_recipe(context: click.Context, parameter: click.Parameter, name: str) -> str:
    """The recipe's values become the defaults of the other options."""
    from indistill_fx.training.recipes import RECIPES

    context.default_map = dict(RECIPES[name].student)
    return name


@click.command(name="distill", cls=training.Grouped, sections=_SECTIONS)
@click.argument("teacher")
@click.argument("student")
@common.data_option
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="RUN_DIR",
    help="Directory for plan, checkpoints, metrics and the trained student.",
)
@click.option(
    "--teacher",
    "more_teachers",
    multiple=True,
    metavar="SPEC[=WEIGHT]",
    help="Another teacher and the weight of its logits; repeatable. TEACHER can be written with a weight too. Without weights all teachers"
    " count equally.",
)
@click.option("--plan", "plan_file", metavar="FILE", help="Use the pairs of this file of `align`. [default: align now]")
@click.option(
    "--recipe",
    type=click.Choice(["default", "retrieval", "compress", "paper"]),
    default="default",
    show_default=True,
    is_eager=True,
    callback=_use_recipe,
    help="Defaults for the options that are not given. default: a warm-up if it was measured to pay for such models (the run says"
    " what it chose and why), then 20 epochs of KD. retrieval: 12 epochs for the penultimate vectors, then PKT for 18 epochs at 1e-3 and 3"
    " at 1e-4; this trains no classifier. compress: for a student made from the teacher, 6 epochs for all pairs at once, then 14 of KD."
    " paper: 3, 4, 5, … epochs of MSE, then PKT for 48 epochs at 1e-3 and 10 at 1e-4; an assistant is trained with 50 epochs of PKT.",
)
@click.option(
    "--main",
    default="kd",
    show_default=True,
    help="Main loss: labels, kd, dkd, dist, mlkd, cwd, pkt, pkt_kl, at, sp, rkd, crd, fitnet, vid, reviewkd, simkd or file.py:loss.",
)
@training.main_option_option
@click.option(
    "--main-weights",
    metavar="STEP:FACTOR,…",
    help="Factor on the main loss's weight at given steps of the main stage, linear in between: 0:0,500:1 fades it in over 500 steps,"
    " 0:1,2000:0 fades it out over 2000. [default: 1 throughout]",
)
@click.option(
    "--warmup",
    metavar="3,4,5",
    type=training.Numbers(),
    help="Epochs of each warm-up stage: one number for all, or one each. [default: the recipe's]",
)
@click.option(
    "--warmup-steps",
    metavar="500,700",
    type=training.Numbers(),
    help="Optimiser steps of each warm-up stage, instead of epochs: one number for all, or one each.",
)
@training.no_warmup_option
@click.option(
    "--layers",
    metavar="B,A",
    type=training.Names(),
    help="Warm up only these student layers, in this order. [default: all pairs]",
)
@click.option("--warmup-loss", metavar="LOSS", help="Its loss: mse, cosine, at, pkt or file.py:loss. [default: mse]")
@click.option(
    "--warmup-lr",
    metavar="RATE",
    type=training.Numbers(float),
    help="Its learning rate: one, or one per pair (1e-3,5e-4). [default: 0.001]",
)
@click.option(
    "--warmup-optimizer",
    metavar="NAME",
    type=training.Names(),
    help="Its optimiser, adam, adamw or sgd: one, or one per pair. [default: adam]",
)
@common.count_option(
    "--patience",
    metavar="EPOCHS",
    help="End a warm-up stage early if its loss has not fallen by 1% in this many epochs.",
)
@common.count_option(
    "--penultimate",
    metavar="EPOCHS",
    least=0,
    help="Epochs (or steps) of a last warm-up stage, for the penultimate vectors (what the last layers read); 0: none."
    " [default: the recipe's, else 3; 0 with --warmup-steps]",
)
@click.option(
    "--keep",
    metavar="WEIGHT",
    type=float,
    help="Add the penultimate vectors' warm-up loss to the main loss, with this weight. [default: 0]",
)
@training.keep_features_option
@click.option(
    "--feed",
    type=click.Choice(["student", "teacher"]),
    help="Input of each segment between two pairs. student: the student's own features, so pairs are trained one after another. teacher:"
    " the teacher's narrowed features, so all segments train in one stage. [default: student]",
)
@click.option(
    "--together",
    is_flag=True,
    help="Train all pairs in one stage; each segment's input is the student's own feature.",
)
@click.option(
    "--assistant",
    metavar="SPEC|auto",
    help="Distil TEACHER into this model first, and then this model into STUDENT. auto: TEACHER pruned until its"
    " MACs are the geometric mean of TEACHER's and STUDENT's.",
)
@common.count_option(
    "--assistant-epochs", least=0, help="Epochs of the assistant's main stage. [default: the recipe's]"
)
@click.option(
    "--compare",
    is_flag=True,
    help="Also train the same student on labels alone and with the main loss alone, for the same number of epochs."
    " Without options of the warm-up it takes one epoch for every pair, and three for the penultimate vectors.",
)
@training.qat_option
@click.option(
    "--feature-cache",
    metavar="DIR",
    help="Cache the teacher's features in this folder instead of computing them in every epoch. With images this needs"
    " --no-augment or --views N.",
)
@pictures.teacher_options
@training.training_options
def command(teacher: str, student: str, **options: Any) -> None:
    """Distil TEACHER into STUDENT: a warm-up on paired layers, where it was measured to help, and then the main loss.

    Use --resume to continue an interrupted run (Ctrl-C, a kill, a power cut). The trained student is
    RUN_DIR/student.safetensors; `evaluate` and `export` take RUN_DIR itself. With --assistant there are two runs:
    RUN_DIR/step-1 (the assistant) and RUN_DIR/step-2 (the student). For several processes: `torchrun --nproc-per-node N
    -m indistill_fx distill …`.

    \b
    Examples:
      indistill-fx distill teacher.pt models.py:make_student --data imagefolder:cifar10 -o runs/first
      indistill-fx distill teacher.pt models.py:make_student --data cifar10 -o runs/paper --recipe paper --assistant auto
    """
    from indistill_fx.evaluation.kept_logits import logits_of_each
    from indistill_fx.training.compare import compare
    from indistill_fx.training.distill import distill

    if options["compare"] and options["qat"]:
        raise ConfigError(
            "--compare trains several students, but --qat continues with only one.",
            where="--qat",
            hint="Leave one of them out.",
        )
    settings = training.settings_of(options)  # impossible options are refused before anything is loaded
    out, loss = options["output"], options["main"]
    shares = common.shares_of(teacher, options)
    teacher = next(iter(shares))
    *teachers, last = (common.open_model(spec, options["trust"], seed=options["seed"]) for spec in (*shares, student))
    student_module = last.module
    data = training.open_training_data(options, last, *teachers)
    example = common.example_for((*teachers, last), (), data)
    asked = options["logits"]
    logits, options["logits"] = logits_of_each(asked, teachers, last, example)
    source, view, plan = _teacher(teachers, last, data, example, shares, options, logits)
    shared: dict[str, Any] = {
        "curriculum": _curriculum(options),
        "plan": plan,
        "main": loss,
        "main_options": training.main_options(options["main_options"]) | _over_time(options["main_weights"]),
        "val_loader": data.test if data.labelled else None,
        "example_inputs": example,
        "teacher_view": view,
        "logits": options["logits"],
        "task": training.task_of(options, last, *teachers),
        "resume": options["resume"],
        "allow_changed": options["allow_changed"],
        "feature_cache": options["feature_cache"],
        "about": training.kept_of(student, student_module, example, data, options, teacher=", ".join(shares)),
        **settings,
    }
    if options["assistant"] is not None:
        source = _assisted(source, student_module, teacher, data, shared, options, asked)
        shared["about"]["teacher"], shared["teacher_view"] = f"{out}/step-1", None
        out = f"{out}/step-2"
    shared["run_dir"] = out
    train, epochs = data.train, options["epochs"]
    if options["compare"]:

        def announce(arm: str) -> None:
            common.say(f"{arm}:")

        arms = compare(source, student_module, train, main_epochs=epochs, announce=announce, **shared)
        training.print_arms({name: arm.record for name, arm in arms.items()}, out)
        return
    training.print_run(distill(source, student_module, train, epochs=epochs, **shared), out)
    if options["qat"]:
        training.for_int8(source, student_module, train, shared, options["qat"])


def _assisted(
    source: nn.Module | TracedModel,
    student_module: nn.Module,
    teacher: str,
    data: Data,
    shared: dict[str, Any],
    options: dict[str, Any],
    asked: str | int | None,
) -> nn.Module | TracedModel:
    """Train the assistant, which is the teacher of the second step."""
    from pathlib import Path

    from indistill_fx.batch import call_of
    from indistill_fx.deploy.save_pt2 import save_program
    from indistill_fx.passes.capture.trace import as_traced
    from indistill_fx.system.model_inputs import Inputs
    from indistill_fx.traced import TracedModel
    from indistill_fx.training.chain import distill_chain, shrunk_assistant
    from indistill_fx.training.parallel.processes import is_main_process
    from indistill_fx.training.recipes import RECIPES

    spec, place = options["assistant"], Path(options["output"]) / "step-1"
    if spec == "auto":
        module, logits = (
            (source.module, source.chosen) if isinstance(source, TracedModel) else (source, options["logits"])
        )
        assistant, described = shrunk_assistant(module, student_module, shared["example_inputs"], logits=logits)
        spec = str(place.resolve() / "assistant.pt2")
        common.say(f"Assistant: {described}")
    else:
        loaded = common.open_model(spec, options["trust"], seed=options["seed"])
        assistant, logits = loaded.module, common.logits_of(asked, loaded)
    step: dict[str, Any] = {"epochs": options["epochs"]}
    step |= RECIPES[options["recipe"]].assistant
    if options["assistant_epochs"] is not None:
        step["epochs"] = options["assistant_epochs"]
    reading = {**options, "logits": logits}
    step["about"] = training.kept_of(spec, assistant, shared["example_inputs"], data, reading, teacher=teacher)
    shared = {**shared, "plan": None, "logits": logits}  # the given plan is for the student
    (record,) = distill_chain([source, assistant], data.train, steps=[step], run_dir=options["output"], **shared)
    if options["assistant"] == "auto" and is_main_process():
        takes = Inputs.of(assistant)
        example = call_of(shared["example_inputs"], takes, where="The assistant").by_name(takes.names)
        save_program(assistant, tuple(example.values()), spec)  # `export` and `evaluate` load step-1 with it
    training.print_run(record, str(place))
    if logits == options["logits"]:
        return assistant
    return as_traced(assistant, shared["example_inputs"], role="teacher", logits=logits)


def _teacher(
    teachers: Sequence[Source],
    student: Source,
    data: Data,
    example: Any,
    shares: dict[str, float],
    options: dict[str, Any],
    logits: Sequence[str | int | None],
) -> tuple[nn.Module | TracedModel, View, AlignmentPlan | None]:
    """The teacher (several become one; traced, where its logits are another output than the student's), its view, and the plan, if any."""
    from indistill_fx.graph.view import View
    from indistill_fx.plan import AlignmentPlan

    # with an assistant, the plan is for the student's step
    given, directly = options["plan_file"], options["assistant"] is None
    plan = AlignmentPlan.load(given) if given else None
    if len(teachers) == 1:
        module = teachers[0].module
        plan = plan or common.plan_beside(student, module, example)
        (view,) = pictures.teacher_views(options, teachers, data, (plan.view,) if plan and directly else ())
        given_plan = plan.model_copy(update={"view": view}) if plan and directly else plan
        own = logits[0] != options["logits"]
        source = common.trace_model(teachers[0], example, "teacher", logits=logits[0], view=view) if own else module
        return source, view or View(), given_plan
    views = pictures.teacher_views(options, teachers, data, plan.views if plan and directly else ())
    return common.together(teachers, shares, example, views, options, logits), View(), plan


_OF_THE_WARM_UP = ("layers", "warmup_loss", "warmup_lr", "warmup_optimizer", "patience", "feed", "together")


def _curriculum(options: dict[str, Any]) -> Curriculum:
    """The recipe's curriculum, with the requested values in place of its own; `auto`: `distill` chooses the stages."""
    from indistill_fx.curriculum import AUTO, Curriculum
    from indistill_fx.training.recipes import DEFAULT_CURRICULUM, RECIPES

    if options["assistant_epochs"] is not None and options["assistant"] is None:
        raise ConfigError(
            "--assistant-epochs has no effect without --assistant.",
            where="--assistant-epochs",
            hint="Give --assistant SPEC or auto, or leave it out.",
        )
    lengths = [name for name in ("warmup", "warmup_steps", "no_warmup") if options[name]]
    if options["no_warmup"]:  # without a warm-up, no other warm-up option can have an effect
        lengths += [name for name in ("penultimate", *_OF_THE_WARM_UP) if options[name]]
    if len(lengths) > 1:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in lengths)
        raise ConfigError(f"{names} do not go together.", where=names, hint="Give one of them.")
    asked: dict[str, Any] = {
        "loss": options["warmup_loss"],
        "layers": options["layers"],
        "learning_rate": _one_or_all(options["warmup_lr"]),
        "optimizer": _one_or_all(options["warmup_optimizer"]),
        "patience": options["patience"],
        "penultimate": options["penultimate"],
        "keep": options["keep"],
        "keep_features": options["keep_features"],
        "feed": options["feed"],
        "together": options["together"] or None,
    }
    if options["no_warmup"]:
        asked |= {"lengths": [], "penultimate": 0}
    elif options["warmup_steps"]:
        asked |= {
            "lengths": _one_or_all(options["warmup_steps"]),
            "unit": "steps",
            "penultimate": options["penultimate"] or 0,
        }
    elif options["warmup"]:
        asked["lengths"] = _one_or_all(options["warmup"])
    asked = {name: value for name, value in asked.items() if value is not None}
    base: Curriculum | None = RECIPES[options["recipe"]].student["curriculum"]
    if base is None and asked.keys() <= {
        "keep",
        "keep_features",
    }:  # of the main stage: the warm-up is still to be chosen
        base = Curriculum(lengths=AUTO)
    return replace(base or DEFAULT_CURRICULUM, **asked)


def _one_or_all(values: list[Any] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _over_time(text: str | None) -> dict[str, Any]:
    """Parse `0:0,500:1` to an option of the main loss."""
    from indistill_fx.errors import ConfigError

    if not text:
        return {}
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {"over_time": tuple((int(step), float(factor)) for step, factor in pairs)}
    except ValueError:
        raise ConfigError(
            f"--main-weights {text!r} is not a list of STEP:FACTOR.",
            where="--main-weights",
            got=text,
            hint="Write --main-weights 0:0,500:1.",
        ) from None
