"""The score of a pair of layers: how well a teacher's and a student's block output fit together.

score = 0.4 resolution + 0.3 depth + 0.3 order, each between 0 and 1:

  resolution  half for every octave that the two differ; counted from the input or from the last stage, whichever fits better, so that
              a stem with one stride more does not matter.
  depth       1 less the difference of the shares of MACs spent so far.
  order       1 less the difference of the relative positions among the stages.

Where similarity has been measured on data, it counts as much as the other three together. Kinds that cannot be compared (a map of an
image and tokens of a text) have no score.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from indistill_fx.traced import Kind, NodeFacts

WEIGHTS: dict[str, float] = {"resolution": 0.4, "depth": 0.3, "order": 0.3}
MEASURED = 0.5
"""Weight of the similarity measured on data, where there is one."""

LEGEND: dict[str, str] = {
    "resolution": "same number of halvings from the input",
    "pyramid": "same number of halvings from the last stage",
    "depth": "shares of MACs spent so far within 0.1",
    "last": "the last stage of both",
    "block": "evenly spaced blocks within paired stages",
    "output": "outputs of both pyramids",
    "fixed": "asked for",
    "data": "similar on the data given",
}
"""What the words in `Pair.reason` say."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer that could be paired.

    Attributes:
        node: its name in the graph.
        facts: what is known of it.
        octaves: halvings since the input.
        from_last: halvings until the last stage.
        depth: share of MACs spent so far.
        order: relative position among the stages, 1 for the last.
        weight: how much of a stage it is, 0 to 1.
        spatial: axes of space of the model's input.
    """

    node: str
    facts: NodeFacts
    octaves: float
    from_last: float
    depth: float
    order: float
    weight: float
    spatial: int


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a pair, each from 0 to 1.

    Attributes:
        resolution: see the module's head.
        depth: likewise.
        order: likewise.
        similarity: measured on data; None if it was not.
    """

    resolution: float
    depth: float
    order: float
    similarity: float | None = None

    @property
    def score(self) -> float:
        """All evidence in one number, 0 to 1."""
        structural = sum(WEIGHTS[f.name] * getattr(self, f.name) for f in fields(self) if f.name in WEIGHTS)
        return structural if self.similarity is None else (1 - MEASURED) * structural + MEASURED * self.similarity


def weigh(teacher: Place, student: Place, *, similarity: float | None = None) -> Evidence | None:
    """The evidence for a pair; None if the two cannot be compared.

    Args:
        teacher: a layer of the teacher.
        student: a layer of the student.
        similarity: measured on data.
    """
    if not comparable(teacher.facts.kind, student.facts.kind, teacher.spatial, student.spatial):
        return None
    octaves = min(abs(teacher.octaves - student.octaves), abs(teacher.from_last - student.from_last))
    return Evidence(
        resolution=0.5**octaves,
        depth=1 - abs(teacher.depth - student.depth),
        order=1 - abs(teacher.order - student.order),
        similarity=similarity,
    )


def comparable(teacher: Kind, student: Kind, teacher_spatial: int, student_spatial: int) -> bool:
    """Whether two kinds of tensor, from inputs of so many axes of space, can be brought to one form."""
    if "vector" in (teacher, student) or "other" in (teacher, student):
        return teacher == student == "vector"
    return teacher_spatial == student_spatial
