"""Tensors made to stand in for one another: a student whose first layers were replaced delivers what the layers after them read.

Rules, in order:
  1. What a stage hands on is the tensor that the first block of the next stage reads, after the transition between the two.
  2. Where two paired stages have exits of different shape, but hand on one and the same shape, the student was built to deliver it:
     the pair moves to what they hand on.
  3. Likewise where the layers before the first stages do different work, but hand on one shape, and the first stages go together.
"""

from __future__ import annotations

from dataclasses import replace

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.pairing.candidates import Candidates
from indistill_fx.passes.pairing.score import Chosen, Place, weigh, words
from indistill_fx.passes.structure.blocks import IDLE

_Sides = tuple[Candidates, Candidates]


def moved(sides: _Sides, match: Chosen) -> Chosen:
    """The pair at what its stages hand on, where that fits better; else as it is."""
    places = match.teacher, match.student
    if _shape(places[0]) == _shape(places[1]) or "fixed" in match.words or sides[0].taps != "block":
        return match
    handed = []
    for side, place in zip(sides, places, strict=True):
        number = next((k for k, stage in enumerate(side.stages) if side.tensor(stage.exit) == place.node), None)
        node = None if number is None else _handed_on(side, number)
        if node is None or node == place.node:
            return match
        level = side.flow.levels.get(node, place.level)
        handed.append(
            replace(
                place,
                node=node,
                facts=side.traced.facts[node],
                level=level,
                from_last=place.from_last + place.level - level,
                depth=side.flow.depth[node],
            )
        )
    return _chosen(handed[0], handed[1]) or match


def stems(sides: _Sides, first: Chosen) -> Chosen | None:
    """What different first layers hand on to the first stages, if these are a pair and the shape is one; None otherwise."""
    if sides[0].taps != "block" or any(not side.stages or side.stages[0].is_output for side in sides):
        return None
    inside = [
        place.node in map(side.tensor, side.stages[0].blocks)
        for side, place in zip(sides, (first.teacher, first.student), strict=True)
    ]
    nodes = [_handed_on(side, -1) for side in sides]
    if not all(inside) or None in nodes:
        return None
    work = [_work(side, node) for side, node in zip(sides, nodes, strict=True) if node is not None]
    if work[0] == work[1] or not all(work):
        return None
    places = [replace(side.anywhere(node), order=0.0) for side, node in zip(sides, nodes, strict=True) if node]
    return _chosen(places[0], places[1])


def _chosen(teacher: Place, student: Place) -> Chosen | None:
    evidence = weigh(teacher, student)
    if evidence is None or _shape(teacher) != _shape(student):
        return None
    return Chosen(teacher, student, evidence, ("drop-in", *words(teacher, student, evidence)))


def _shape(place: Place) -> tuple[object, ...]:
    return place.facts.kind, tuple(n for axis, n in enumerate(place.facts.shape) if axis != place.facts.batch_axis)


def _handed_on(side: Candidates, number: int) -> str | None:
    """What the stage after stage `number` reads (-1: the first stage); None if that does not begin with a merge."""
    if number + 1 >= len(side.stages):
        return None
    block = side.stages[number + 1].blocks[0]
    nodes = {node.name: node for node in side.traced.graph_module.graph.nodes}
    if block.form != "merge" or block.start not in side.flow.main_path:
        return None
    before = side.flow.main_path[: side.flow.main_path.index(block.start)]
    node = next((name for name in reversed(before) if op_name(nodes[name]) not in IDLE), before[0])
    return node if node in side.traced.facts and node != side.flow.main_path[0] else None


def _work(side: Candidates, node: str) -> list[int]:
    """The MACs of the layers up to a node, one by one."""
    found = []
    for name in side.flow.inputs:
        if name in side.traced.facts and side.traced.facts[name].macs:
            found.append(side.traced.facts[name].macs)
        if name == node:
            break
    return found
