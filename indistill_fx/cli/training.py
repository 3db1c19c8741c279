"""What `distill` and `train` share: their options, and the summary at a run's end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, get_args

import click

from indistill_fx.cli.common import (
    Command,
    cache_option,
    console,
    count_option,
    limit_option,
    logits_option,
    say,
    task_option,
    trust_option,
)
from indistill_fx.cli.pictures import open_pictures, picture_options
from indistill_fx.errors import ConfigError
from indistill_fx.training.options.settings import Settings, about, hints

if TYPE_CHECKING:
    from torch import nn

    from indistill_fx.data.dataset import Data
    from indistill_fx.loading.load import Source
    from indistill_fx.losses.task import Task
    from indistill_fx.runs.record import RunRecord
    from indistill_fx.traced import TracedModel


class Grouped(click.Command):
    """A command of a run: its help shows the options in sections, and where it is stopped it says how to go on.

    Args:
        sections: title -> parameter names; the others come last, under `Other`.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sections = dict(sections)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; stopped outside of a step, it says what is kept. The training itself says where it was stopped."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            if not str(error):
                say(_kept_in(Path(ctx.params["output"])))
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options per section."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        titles = {name: title for title, names in self.sections.items() for name in names}
        for title in (*self.sections, "Other"):
            shown = [option for option in options if titles.get(option.name or "", "Other") == title]
            records = [record for option in shown if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _kept_in(folder: Path) -> str:
    from indistill_fx.runs.directory import COMPRESSION, LAST

    places = (COMPRESSION, LAST, f"*/{LAST}")  # --compare and --assistant have folders of their own
    kept = any(any(folder.glob(place)) for place in places)
    return f"What was done until then is in {folder}; continue with --resume." if kept else "Nothing is saved yet."


class Numbers(click.ParamType[list[float]]):
    """Comma-separated numbers, such as 3,4,5.

    Args:
        kind: int or float.
    """

    name = "numbers"

    def __init__(self, kind: Callable[[str], float] = int):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list; a list (from a recipe) is returned unchanged."""
        if not isinstance(value, str):
            return value
        where = param.opts[0] if param is not None else "a list"
        try:
            return [self.kind(part) for part in value.split(",")] if value else []
        except ValueError:
            expected = "whole numbers" if self.kind is int else "numbers"
            example = "3,4,5" if self.kind is int else "0.001,0.0005"
            raise ConfigError(
                f"{where} {value!r} is not a list of {expected}.",
                where=where,
                got=value,
                hint=f"Write them as {example}.",
            ) from None


class Names(click.ParamType[list[str]]):
    """Comma-separated names, such as a,b."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list."""
        return value.split(",") if isinstance(value, str) else value


class _OrAuto(click.types.BoolParamType):
    """On, off, or `auto` if neither was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """True, False or `auto`."""
        return value if value == "auto" else super().convert(value, param, ctx)


def _setting(name: str) -> Callable[[Command], Command]:
    """A command-line option for a field of `Settings`."""
    default, hint, known = getattr(Settings(), name), hints()[name], about(name)
    flag = f"--{known.flag or name.replace('_', '-')}"
    if set(get_args(hint)) == {"auto", True, False}:
        both = f"{flag}/--no-{flag.removeprefix('--')}"
        return click.option(both, name, is_flag=True, default=default, type=_OrAuto(), help=known.help)
    if hint is bool:
        both = f"{flag}/--no-{flag.removeprefix('--')}" if default else flag
        return click.option(both, name, is_flag=True, default=default, show_default=default, help=known.help)
    (kind, *rest) = [part for part in get_args(hint) if part is not type(None)] or [hint]
    choices = get_args(kind) or (kind, *rest)
    if isinstance(choices[0], str):
        shape: Any = click.Choice([str(choice) for choice in choices])
    elif get_args(hint) == (int,):
        shape = Numbers()
    elif kind is str:
        shape = str
    else:
        shape = click.IntRange(min=int(known.least or 0)) if kind is int else float
    shown = default not in (None, ())
    flags = (flag, f"--{known.alias}") if known.alias else (flag,)
    return click.option(
        *flags, name, default=default, show_default=shown, type=shape, metavar=known.metavar, help=known.help
    )


_TRAINING: tuple[Callable[[Command], Command], ...] = (
    count_option("--epochs", default=20, least=0, help="Epochs of the main stage."),
    count_option("--batch-size", default=128, help="Samples per batch."),
    *(_setting(name) for name in hints()),
    count_option("--workers", default=0, least=0, help="Worker processes that read large images."),
    picture_options,
    limit_option,
    click.option("--no-augment", is_flag=True, help="Do not augment training images."),
    click.option(
        "--randaugment",
        type=int,
        metavar="MAGNITUDE",
        help="Apply two RandAugment operations of this magnitude (0 to 30, usually 9) to every training image, after shift and flip.",
    ),
    count_option(
        "--views",
        metavar="N",
        help="Augment every training image in this many fixed ways, one per epoch in turn. With --feature-cache the teacher computes"
        " each of them once.",
    ),
    cache_option,
    logits_option,
    task_option,
    click.option("--resume", is_flag=True, help="Continue the run in RUN_DIR, or start one if there is none."),
    click.option(
        "--allow-changed",
        "allow_changed",
        multiple=True,
        metavar="NAME",
        help="With --resume: a setting that may differ from the start of the run, such as main-loss, data or batch-size; repeatable. Any"
        " other change that affects the result is refused by name.",
    ),
    trust_option,
)

SECTIONS: dict[str, tuple[str, ...]] = {
    "Data and models": (
        "data",
        "batch_size",
        "size",
        "channels",
        "mean",
        "std",
        "workers",
        "limit",
        "cache",
        "logits",
        "task",
        "trust",
    ),
    "Training": ("epochs", *(name for name in hints() if about(name).changes_result)),
    "The run": ("output", "resume", "allow_changed", *(name for name in hints() if not about(name).changes_result)),
}


def training_options(command: Command) -> Command:
    """The options that `distill` and `train` share."""
    for option in reversed(_TRAINING):
        command = option(command)
    return command


keep_features_option = click.option(
    "--keep-features",
    metavar="WEIGHT",
    type=float,
    help="Add the warm-up loss of all pairs to the main loss, with this weight; for few images, 10. [default: 0]",
)
no_warmup_option = click.option("--no-warmup", is_flag=True, help="Skip the warm-up; train with the main loss only.")
main_option_option = click.option(
    "--main-option",
    "main_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of the main loss, such as temperature=2; repeatable.",
)
qat_option = count_option(
    "--qat",
    metavar="EPOCHS",
    help="Then train this many more epochs, into RUN_DIR/int8, with weights and activations rounded as in an int8 file: for students"
    " that lose too much accuracy with `export --int8`.",
)


def for_int8(
    teacher: nn.Module | TracedModel,
    student: nn.Module,
    loader: Iterable[Any],
    settings: Mapping[str, Any],
    epochs: int,
) -> None:
    """The settings of a quantisation-aware run that follows another run."""
    from indistill_fx.training.chain import INT8, distill_for_int8

    out = f"{settings['run_dir']}/{INT8}"
    say(f"Quantisation-aware, for {epochs} more epoch{'s' * (epochs != 1)}, into {out}:")
    print_run(distill_for_int8(teacher, student, loader, epochs=epochs, **settings), out)
    console().print(
        f"The int8 file: indistill-fx export {quote(out)} -o student.onnx --int8 --data {quote(settings['about']['data'])}",
        soft_wrap=True,
        highlight=False,
    )


def open_training_data(options: Mapping[str, Any], *models: Source) -> Data:
    """Open the data of a training command; the first of the models is the one to train."""
    named = {name: options[name] for name in ("batch_size", "workers", "seed", "limit", "cache")}
    named |= {"augment": not options["no_augment"], "randaugment": options["randaugment"], "views": options["views"]}
    return open_pictures(options["data"], options, *models, **named, training=True, progress=True)


def kept_of(
    spec: str, module: nn.Module, example: Any, data: Data, options: Mapping[str, Any], **more: str
) -> dict[str, Any]:
    """What a run records of its model and data, so that `export`, `evaluate` and `bench` accept the run directory.

    Of a batch by name the model gets what it takes; labels and file names stay out.
    """
    from indistill_fx.batch import call_of
    from indistill_fx.runs.load import about, about_data
    from indistill_fx.system.model_inputs import Inputs

    call = call_of(example, Inputs.of(module), where="The example")
    return about(spec, options["data"], data.input_size, call, **more, **about_data(data), **entry(options))


def task_of(options: Mapping[str, Any], *models: Source) -> str | Task | None:
    """What labels mean, as asked, or as the first of the models that are runs was trained; None: to be inferred."""
    from indistill_fx.evaluation.kept_task import asked_or_kept

    task, origin = asked_or_kept(options["task"], *models)
    if options["task"] is None and task is not None:
        say(f"The task is {task if isinstance(task, str) else task.name}, {origin}; --task names another.")
    return task


def entry(options: Mapping[str, Any]) -> dict[str, Any]:
    """Which output holds the logits, where it was named: what a run keeps of it."""
    return {} if options["logits"] is None else {"logits": options["logits"]}


def settings_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The `Settings` among the options of a training command.

    Raises:
        ConfigError: they are impossible: the device does not exist, or two options contradict each other.
    """
    found = {name: options[name] for name in hints()}
    Settings(**found)
    return found


def main_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse values as Python literals where possible; others stay text."""
    from ast import literal_eval

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise ConfigError(
                f"--main-option {pair!r} is not of the form NAME=VALUE.",
                where="--main-option",
                got=pair,
                hint="Write --main-option temperature=2.",
            )
        try:
            found[name] = literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found


def print_run(record: RunRecord, run_dir: str) -> None:
    """The summary at a run's end."""
    from indistill_fx.cli.tables import plain_table

    table = plain_table(
        "stage",
        "epochs",
        "steps",
        "first loss",
        "last loss",
        "seconds",
        numbers=("epochs", "steps", "first loss", "last loss", "seconds"),
    )
    for stage in record.stages:
        losses = [f"{stage.losses[0]:.4g}", f"{stage.losses[-1]:.4g}"] if stage.losses else ["", ""]
        table.add_row(stage.name, str(stage.epochs), str(stage.steps), *losses, f"{stage.seconds:.0f}")
    out = console()
    out.print(table)
    for stage in record.stages:
        for note in stage.notes:
            out.print(f"{stage.name}: {note}")
    metric = record.metric
    if record.value is not None:
        teacher = f", teacher {metric.text(record.teacher_value)}" if record.teacher_value is not None else ""
        best = f" (best {metric.text(record.best)} after epoch {record.best_epoch})" if record.best is not None else ""
        out.print(f"Test {metric.title} {metric.text(record.value)}{best}{teacher}.")
        others = {name: value for name, value in (record.metrics or {}).items() if name != metric.name}
        if others:
            others_text = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in others.items())
            out.print(f"Also {others_text}.")
    if record.average is not None:
        out.print(f"Moving average of the weights: {metric.title} {metric.text(record.average[metric.name])}.")
    if record.best is not None and record.value is not None and record.metric.better(record.best, record.value):
        best_weights = quote(f"MODEL@{run_dir}/checkpoints/best.safetensors")
        out.print(f"The weights of epoch {record.best_epoch}: {best_weights}.", soft_wrap=True)
    out.print(
        f"Everything is in {run_dir}; next: `indistill-fx export {quote(run_dir)} -o student.onnx`.", soft_wrap=True
    )


def print_arms(records: dict[str, RunRecord], run_dir: str) -> None:
    """The table at a comparison's end."""
    from indistill_fx.cli.tables import plain_table

    first = next(iter(records.values()))
    metric = first.metric
    numbers = (metric.title, "best", "last loss", "epochs", "seconds")
    table = plain_table("trained by", *numbers, numbers=numbers)
    for name, record in records.items():
        value, best = (metric.text(one) if one is not None else "" for one in (record.value, record.best))
        table.add_row(
            name, value, best, f"{record.epochs[-1].loss:.4g}", str(len(record.epochs)), f"{record.seconds:.0f}"
        )
    out = console()
    teacher = first.teacher_value
    out.print(table, f"Teacher: {metric.text(teacher)}" if teacher is not None else "")
    out.print(
        f"A run directory for each is in {run_dir}; try `indistill-fx export {quote(f'{run_dir}/indistill')} -o student.onnx`.",
        soft_wrap=True,
    )
