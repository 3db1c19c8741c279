"""How pictures are prepared, for the model that is trained and for its teacher: options, and what follows from the models without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common
from indistill_fx.cli.common import Command, say
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from indistill_fx.data.dataset import Data
    from indistill_fx.graph.view import View
    from indistill_fx.loading.load import Source
    from indistill_fx.plan import AlignmentPlan


class _Size(click.ParamType[tuple[int, int]]):
    """A side, or height and width: 96, 96x160."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Height and width."""
        if not isinstance(value, str):
            return value
        sides = value.lower().split("x")
        if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
            raise ConfigError(
                f"--size {value!r} is no size.", where="--size", got=value, hint="Write it as 96, or 96x160."
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
        help="Resize images to this size. [default: their own up to 64 pixels; above that, the model's]",
    ),
    click.option("--channels", type=click.Choice(["1", "3"]), help="Grey or RGB. [default: what the model takes]"),
    click.option(
        "--mean",
        type=_Figures(),
        metavar="auto|NAME|A,B,C",
        help="Normalise images with this mean (of values from 0 to 1). A word sets mean and std: auto measures them; imagenet, cifar10,"
        " cifar100, half. [default: the run's, or the data's own]",
    ),
    click.option("--std", type=_Figures(), metavar="A,B,C", help="Normalise images with this standard deviation."),
)


def picture_options(command: Command) -> Command:
    """--size, --channels, --mean, --std."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def compared_options(command: Command) -> Command:
    """What a file and a model are compared on, and how it is told: --json, pictures, --input, --task, --trust."""
    own = (click.option("--json", "as_json", is_flag=True, help="Print JSON."), picture_options)
    for option in reversed((*own, common.input_option, common.task_option, common.trust_option)):
        command = option(command)
    return command


class _Classes(click.ParamType[Any]):
    """Names or numbers, or a file of them: one a line, or a list in JSON."""

    name = "classes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list; of whole numbers, if all of them are."""
        from indistill_fx.data.class_names import read_classes

        return read_classes(value) if isinstance(value, str) else value


_TEACHERS = (
    click.option(
        "--teacher-size",
        type=_Size(),
        metavar="224|96x160",
        help="Resize the teacher's images to this size. [default: what its weights are known to want, else the student's]",
    ),
    click.option(
        "--teacher-mean",
        type=_Figures(),
        metavar="data|NAME|A,B,C",
        help="What the teacher's images are normalised with. A word sets mean and std, as with --mean; data: as the student's."
        " [default: what its weights are known to want, else the student's]",
    ),
    click.option(
        "--teacher-std", type=_Figures(), metavar="A,B,C", help="The standard deviation to go with --teacher-mean."
    ),
    click.option(
        "--teacher-classes",
        type=_Classes(),
        metavar="FILE|A,B|3,0",
        help="Where the teacher's classes are not the student's: the names of all its outputs, in order, or the number of its output for"
        " every class of the data; a file has one a line.",
    ),
)
TEACHER_NAMES = ("teacher_size", "teacher_mean", "teacher_std", "teacher_classes")


def teacher_options(command: Command) -> Command:
    """--teacher-size, --teacher-mean, --teacher-std, --teacher-classes."""
    for option in reversed(_TEACHERS):
        command = option(command)
    return command


