"""The score of a pair of layers: how well an output of the teacher and one of the student fit together.

score = 0.4 resolution + 0.3 depth + 0.3 order, each between 0 and 1:

  resolution  halved for every level that the two differ. Levels are counted from the input; or, if that is better and at four
              fifths of the worth, from the last stage, so that a stem with one stride more does not matter.
  depth       1 less the difference of the shares of MACs spent so far.
  order       1 less the difference of the relative positions among the stages.

Similarity measured on data, where there is any, counts as much as the three together. Layers that cannot be brought to one form (a map
of an image and tokens of a text, a map and a vector, an output of a pyramid and a stage of a main path) have no score. Outputs of
pyramids go together by their stride alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from indistill_fx.passes.structure.dominators import SAME_LEVEL
from indistill_fx.traced import NodeFacts

RESOLUTION, DEPTH, ORDER = 0.4, 0.3, 0.3
FROM_LAST = 0.8
"""What a resolution counted from the last stage is worth, beside one counted from the input."""

MEASURED = 0.5
"""Weight of the similarity measured on data, where there is one."""

LEGEND: dict[str, str] = {
    "resolution": "as many halvings of the sides since the input on both sides",
    "pyramid": "as many halvings of the sides before the last stage on both sides",
    "depth": "shares of MACs spent so far differ by at most 0.1",
    "last": "the last stage of both",
    "block": "evenly spaced among the blocks of two paired stages",
    "output": "outputs of both feature pyramids",
    "drop-in": "made to deliver what the next stage of the teacher reads: one shape, from different layers",
    "fixed": "asked for",
    "data": "linear CKA on the data given is at least 0.5",
    "penultimate": "the vectors that the last layers read",
}
"""What the words in `Pair.reason` say."""


@dataclass(frozen=True, slots=True)
class Place:
    """A layer that could be paired.

    Attributes:
        node: its name in the graph.
        facts: what is known of it.
        level: halvings of the sides since the input.
        from_last: halvings of the sides before the last stage.
        depth: share of MACs spent so far.
        order: relative position among the stages; 1 is the last.
        weight: how much of a stage it is, 0 to 1.
        source: form of the model's input: axes of space, and whether it holds numbers (not ids); None if unknown.
        is_output: an output of a feature pyramid.
    """

    node: str
    facts: NodeFacts
    level: float
    from_last: float
    depth: float
    order: float
    weight: float
    source: tuple[int, bool] | None
    is_output: bool

    @property
    def size(self) -> str:
        """The shape of one sample, as people write it."""
        return "x".join(str(n) for axis, n in enumerate(self.facts.shape) if axis != self.facts.batch_axis)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What speaks for a pair, each from 0 to 1; see the head of the module.

    Attributes:
        resolution: nearness of the resolutions.
        depth: nearness of the shares of MACs.
        order: nearness of the positions.
        similarity: measured on data; None if it was not.
    """

    resolution: float
    depth: float
    order: float
    similarity: float | None = None

    @property
    def score(self) -> float:
        """The evidence combined into one number from 0 to 1."""
        structure = RESOLUTION * self.resolution + DEPTH * self.depth + ORDER * self.order
        return structure if self.similarity is None else (1 - MEASURED) * structure + MEASURED * self.similarity


@dataclass(frozen=True, slots=True)
class Chosen:
    """Two places that go together, the evidence for it, and the words of the legend that hold."""

    teacher: Place
    student: Place
    evidence: Evidence
    words: tuple[str, ...]


def weigh(teacher: Place, student: Place, *, similarity: float | None = None) -> Evidence | None:
    """The evidence for a pair.

    Args:
        teacher: a layer of the teacher.
        student: a layer of the student.
        similarity: of the two, measured on data.

    Returns:
        The evidence; None if the two cannot be brought to one form.
    """
    if not comparable(teacher, student):
        return None
    from_input, from_last = abs(teacher.level - student.level), abs(teacher.from_last - student.from_last)
    if teacher.is_output and from_input > SAME_LEVEL:
        return None
    return Evidence(
        resolution=0.5**from_input if teacher.is_output else max(0.5**from_input, FROM_LAST * 0.5**from_last),
        depth=1 - abs(teacher.depth - student.depth),
        order=1 - abs(teacher.order - student.order),
        similarity=similarity,
    )


def comparable(teacher: Place, student: Place) -> bool:
    """Whether two layers can be brought to one form."""
    kinds = {teacher.facts.kind, student.facts.kind}
    if "other" in kinds or (len(kinds) > 1 and "vector" in kinds) or teacher.is_output != student.is_output:
        return False
    return kinds == {"vector"} or teacher.source is None or teacher.source == student.source


def words(teacher: Place, student: Place, evidence: Evidence) -> list[str]:
    """The words of the legend that hold for a pair."""
    holding = {
        "resolution": abs(teacher.level - student.level) < 0.5,
        "pyramid": abs(teacher.from_last - student.from_last) < 0.5 <= abs(teacher.level - student.level),
        "depth": abs(teacher.depth - student.depth) <= 0.1,
        "last": teacher.order == student.order == 1,
        "output": teacher.is_output and student.is_output,
        "data": evidence.similarity is not None and evidence.similarity >= 0.5,
    }
    return [reason for reason, holds in holding.items() if holds]
