"""How images are prepared for the trained model and for its teacher: the options, and the models' own values without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common
from indistill_fx.cli.common import Command, say
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from indistill_fx.data.dataset import Data
    from indistill_fx.graph.view import View
    from indistill_fx.loading.load import Source


class _Size(click.ParamType[tuple[int, int]]):
    """A side length, or height and width: 96, 96x160."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Height and width."""
        if not isinstance(value, str):
            return value
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
            raise ConfigError(
                f"--size {value!r} is not a size.", where="--size", got=value, hint="Write it as 96, or 96x160."
            )
        return int(sides[0]), int(sides[-1])


class _Figures(click.ParamType[Any]):
    """A word, or a number for every channel."""

    name = "figures"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word, or the numbers."""
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            return value


NAMES = ("size", "channels", "mean", "std")
_OPTIONS = (
    click.option(
        "--size",
        type=_Size(),
        metavar="96|96x160",
        help="Resize images to this size. [default: the images' own size if it is at most 64 pixels, else the model's]",
    ),
    click.option(
        "--channels",
        type=click.Choice(["1", "3"]),
        help="Channels of the images: 1 (grey) or 3 (RGB). [default: what the model takes]",
    ),
    click.option(
        "--mean",
        type=_Figures(),
        metavar="auto|NAME|A,B,C",
        help="Normalise images with this mean (of values from 0 to 1). A word sets mean and std: auto measures them on the"
        " training set; imagenet, cifar10, cifar100 and half (0.5) are fixed values. [default: the run's, or the data's own]",
    ),
    click.option("--std", type=_Figures(), metavar="A,B,C", help="Normalise images with this standard deviation."),
)


def picture_options(command: Command) -> Command:
    """--size, --channels, --mean, --std."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def reading_options(command: Command) -> Command:
    """--limit, --workers, --cache, --batch-size: how a whole data set is read once; see `reading`."""
    workers = common.count_option("--workers", default=0, least=0, help="Processes that read large images.")
    batch_size = common.count_option("--batch-size", default=256, help="Samples per batch.")
    for option in (batch_size, common.cache_option, workers, common.limit_option):
        command = option(command)
    return command


def reading(options: dict[str, Any]) -> dict[str, Any]:
    """What `reading_options` say, as `open_pictures` takes it."""
    return {name: options[name] for name in ("limit", "workers", "cache", "batch_size")}


def compared_options(command: Command) -> Command:
    """Options of comparing a file with a model: --json, the image options, --input, --logits, --task, --trust."""
    compared = (common.json_option, picture_options, common.input_option, common.logits_option)
    for option in reversed((*compared, common.task_option, common.trust_option)):
        command = option(command)
    return command


class _Classes(click.ParamType[Any]):
    """Class names or numbers, or a file of them: one per line, or a JSON list."""

    name = "classes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list; as integers, if all entries are integers."""
        from indistill_fx.data.class_names import read_classes

        return read_classes(value) if isinstance(value, str) else value


def _teacher_option(name: str, kind: click.ParamType[Any], help: str, metavar: str | None = None) -> Any:
    text, bracket, default = help.partition(" [default:")
    text += " Give it once for all teachers, or once for each in their order."
    return click.option(
        f"--teacher-{name}", type=kind, multiple=True, metavar=metavar, help=f"{text}{bracket}{default}"
    )


_TEACHERS = (
    _teacher_option(
        "size",
        _Size(),
        "Resize the teacher's images to this size. [default: the size its weights were trained for, if known; else the student's]",
        "224|96x160",
    ),
    _teacher_option(
        "channels",
        click.Choice(["1", "3"]),
        "Convert the teacher's images to 1 (grey) or 3 (RGB) channels. [default: what it takes]",
    ),
    _teacher_option(
        "mean",
        _Figures(),
        "Normalise the teacher's images with this mean. A word sets mean and std, as with --mean; `data` stands for the student's values."
        " [default: the values its weights were trained with, if known; else the student's]",
        "data|NAME|A,B,C",
    ),
    _teacher_option("std", _Figures(), "The standard deviation to go with --teacher-mean.", "A,B,C"),
    _teacher_option(
        "classes",
        _Classes(),
        "For a teacher whose classes are not the student's: the names of all its outputs, in order; or, for every class of the data,"
        " the index (from 0) of the teacher's output. In a file, one per line.",
        "FILE|A,B|3,0",
    ),
)
TEACHER_NAMES = ("teacher_size", "teacher_channels", "teacher_mean", "teacher_std", "teacher_classes")


def teacher_options(command: Command) -> Command:
    """--teacher-size, --teacher-channels, --teacher-mean, --teacher-std, --teacher-classes."""
    for option in reversed(_TEACHERS):
        command = option(command)
    return command


