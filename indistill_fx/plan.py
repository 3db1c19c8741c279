"""The alignment plan: which layer of the teacher goes with which of the student. A file that people read, edit and review."""

from __future__ import annotations

import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from indistill_fx.errors import ConfigError, TrainError, instead_of, nearest
from indistill_fx.graph.view import View
from indistill_fx.system.arguments import require
from indistill_fx.system.files import read_bounded, replace_file, require_few_values, require_replaceable
from indistill_fx.system.values import Value, fault
from indistill_fx.traced import TracedModel

Adapter = Literal["none", "pool", "tokens_to_map"]
"""How two features are brought to one shape: not at all; the larger map pooled to the smaller; tokens laid out as a map, then pooled."""

MADE = "the student was made of the teacher"
"""Reason of the pairs of a student that `prune` or `compress` made: its channels are some of the teacher's."""
LARGEST = 64 << 20
"""Bytes a plan file may have; a million pairs, which no pair of models has, would be several hundred."""

Name = Annotated[str, Field(max_length=4096)]
Size = Annotated[int, Field(ge=0, lt=1 << 31)]
Shape = Annotated[tuple[Size, ...], Field(max_length=16)]


class Pair(Value):
    """One teacher layer and one student layer that correspond.

    Attributes:
        teacher: tap name in the teacher (`layer3`).
        student: tap name in the student.
        teacher_shape: shape of the teacher's tensor before narrowing, batch first.
        student_shape: shape of the student's tensor, batch first.
        kept: the teacher's channels that are compared, ascending; None: all of them, or as many as the student has if it is wider.
        adapter: how the two are brought to one shape.
        score: how well they fit, between 0 and 1.
        reason: why they were paired.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> plan = ifx.align(DigitsTeacher(), DigitsStudent(), example_inputs=torch.randn(2, 1, 8, 8))
        >>> pair = plan.pairs[0]
        >>> pair.teacher, pair.teacher_shape, pair.student, pair.student_shape
        ('layer1', (2, 32, 8, 8), 'blocks.0', (2, 6, 8, 8))
    """

    teacher: Name
    student: Name
    teacher_shape: Shape
    student_shape: Shape
    kept: Annotated[tuple[Size, ...], Field(max_length=1 << 20)] | None = None
    adapter: Adapter = "none"
    score: Annotated[float, Field(ge=0, le=1)] = 1.0
    reason: str = ""

    @model_validator(mode="after")
    def _kept_ascending(self) -> Pair:
        if self.kept is not None and any(a >= b for a, b in pairwise(self.kept)):
            raise ValueError(f"kept channels of `{self.teacher}` must be ascending and without repeats")
        return self


class ModelStamp(Value):
    """Which model a plan was made for: its class, and the fingerprint of its structure."""

    name: str
    fingerprint: str

    @classmethod
    def of(cls, model: TracedModel) -> ModelStamp:
        """The stamp of a traced model."""
        return cls(name=type(model.module).__name__, fingerprint=model.fingerprint)


class Layers(Value):
    """What the layers of both models were when the plan was made; for saying which of them changed how."""

    teacher: dict[str, str] = Field(default_factory=dict)
    student: dict[str, str] = Field(default_factory=dict)


