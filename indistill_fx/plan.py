"""The alignment plan: which layer of the teacher goes with which of the student. A file that people read, edit and review."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from indistill_fx.errors import ConfigError
from indistill_fx.traced import TracedModel

Adapter = Literal["none", "pool", "tokens_to_map"]
"""How the two features are brought to one shape: not at all; the larger map pooled to the smaller; tokens laid out as a map, then pooled."""

Shape = tuple[Annotated[int, Field(ge=0)], ...]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Pair(_Frozen):
    """One teacher layer and one student layer that belong together.

    Attributes:
        teacher: tap name in the teacher (`layer3`).
        student: tap name in the student.
        teacher_shape: shape of the teacher's tensor, batch first, before narrowing.
        student_shape: shape of the student's tensor, batch first.
        kept: the teacher's channels that are compared, ascending; None: all of them, or as many as the student has if it is wider.
        adapter: how the two are brought to one shape.
        score: how well they fit, between 0 and 1.
        reason: why they were paired.
    """

    teacher: str
    student: str
    teacher_shape: Shape
    student_shape: Shape
    kept: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    adapter: Adapter = "none"
    score: Annotated[float, Field(ge=0, le=1)] = 1.0
    reason: str = ""

    @model_validator(mode="after")
    def _kept_ascending(self) -> Pair:
        if self.kept is not None and any(a >= b for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError(f"kept channels of `{self.teacher}` must be ascending and without repeats")
        return self


class ModelStamp(_Frozen):
    """Which model a plan was made for: its class, and the fingerprint of its structure."""

    name: str
    fingerprint: str


class AlignmentPlan(_Frozen):
    """Pairs of layers, shallow to deep.

    Attributes:
        schema_version: of this file format.
        teacher: the model the plan was made for.
        student: the model the plan was made for.
        pairs: the pairs to warm up, shallow to deep.
        embedding: the penultimate vectors, for relational losses; None if one of the models has none.
        unmatched: stages without a partner, and why.
    """

    schema_version: Literal[1] = 1
    teacher: ModelStamp
    student: ModelStamp
    pairs: tuple[Pair, ...]
    embedding: Pair | None = None
    unmatched: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, at once or not at all.

        Raises:
            ConfigError: the place cannot be written.
        """
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, target)
        except OSError as error:
            raise ConfigError(
                f"The plan cannot be written to {target}: {error.strerror}.", where=str(target), hint="Give another path with -o."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AlignmentPlan:
        """Read a plan.

        Raises:
            ConfigError: no such file, not JSON, or not a plan; names the field at fault.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            return cls.model_validate(json.loads(text))
        except OSError as error:
            raise ConfigError(f"The plan {path} cannot be read: {error.strerror}.", where=str(path), hint="`indistill-fx align … -o plan.json` makes one.") from error
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} is not JSON: {error}.", where=str(path), hint="Give a plan written by `indistill-fx align … -o plan.json`.") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the whole file"
            raise ConfigError(
                f"{path} is not an alignment plan: {place}: {first['msg']}.", where=place, got=first.get("input"), hint="Mend that field or make the plan anew."
            ) from error

    def check(self, teacher: TracedModel, student: TracedModel) -> None:
        """Make sure that the plan fits the two models.

        Raises:
            ConfigError: a layer is missing or has another shape, or pairs cross; says which layer changed how.
        """
        for pair in (*self.pairs, *([self.embedding] if self.embedding else [])):
            _check_side(pair.teacher, pair.teacher_shape, teacher)
            _check_side(pair.student, pair.student_shape, student)
            if pair.kept is not None and pair.kept and pair.kept[-1] >= teacher.facts_of(pair.teacher).channels:
                raise ConfigError(
                    f"The plan keeps channel {pair.kept[-1]} of `{pair.teacher}`, which has {teacher.facts_of(pair.teacher).channels} channels.",
                    where=pair.teacher,
                    hint="Make the plan anew with `indistill-fx align`.",
                )
        _check_order(self.pairs, teacher, student)


def _check_side(tap: str, shape: Shape, model: TracedModel) -> None:
    try:
        facts = model.facts_of(tap)
    except ConfigError as error:
        raise ConfigError(f"The plan does not fit: {error.message}", where=tap, hint=error.hint) from None
    sizes = [n for axis, n in enumerate(facts.shape) if axis != facts.batch_axis]
    planned = [n for axis, n in enumerate(shape) if axis != facts.batch_axis]
    if sizes != planned:
        raise ConfigError(
            f"The plan does not fit the {model.role}: `{tap}` is {'x'.join(map(str, sizes))} there and {'x'.join(map(str, planned))} in the plan.",
            where=tap,
            got=sizes,
            expected=planned,
            hint="Use the model and --input it was made for, or make it anew with `indistill-fx align`.",
        )


def _check_order(pairs: tuple[Pair, ...], teacher: TracedModel, student: TracedModel) -> None:
    orders = [{node.name: k for k, node in enumerate(model.graph_module.graph.nodes)} for model in (teacher, student)]
    for first, second in zip(pairs, pairs[1:], strict=False):
        places = [
            [order[model.node(getattr(pair, role)).name] for pair in (first, second)]
            for order, model, role in zip(orders, (teacher, student), ("teacher", "student"), strict=True)
        ]
        if any(a >= b for a, b in places):
            raise ConfigError(
                f"The pairs `{first.teacher}` ↔ `{first.student}` and `{second.teacher}` ↔ `{second.student}` cross or repeat a layer.",
                where=second.teacher,
                hint="Order the pairs from the input to the output on both sides.",
            )
