"""Which view a teacher has of the student's data: as asked for, else by a plan, else by what its source knows and the data give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from indistill_fx.data.dataset import Data
from indistill_fx.data.normalisation import Figures as Asked
from indistill_fx.data.normalisation import Normalisation, choose, in_channels
from indistill_fx.errors import ConfigError, nearest
from indistill_fx.graph.view import Figures, Rescaling, View
from indistill_fx.loading.input_facts import facts_of, other_channels
from indistill_fx.loading.load import Source
from indistill_fx.system.call import Call

AS_GIVEN = "data"
"""In the place of figures: those of the data."""
_SAME = 1e-4
"""Figures that differ by less are the same, published with other roundings."""


class Given(NamedTuple):
    """What is known of the data that a student is trained on; `Data` says as much, and more.

    Attributes:
        input_size: of one sample: (channels, height, width).
        normalisation: mean and std per channel; None if unknown.
        classes: their names by label, if they have any.
    """

    input_size: tuple[int, ...]
    normalisation: Normalisation | None = None
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewOptions:
    """What was asked for.

    Attributes:
        size: height and width of the teacher's images.
        channels: of the teacher's images, 1 or 3.
        mean: figures as in `open_data`, or `data`: those of the data.
        std: likewise.
        classes: the teacher's outputs for the data's classes, in their order; or the names of all of the teacher's outputs, in order.
    """

    size: tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    mean: Asked | None = None
    std: Asked | None = None
    classes: Sequence[int] | Sequence[str] | None = None


def known_view(
    teacher: nn.Module, example: Call, normalisation: Normalisation | None
) -> tuple[View | None, tuple[str, ...]]:
    """The view by what is known of a model and of images alone, and what is to be said of it; none where there is no one image.

    Args:
        teacher: a module.
        example: inputs, as the student gets them.
        normalisation: what the images are normalised by, if that is known.
    """
    shapes = [value.shape for value in example.tensors if value.is_floating_point() and value.ndim == 4]
    if len(shapes) != 1:
        return None, ()
    facts = facts_of(teacher)
    source = Source(
        teacher,
        type(teacher).__name__,
        "module",
        normalisation=facts.normalisation,
        wanted_size=facts.wanted_size,
        wanted_normalisation=facts.wanted_normalisation,
    )
    return teacher_view(source, Given(tuple(shapes[0][1:]), normalisation), ViewOptions())


def teacher_view(
    teacher: Source, data: Data | Given | None, asked: ViewOptions, planned: View | None = None
) -> tuple[View | None, tuple[str, ...]]:
    """The view, and what is to be said of it.

    Args:
        teacher: with what its source knows of its input.
        data: what the student is trained on; None: nothing is known of them.
        asked: goes before everything else.
        planned: that of a plan, which goes before what the source knows.

    Raises:
        ConfigError: figures are asked for, and those of the data are not known; classes do not fit.
    """
    notes: list[str] = []
    size = _size(teacher, data, asked, planned)
    channels = _channels(teacher, data, asked, planned, size)
    view = View.combined(
        View(
            size=size,
            channels=channels,
            rescaling=_rescaling(teacher, data, asked, planned, channels, notes),
            classes=_classes(teacher, data, asked, planned, notes),
        ),
        View(dtype=planned.dtype) if planned is not None else None,
    )
    if view is not None:
        notes.insert(0, f"{teacher.spec}: {view}.")
    return view, tuple(notes)


def _size(
    teacher: Source, data: Data | Given | None, asked: ViewOptions, planned: View | None
) -> tuple[int, int] | None:
    given = data.input_size[1:] if data is not None and len(data.input_size) == 3 else None
    size = asked.size or (planned.size if planned is not None else None)
    if size is None and given is not None:
        size = teacher.wanted_size
    return size if size != given else None


def _channels(
    teacher: Source, data: Data | Given | None, asked: ViewOptions, planned: View | None, size: tuple[int, int] | None
) -> Literal[1, 3] | None:
    given = data.input_size[0] if data is not None and len(data.input_size) == 3 else None
    channels = asked.channels or (planned.channels if planned is not None else None)
    if channels is None and data is not None and len(data.input_size) == 3:
        shape = (2, data.input_size[0], *(size or data.input_size[1:]))
        channels = other_channels(teacher.module, Call((torch.zeros(shape),), {}))
    return channels if channels != given else None


def _rescaling(
    teacher: Source,
    data: Data | Given | None,
    asked: ViewOptions,
    planned: View | None,
    changed: int | None,
    notes: list[str],
) -> Rescaling | None:
    given = data.normalisation if data is not None else None
    channels = data.input_size[0] if data is not None and len(data.input_size) == 3 else 3
    if changed is not None and given is not None:  # the rescaling is done while images have three channels
        channels, given = 3, in_channels(given, 3)
    explicit = asked.mean is not None or asked.std is not None
    wanted = planned.rescaling.wanted if planned is not None and planned.rescaling is not None else None
    figures: Normalisation | None = (wanted.mean, wanted.std) if wanted is not None else teacher.wanted_normalisation
    if asked.mean == AS_GIVEN:
        return None
    if given is None:
        if explicit:
            raise ConfigError(
                "The normalisation of the images is not known, so it cannot be changed for the teacher.",
                where="teacher mean",
                hint="Use --data imagefolder:DIR, or let the function that makes your loaders return `normalisation`: (mean, std) too.",
            )
        if figures is not None and data is not None and len(data.input_size) == 3:
            notes.append(
                f"{teacher.spec} was trained on images normalised by {_shown(figures)}, but these data do not say how they are normalised,"
                " so it gets them unchanged. Let the function that makes the loaders return a dict with `normalisation`: (mean, std)."
            )
        return None
    if explicit:
        figures, _ = choose(asked.mean, asked.std, given, channels, lambda: given)
    if figures is None:
        usual = (
            f" (with its library's own weights it would be {_shown(teacher.normalisation)})"
            if teacher.normalisation
            else ""
        )
        if teacher.normalisation is None or not _equal(in_channels(teacher.normalisation, channels), given):
            notes.append(
                f"{teacher.spec}: the normalisation that it was trained with is unknown{usual}; it gets the student's, {_shown(given)}."
                " To set another: --teacher-mean and --teacher-std (in Python: teacher_view)."
            )
        return None
    figures = in_channels(figures, channels)
    return None if _equal(figures, given) else Rescaling(given=_as_figures(given), wanted=_as_figures(figures))


def _classes(
    teacher: Source, data: Data | Given | None, asked: ViewOptions, planned: View | None, notes: list[str]
) -> tuple[int, ...] | None:
    wanted = data.classes if data is not None else ()
    given = tuple(asked.classes or ())
    numbers = tuple(value for value in given if isinstance(value, int))
    if given and len(numbers) == len(given):
        if wanted and len(numbers) != len(wanted):
            raise ConfigError(
                f"{len(numbers)} outputs of the teacher are named, but the data have {len(wanted)} classes.",
                where="teacher classes",
                got=len(numbers),
                expected=len(wanted),
                hint=f"Give one output for each class, in this order: {_listed(wanted)}.",
            )
        return numbers
    if not given and planned is not None and planned.classes is not None:
        return planned.classes
    names = tuple(map(str, given)) or teacher.classes
    if given and not wanted:
        raise ConfigError(
            "The teacher's classes are given by name, but the data have no class names.",
            where="teacher classes",
            hint="Give the teacher's outputs by number, in the order of the data's classes.",
        )
    if not names or not wanted:
        return None
    found, absent = class_map(names, wanted)
    if absent and given:
        raise ConfigError(
            f"The data's class {absent[0]!r} is none of the teacher's: {_listed(names)}.",
            where="teacher classes",
            got=absent[0],
            expected=list(names)[:20],
            hint=f"{nearest(absent[0], names)} Give the names of all outputs in order, or the outputs by number.",
        )
    if absent:
        notes.append(
            f"{len(absent)} of the data's {len(wanted)} classes ({_listed(absent)}) are none of {teacher.spec}'s ({_listed(names)}): only"
            " features can be compared. If they are the same by other names: --teacher-classes."
        )
        return ()
    return found if found != tuple(range(len(names))) else None


def class_map(names: Sequence[str], wanted: Sequence[str]) -> tuple[tuple[int, ...], list[str]]:
    """The outputs of these names for classes of those names; and the classes that are absent. Case, spaces, `-` and `_` do not count."""
    places: Mapping[str, int] = {_plain(name): place for place, name in reversed(list(enumerate(names)))}
    found = [places.get(_plain(name)) for name in wanted]
    absent = [name for name, place in zip(wanted, found, strict=True) if place is None]
    return tuple(place for place in found if place is not None), absent


def check_class_order(model: Source, classes: Sequence[str]) -> str | None:
    """Compare a trained model's classes with those of data that it is to be measured on or trained further with.

    Returns:
        What is to be said: they have other names.

    Raises:
        ConfigError: they are the same in another order, so that every label would mean another class.
    """
    model_classes = model.classes
    if not model_classes or not classes or [*map(_plain, model_classes)] == [*map(_plain, classes)]:
        return None
    if sorted(map(_plain, model_classes)) == sorted(map(_plain, classes)):
        place = next(
            i
            for i, (model_class, other) in enumerate(zip(model_classes, classes, strict=True))
            if _plain(model_class) != _plain(other)
        )
        raise ConfigError(
            f"{model.spec} and the data have the same classes in another order: class {place} is {model_classes[place]!r} to the model and"
            f" {classes[place]!r} in the data.",
            where="classes",
            got=list(classes)[:20],
            expected=list(model_classes)[:20],
            hint=f"Let the data's labels count the classes in the model's order: {_listed(model_classes)}.",
        )
    return f"{model.spec} was trained on classes of other names than the data's: {_listed(model_classes)}; here {_listed(classes)}."


def _plain(name: str) -> str:
    return name.casefold().replace("_", " ").replace("-", " ").strip()


def _equal(one: Normalisation, other: Normalisation) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(first - second) < _SAME for first, second in pairs)


def _as_figures(figures: Normalisation) -> Figures:
    return Figures(mean=figures[0], std=figures[1])


def _shown(figures: Normalisation) -> str:
    return str(_as_figures(figures))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", … ({len(names)} in all)" if len(names) > 6 else "")