def teacher_views(
    options: Mapping[str, Any], teachers: Sequence[Source], data: Data | None, planned: Sequence[View | None] = ()
) -> list[View | None]:
    """The view of the data of each teacher; it is printed.

    Args:
        options: those of `teacher_options`; others are not read.
        teachers: one or several.
        data: what the student is trained on, if that is known.
        planned: the plan's view for each of them, for what the options leave open.

    Raises:
        ConfigError: an option is given neither once nor once for each teacher; or see `stages.teacher_view`.
    """
    from indistill_fx.stages.teacher_view import ViewOptions, teacher_view

    if any(source.kind == "saved outputs" for source in teachers):
        if given := [name for name in TEACHER_NAMES if options[name]]:
            flag = f"--{given[0].replace('_', '-')}"
            raise ConfigError(
                f"{flag} has no effect on outputs that are saved already.",
                where=flag,
                hint=f"Give {flag} to `save-outputs` when the outputs are made.",
            )
        return [None] * len(teachers)
    asked = {name: _for_each(name, options[name], len(teachers)) for name in TEACHER_NAMES}
    asked["teacher_channels"] = [int(count) if count else None for count in asked["teacher_channels"]]
    plans = list(planned) if len(planned) == len(teachers) else [None] * len(teachers)
    views = []
    for number, (teacher, plan_view) in enumerate(zip(teachers, plans, strict=True)):
        own_options = {name.removeprefix("teacher_"): values[number] for name, values in asked.items()}
        view, notes = teacher_view(teacher, data, ViewOptions(**own_options), plan_view)
        views.append(view)
        for note in notes:
            say(note)
    return views


def _for_each(name: str, values: Sequence[Any], teachers: int) -> list[Any]:
    """An option's value for every teacher."""
    if len(values) not in (0, 1, teachers):
        option = f"--{name.replace('_', '-')}"
        raise ConfigError(
            f"{option} is given {len(values)} times, and there {'is one teacher' if teachers == 1 else f'are {teachers} teachers'}.",
            where=option,
            got=len(values),
            expected="once" if teachers == 1 else f"once, or {teachers} times in the order of the teachers",
        )
    return list(values) if len(values) == teachers else [values[0] if values else None] * teachers


def open_pictures(
    spec: str, options: Mapping[str, Any], *sources: Source, training: bool = False, told: bool = True, **more: Any
) -> Data:
    """Open the data, prepared as the options say, or as a run was trained, or as the first model wants; notes are printed.

    Args:
        spec: of the data.
        options: those of `picture_options`; others are not read.
        sources: the models, the one that the data must fit first.
        training: whether that one is to be trained on them; then what a factory's network might want does not count.
        told: whether notes are printed.
        more: of `open_data`.

    Raises:
        ConfigError: see `open_data`; or a model's classes are the data's in another order.
    """
    from indistill_fx.data.open import open_data
    from indistill_fx.stages.teacher_view import check_class_order

    asked: dict[str, Any] = {name: options.get(name) for name in NAMES}
    asked["channels"] = int(asked["channels"]) if asked["channels"] is not None else None
    known = tuple(
        replace(source, wanted_normalisation=None) if training and source.kind == "factory" else source
        for source in sources
    )
    arguments: dict[str, Any] = asked | _wanted(spec, asked, known) | more
    data = open_data(spec, **arguments)
    different = check_class_order(sources[0], data.classes) if sources else None
    given = {"limit": options.get("limit") is not None, "augment": bool(options.get("no_augment"))}
    ours = [f"no parameter `{name}`" for name, asked_for in given.items() if not asked_for]  # the command's, in `more`
    notes = [note for note in data.notes if not any(text in note for text in ours)]
    for note in (*notes, *((different,) if different else ())) if told else ():
        say(note)
    return data


def _wanted(spec: str, asked: Mapping[str, Any], sources: tuple[Source, ...]) -> dict[str, Any]:
    """The models' own values for options that were not given: those of runs and what came of them for all data, of others for folders."""
    from indistill_fx.data.normalisation import Known, in_channels
    from indistill_fx.loading.input_facts import picture_channels
    from indistill_fx.runs.load import is_run, trained_here

    kind = spec.partition(":")[0]
    found: dict[str, Any] = {}
    run = next((source for source in sources if trained_here(source)), None)
    if kind not in ("digits", "cifar10", "cifar100", "imagefolder"):
        return found
    known = [count for source in sources if (count := picture_channels(source.module)) is not None]
    channels = asked["channels"] or (known[0] if known else None)
    if run is not None and run.normalisation is not None and asked["mean"] is None and asked["std"] is None:
        figures = run.normalisation  # the run's images may have colour channels where these are grey
        figures = in_channels(figures, channels) if channels in (1, 3) else figures
        whose = f"as {run.spec} {'was trained' if is_run(run.spec) else 'needs them'}"
        found["mean"], found["std"] = (Known(part, whose) for part in figures)
    if kind != "imagefolder":
        return found
    of_model = sources[0].wanted_normalisation if sources else None
    if run is None and of_model is not None and asked["mean"] is None and asked["std"] is None:
        found["mean"], found["std"] = (Known(part, f"as {sources[0].spec} needs them") for part in of_model)
    if asked["channels"] is None:
        found["channels"] = channels
    sizes = [source.input_size for source in sources if source.input_size is not None and len(source.input_size) == 3]
    found["model_size"] = sizes[0][1:] if sizes else None
    if run is not None and run.input_size is not None and len(run.input_size) == 3 and asked["size"] is None:
        found["size"] = run.input_size[1:]
    return found