class AlignmentPlan(Value):
    """Pairs of layers, shallow to deep: a file to read, edit and review.

    Attributes:
        schema_version: of this file format.
        teacher: the model that the plan was made for.
        student: the model that the plan was made for.
        pairs: the pairs to warm up, shallow to deep.
        embedding: the pair of penultimate vectors, which relational losses compare; None if one of the models has none.
        unmatched: stages without a partner, and why.
        layers: what the layers of both models were; without them, `drift` can say that a model changed, but not how.
        view: how the teacher sees a batch that was made for the student; None: the batch as it is.
        views: likewise, of each of several teachers.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent, DigitsTeacher
        >>> plan = ifx.align(DigitsTeacher(), DigitsStudent(), example_inputs=torch.randn(2, 1, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan.save(f"{folder}/plan.json")
        ...     read = ifx.AlignmentPlan.load(f"{folder}/plan.json")
        >>> read == plan
        True
        >>> fewer = plan.model_copy(update={"pairs": plan.pairs[1:]})
        >>> plan.diff(fewer)
        ('- layer1 ↔ blocks.0',)
    """

    schema_version: Literal[1] = 1
    teacher: ModelStamp
    student: ModelStamp
    pairs: Annotated[tuple[Pair, ...], Field(max_length=10_000)]
    embedding: Pair | None = None
    unmatched: tuple[str, ...] = ()
    layers: Layers = Field(default=Layers(), repr=False)
    view: View | None = None
    views: Annotated[tuple[View | None, ...], Field(max_length=1000)] = ()

    @property
    def described_views(self) -> tuple[str, ...]:
        """What a teacher sees that is other than the batch, in words, a line each."""
        seen = {"teacher": self.view} | {f"teachers.{number}": view for number, view in enumerate(self.views)}
        return tuple(f"{name}: {view}" for name, view in seen.items() if view is not None and str(view))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file is written completely or not at all.

        Args:
            path: the file; an older one is replaced.

        Raises:
            ConfigError: nothing can be written there.
        """
        require(path, str | os.PathLike, "path", of="AlignmentPlan.save")
        target = Path(path)
        require_replaceable(target)
        text = self.model_dump_json(indent=2) + "\n"
        try:
            replace_file(target, lambda draft: draft.write_text(text, encoding="utf-8"))
        except TrainError as error:
            cause = error.__cause__
            raise ConfigError(
                f"The plan cannot be written to {target}: {getattr(cause, 'strerror', None) or cause}.",
                where=str(target),
                hint="Give another path with -o.",
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AlignmentPlan:
        """Read a plan.

        Args:
            path: a file that `save` wrote, perhaps edited since.

        Returns:
            The plan.

        Raises:
            ConfigError: there is no such file, it is not JSON, or it is not a plan; the message names the wrong field.
        """
        hint = "`indistill-fx align … -o plan.json` makes one."
        require(path, str | os.PathLike, "path", of="AlignmentPlan.load")
        try:
            with instead_of(OSError, ConfigError(f"The plan {path} cannot be read", where=str(path), hint=hint)):
                text = read_bounded(path, LARGEST)
                require_few_values(text)  # pydantic would keep an error for each that does not belong there
                return cls.model_validate_json(text)
        except UnicodeDecodeError as error:
            raise _not_json(path, error) from error
        except ValidationError as error:
            first = error.errors()[0]
            if first["type"] == "json_invalid":
                raise _not_json(path, first["msg"]) from error
            place, reason = fault(error)
            raise ConfigError(
                f"{path} is not an alignment plan: {place or 'the whole file'}: {reason}.",
                where=place or "the whole file",
                got=first.get("input"),
                hint="Correct that field, or make a new plan with `align`.",
            ) from error

    def check(self, teacher: TracedModel, student: TracedModel) -> None:
        """Make sure that the plan fits the two models.

        Args:
            teacher: traced.
            student: traced.

        Raises:
            ConfigError: a layer is missing or has another shape, kept channels do not exist, or pairs cross; the message says what changed.
        """
        wrong = [
            *_misfits(teacher, [(pair.teacher, pair.teacher_shape) for pair in self._all_pairs]),
            *_misfits(student, [(pair.student, pair.student_shape) for pair in self._all_pairs]),
            *(_surplus(pair, teacher) for pair in self._all_pairs),
        ]
        found = [misfit for misfit in wrong if misfit is not None]
        if found:
            if (teacher.fingerprint, student.fingerprint) == (self.student.fingerprint, self.teacher.fingerprint):
                hint = "It is for the same two models in the other order: swap teacher and student."
            else:
                stale = self.drift(teacher, student)
                hint = f"Use the models and --input it was made for{' (' + '; '.join(stale) + ')' if stale else ''}, correct the names, "
                hint += "or make a new one with `indistill-fx align`."
            text = "; ".join(text for _, text in found)
            raise ConfigError(f"The plan does not fit: {text}.", where=found[0][0], hint=hint)
        _check_order(self.pairs, teacher, student)

    def drift(self, teacher: TracedModel, student: TracedModel) -> tuple[str, ...]:
        """How the structures of the models differ from those that the plan was made for.

        A plan still fits a changed model if all its layers are still there; this says that the model has changed.

        Args:
            teacher: traced.
            student: traced.

        Returns:
            One sentence for each model that has changed, with what changed.
        """
        found = []
        for stamp, model, before in (
            (self.teacher, teacher, self.layers.teacher),
            (self.student, student, self.layers.student),
        ):
            if stamp.fingerprint != model.fingerprint:
                changes = _changed_layers(before, model.layers)
                found.append(
                    f"the {model.role} is not the {stamp.name} the plan was made for: its structure has changed"
                    + (f" ({changes})" if changes else "")
                )
        return tuple(found)

    def diff(self, other: AlignmentPlan) -> tuple[str, ...]:
        """What changed from this plan to another.

        Args:
            other: the later plan.

        Returns:
            One line each: `- pair` was removed, `+ pair` was added, `~ pair` is different.
        """
        lines = [
            f"~ {role}: {a.name} {a.fingerprint} → {b.name} {b.fingerprint}"
            for role, a, b in (("teacher", self.teacher, other.teacher), ("student", self.student, other.student))
            if a != b
        ]
        before, after = self._by_layers, other._by_layers
        for key in dict.fromkeys((*before, *after)):
            if key not in after:
                lines.append(f"- {key}")
            elif key not in before:
                lines.append(f"+ {key} (score {after[key].score:.2f})")
            else:
                changes = [text for name in Pair.model_fields if (text := _change(name, before[key], after[key]))]
                lines += [f"~ {key}: {'; '.join(changes)}"] if changes else []
        return tuple(lines)

    def with_penultimate(self) -> AlignmentPlan:
        """The plan with the penultimate vectors as the last pair; the plan itself if there are none, or a pair has them already.

        Returns:
            A plan.
        """
        last = self.embedding
        if last is None or any(last.teacher == pair.teacher or last.student == pair.student for pair in self.pairs):
            return self
        return self.model_copy(update={"pairs": (*self.pairs, last)})

    @property
    def _all_pairs(self) -> tuple[Pair, ...]:
        return (*self.pairs, *([self.embedding] if self.embedding else []))

    @property
    def _by_layers(self) -> dict[str, Pair]:
        found = {f"{pair.teacher} ↔ {pair.student}": pair for pair in self.pairs}
        if self.embedding is not None:
            found[f"embedding {self.embedding.teacher} ↔ {self.embedding.student}"] = self.embedding
        return found


def plan_schema() -> str:
    """The JSON Schema of the plan file, as published in docs/plan.schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **AlignmentPlan.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


