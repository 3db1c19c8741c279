"""One model's candidates for pairing: its stages and blocks as places, and its penultimate vector."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.pairing.score import Place
from indistill_fx.passes.structure.blocks import IDLE, Block, find_blocks
from indistill_fx.passes.structure.dominators import Flow, information_flow
from indistill_fx.passes.structure.stages import NetworkStage, find_stages
from indistill_fx.plan import Adapter, Pair
from indistill_fx.traced import TracedModel

Taps = Literal["block", "pre-activation", "last-conv"]
TENSORS: dict[str, str] = {"block": "output", "pre-activation": "pre_activation", "last-conv": "last_conv"}
"""Kind of tap -> which tensor of a block it is."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """One model with everything that was found in it.

    Attributes:
        traced: the model.
        flow: its information flow.
        stages: its stages.
        taps: which tensor of a block is tapped.
        order: per node of the graph, where it stands.
    """

    traced: TracedModel
    flow: Flow
    stages: tuple[NetworkStage, ...]
    taps: Taps
    order: dict[str, int]

    @property
    def is_even(self) -> bool:
        """Whether the whole network is one stage, so that its blocks differ in depth alone."""
        return sum(not stage.is_output for stage in self.stages) == 1

    def exits(self) -> list[Place]:
        """The stages' exits."""
        return [self.place(stage, len(stage.blocks) - 1) for stage in self.stages]

    def blocks(self, stage: NetworkStage) -> list[Place]:
        """All blocks of a stage."""
        return [self.place(stage, k) for k in range(len(stage.blocks))]

    def place(self, stage: NetworkStage, number: int) -> Place:
        """One block of a stage as a candidate."""
        alike = [other for other in self.stages if other.is_output == stage.is_output]
        block = stage.blocks[number]
        return Place(
            node=self.tensor(block),
            facts=self.traced.facts[self.tensor(block)],
            level=block.level,
            from_last=alike[-1].exit.level - block.level,
            depth=block.depth,
            order=(alike.index(stage) + (number + 1) / len(stage.blocks)) / len(alike),
            weight=1.0 if stage.is_output else min(1.0, 0.1 + 2 * stage.cost * len(alike)),
            source=self.source,
            is_output=stage.is_output,
        )

    def anywhere(self, node: str) -> Place:
        """Any tensor as a candidate, for pairs that the user requests."""
        last = next((stage.exit.level for stage in reversed(self.stages) if not stage.is_output), 0.0)
        level, depth = self.flow.levels.get(node, 0.0), self.flow.depth.get(node, 1.0)
        return Place(node, self.traced.facts[node], level, last - level, depth, depth, 1.0, self.source, False)

    @property
    def source(self) -> tuple[int, bool] | None:
        """Form of the input: axes of space, and whether it holds numbers; None of saved outputs, which go by the samples' numbers."""
        if self.traced.inputs.by_number:
            return None
        facts = self.traced.facts[self.flow.main_path[0]]
        return len(facts.space), facts.dtype.is_floating_point

    def tensor(self, block: Block) -> str:
        """The tensor of a block that is tapped."""
        return str(getattr(block, TENSORS[self.taps]))

    def penultimate(self) -> str | None:
        """The vector that the last layer with weights reads; None if it reads none."""
        operations = {
            node.name: op_name(node) for node in self.traced.graph_module.graph.nodes if node.name in self.flow.inputs
        }
        facts, path = self.traced.facts, self.flow.main_path
        last = next((k for k in range(len(path) - 1, 1, -1) if path[k] in facts and facts[path[k]].macs), 1) - 1
        while last > 1 and operations[path[last]] in IDLE:
            last -= 1
        return path[last] if last and path[last] in facts and facts[path[last]].kind == "vector" else None

    def names(self, nodes: Sequence[str]) -> list[str]:
        """Tap names of several nodes; where a tensor has several, the one nested as deep as most of the others."""
        preferred = [self.traced.tap_name(node) for node in nodes]
        usual = Counter(name.count(".") for name in preferred).most_common(1)
        return [
            next(
                (name for name in self.traced.aliases[node] if ":" not in name and name.count(".") == usual[0][0]),
                first,
            )
            for node, first in zip(nodes, preferred, strict=True)
        ]


def look(traced: TracedModel, taps: Taps) -> Candidates:
    """Find a model's candidates.

    Args:
        traced: the model.
        taps: which tensor of a block is tapped.

    Returns:
        The candidates.
    """
    flow = information_flow(traced)
    order = {node.name: k for k, node in enumerate(traced.graph_module.graph.nodes)}
    return Candidates(traced, flow, find_stages(traced, flow, find_blocks(traced, flow)), taps, order)


def make_pair(
    sides: tuple[Candidates, Candidates],
    teacher: str,
    student: str,
    nodes: tuple[str, str],
    score: float,
    reason: str,
) -> Pair:
    """A pair as a plan holds it.

    Args:
        sides: teacher and student.
        teacher: name of the teacher's tap.
        student: name of the student's tap.
        nodes: the nodes they name.
        score: how well they fit.
        reason: words of the legend.

    Returns:
        The pair, all channels kept.
    """
    facts = sides[0].traced.facts[nodes[0]], sides[1].traced.facts[nodes[1]]
    adapter: Adapter = "none"
    if facts[0].kind != facts[1].kind:
        adapter = "tokens_to_map"
    elif facts[0].space != facts[1].space:
        adapter = "pool"
    return Pair(
        teacher=teacher,
        student=student,
        teacher_shape=facts[0].shape,
        student_shape=facts[1].shape,
        adapter=adapter,
        score=round(min(1.0, max(0.0, score)), 4),
        reason=reason,
    )