def teacher_view(
    options: Mapping[str, Any],
    teachers: Sequence[Source],
    data: Data | None,
    plan: AlignmentPlan | None = None,
    *,
    directly: bool = True,
) -> tuple[View, AlignmentPlan | None]:
    """What the teacher sees of the data, which is said; and the plan with it.

    Args:
        options: those of `teacher_options`; others are not read.
        teachers: the model, or several that see the same.
        data: what the student is trained on, if that is known.
        plan: whose view counts for what the options do not say.
        directly: whether the plan is of this teacher, and not of an assistant between it and the student.
    """
    from indistill_fx.graph.view import View
    from indistill_fx.stages.teacher_view import ViewOptions, teacher_view

    if any(one.kind == "saved outputs" for one in teachers):
        given = [name for name in TEACHER_NAMES if options[name]]
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            hint = "Give it to `save-outputs`."
            raise ConfigError(f"{flag} comes too late for saved outputs.", where=flag, hint=hint)
        return View(), plan
    asked = ViewOptions(**{name.removeprefix("teacher_"): options[name] for name in TEACHER_NAMES})
    own = plan if directly else None
    found = [teacher_view(one, data, asked, own.view if own is not None else None) for one in teachers]
    view = found[0][0]
    for one, (other, _) in zip(teachers, found, strict=True):
        if other != view:
            raise ConfigError(
                f"The teachers want to see different things. {teachers[0].spec}: {view or 'as the student'}. {one.spec}:"
                f" {other or 'as the student'}.",
                where="--teacher",
                hint="Say what all of them see: --teacher-size, --teacher-mean, --teacher-std, --teacher-classes; or distil from one.",
            )
    for note in dict.fromkeys(note for _, notes in found for note in notes):
        say(note)
    return view or View(), own.model_copy(update={"view": view}) if own is not None else plan


def open_pictures(spec: str, options: Mapping[str, Any], *sources: Source, training: bool = False, **more: Any) -> Data:
    """The data, prepared as the options say, else as a run was trained, else as the first model wants; notes are said.

    Args:
        spec: of the data.
        options: those of `picture_options`; others are not read.
        sources: the models, the one that the data must fit first.
        training: whether that one is to be trained on them; then what a factory's network might want does not count.
        more: of `open_data`.

    Raises:
        ConfigError: see `open_data`; or a model's classes are the data's in another order.
    """
    from indistill_fx.data.open import open_data
    from indistill_fx.stages.teacher_view import check_class_order

    asked: dict[str, Any] = {name: options.get(name) for name in NAMES}
    asked["channels"] = int(asked["channels"]) if asked["channels"] is not None else None
    known = tuple(
        replace(one, wanted_normalisation=None) if training and one.kind == "factory" else one for one in sources
    )
    arguments: dict[str, Any] = asked | _wanted(spec, asked, known) | more
    data = open_data(spec, **arguments)
    different = check_class_order(sources[0], data.classes) if sources else None
    for note in (*data.notes, *((different,) if different else ())):
        say(note)
    return data


def _wanted(spec: str, asked: Mapping[str, Any], sources: tuple[Source, ...]) -> dict[str, Any]:
    """What the models say of what was not asked for: runs of all kinds of pictures, others of folders."""
    from indistill_fx.runs.load import is_run

    kind = spec.partition(":")[0]
    found: dict[str, Any] = {}
    run = next((source for source in sources if is_run(source.spec)), None)
    if kind not in ("digits", "cifar10", "cifar100", "imagefolder"):
        return found
    if run is not None and run.normalisation is not None and asked["mean"] is None and asked["std"] is None:
        found["mean"], found["std"] = run.normalisation
    if kind != "imagefolder":
        return found
    own = sources[0].wanted_normalisation if sources else None
    if run is None and own is not None and asked["mean"] is None and asked["std"] is None:
        found["mean"], found["std"] = own
        say(f"Pictures are prepared as {sources[0].spec} wants them.")
    if asked["channels"] is None:
        channels = {count for source in sources if (count := _channels_of(source.module)) is not None}
        found["channels"] = channels.pop() if len(channels) == 1 else None
    sizes = [source.input_size for source in sources if source.input_size is not None and len(source.input_size) == 3]
    found["model_size"] = sizes[0][1:] if sizes else None
    if run is not None and run.input_size is not None and len(run.input_size) == 3 and asked["size"] is None:
        found["size"] = run.input_size[1:]
    return found


def _channels_of(module: nn.Module) -> int | None:
    """Channels of the pictures a model takes, by its first convolution."""
    from torch import nn

    first = next((part for part in module.modules() if isinstance(part, nn.Conv2d)), None)
    return first.in_channels if first is not None and first.in_channels in (1, 3) else None