def _not_json(path: str | os.PathLike[str], reason: object) -> ConfigError:
    return ConfigError(
        f"{path} is not JSON: {reason}.",
        where=str(path),
        hint="Give a plan written by `indistill-fx align … -o plan.json`.",
    )


_MOST_CHANGES = 4
"""At most so many changed layers are named; of the others only the number is given."""


def _changed_layers(before: dict[str, str], after: dict[str, str]) -> str:
    """Which layers were removed, added or changed, and how."""
    if not before:
        return ""
    changes = [
        f"`{name}` was {before[name]}, is {after[name]}" if name in after else f"`{name}` is gone"
        for name in before
        if before[name] != after.get(name)
    ]
    changes += [f"`{name}` is new: {after[name]}" for name in after if name not in before]
    if not changes:
        return "no layer with weights, but operations between them"
    rest = f"; and {len(changes) - _MOST_CHANGES} more" if len(changes) > _MOST_CHANGES else ""
    return "; ".join(changes[:_MOST_CHANGES]) + rest


_Misfit = tuple[str, str]
"""The layer at fault, and how."""


def _misfits(model: TracedModel, layers: list[tuple[str, Shape]]) -> list[_Misfit | None]:
    return [_misfit(model, tap, shape) for tap, shape in layers]


def _misfit(model: TracedModel, tap: str, shape: Shape) -> _Misfit | None:
    try:
        facts = model.facts_of(tap)
    except ConfigError:
        return (
            tap,
            f"the {model.role} has no layer `{tap}` ({nearest(tap, model.taps) or 'none has a similar name'})".replace(
                ".)", ")"
            ),
        )
    sizes = [n for axis, n in enumerate(facts.shape) if axis != facts.batch_axis]
    planned = [n for axis, n in enumerate(shape) if axis != facts.batch_axis]
    if sizes == planned:
        return None
    texts = ["x".join(map(str, found)) for found in (planned, sizes)]
    return tap, f"`{tap}` of the {model.role} is {texts[0]} in the plan and {texts[1]} in the model"


def _surplus(pair: Pair, teacher: TracedModel) -> _Misfit | None:
    if not pair.kept or pair.teacher not in teacher.taps:
        return None
    facts = teacher.facts_of(pair.teacher)
    width = 0 if facts.channel_axis is None else facts.channels
    if pair.kept[-1] < width:
        return None
    return pair.teacher, f"the plan keeps channel {pair.kept[-1]} of `{pair.teacher}`, which has {width} channels"


def _change(name: str, before: Pair, after: Pair) -> str:
    a, b = getattr(before, name), getattr(after, name)
    if a == b:
        return ""
    if name == "kept":
        counts = ["all" if kept is None else len(kept) for kept in (a, b)]
        return (
            f"kept channels {counts[0]} → {counts[1]}" if counts[0] != counts[1] else f"other {counts[0]} channels kept"
        )
    if name.endswith("shape"):
        a, b = "x".join(map(str, a)), "x".join(map(str, b))
    return f"{name.replace('_', ' ')} {a} → {b}"


def member_of(tap: str) -> str:
    """Which of several teachers a layer is of: `teachers.1` of `teachers.1.layer3` and `teachers.1:relu`; empty for one teacher."""
    found = re.match(r"teachers\.\d+(?=[.:])", tap)
    return found[0] if found else ""


def _check_order(pairs: tuple[Pair, ...], teacher: TracedModel, student: TracedModel) -> None:
    orders = [{node.name: k for k, node in enumerate(model.graph_module.graph.nodes)} for model in (teacher, student)]
    couples = [(first, second, "student") for first, second in pairwise(pairs)]
    for name in dict.fromkeys(member_of(pair.teacher) for pair in pairs):  # each of several teachers by itself
        of_member = [pair for pair in pairs if member_of(pair.teacher) == name]
        couples += [(first, second, "teacher") for first, second in pairwise(of_member)]
    for first, second, role in couples:
        model, order = (teacher, orders[0]) if role == "teacher" else (student, orders[1])
        places = [order[model.node(getattr(pair, role)).name] for pair in (first, second)]
        if places[0] >= places[1]:
            raise ConfigError(
                f"The pairs `{first.teacher}` ↔ `{first.student}` and `{second.teacher}` ↔ `{second.student}` cross or repeat a layer.",
                where=second.teacher,
                hint="Order the pairs from the input to the output on both sides.",
            )
