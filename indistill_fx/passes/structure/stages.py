"""The main path of a network: the tensors that hold all the information, and the stages they fall into.

Rules, in order:
  1. The main path are the nodes that every path from the input to the main output passes through them.
  2. A stage is a run of blocks at one resolution; its exit is its last block. Where both width and dilation change, a stage begins too:
     in a dilated network that is where the stride has been taken out.
  3. In a network of merges, plain convolutions before the first merge of a run lead to it (a stem, a downsampling). The first run, if
     without merges, is the stem, and so are cheap ones of plain convolutions after it (below half of an even share).
  4. In a plain chain whose last run has twice (three times, …) the units of the run before, that run is two (three, …) stages: the
     pooling between them was left out because the input is small.
  5. The outputs of a feature pyramid are stages of their own, except those that only repeat another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.structure.blocks import Block, find_blocks
from indistill_fx.passes.structure.dominators import SAME_LEVEL, Flow, information_flow
from indistill_fx.traced import NodeFacts, TracedModel


@dataclass(frozen=True, slots=True)
class PathNode:
    """One tensor of the main path.

    Attributes:
        node: its name in the graph.
        tap: its name for people.
        op: the operation that makes it.
        facts: what is known of it.
        depth: share of the MACs spent before it and in it, 0 to 1.
        level: how often the input's sides were halved on the way; None where there are no positions.
        stage: index of the stage it belongs to, or leads to; None after the last.
        is_block_exit: a block's output.
        is_stage_exit: a stage's output.
    """

    node: str
    tap: str
    op: str
    facts: NodeFacts
    depth: float
    level: float | None
    stage: int | None
    is_block_exit: bool
    is_stage_exit: bool


@dataclass(frozen=True, slots=True)
class NetworkStage:
    """A run of blocks at one resolution, or an output of a pyramid.

    Attributes:
        index: from the input.
        blocks: in order; the last one's output is the stage's exit.
        cost: share of the network's MACs spent in it.
        is_output: an output of a feature pyramid.
    """

    index: int
    blocks: tuple[Block, ...]
    cost: float
    is_output: bool = False

    @property
    def exit(self) -> Block:
        """The last block."""
        return self.blocks[-1]


def main_path(traced: TracedModel) -> tuple[PathNode, ...]:
    """The main path of a model, from the input to the output.

    Args:
        traced: the model.

    Returns:
        The nodes of the main path whose value is one tensor.
    """
    flow = information_flow(traced)
    blocks = find_blocks(traced, flow)
    found = find_stages(traced, flow, blocks)
    operations = {node.name: op_name(node) for node in traced.graph_module.graph.nodes if node.name in flow.inputs}
    exits, outputs = {stage.exit.output: stage.index for stage in found}, {block.output for block in blocks}
    stage, found_nodes = None, []
    for name in reversed(flow.main_path):
        stage = exits.get(name, stage)
        if name in traced.facts:
            found_nodes.append(
                PathNode(
                    node=name,
                    tap=traced.tap_name(name),
                    op=operations[name],
                    facts=traced.facts[name],
                    depth=flow.depth[name],
                    level=flow.levels.get(name),
                    stage=stage,
                    is_block_exit=name in outputs,
                    is_stage_exit=name in exits,
                )
            )
    return tuple(reversed(found_nodes))


def stages(traced: TracedModel) -> tuple[NetworkStage, ...]:
    """The stages of a model, from the input to the output.

    Args:
        traced: the model.

    Returns:
        The stages.
    """
    flow = information_flow(traced)
    return find_stages(traced, flow, find_blocks(traced, flow))


def find_stages(traced: TracedModel, flow: Flow, blocks: Sequence[Block]) -> tuple[NetworkStage, ...]:
    """Group blocks into stages.

    Args:
        traced: the model.
        flow: its information flow.
        blocks: its blocks, in order.

    Returns:
        The stages, in the order in which the graph computes their exits.
    """
    runs = _runs(traced, flow, blocks)
    if any(block.form == "merge" for block in blocks):
        runs = [_without_lead(run) for run in _without_stem(runs)]
        if len(flow.ends) > 1:
            runs = _before_outputs(runs, flow)
            runs = [*runs[:-1], *filter(None, [_without_tail(runs[-1])])]
    elif len(runs) > 1 and len(runs[-1]) >= 2 * len(runs[-2]):
        runs = [*runs[:-1], *_cut(runs[-1], len(runs[-1]) // len(runs[-2]))]
    found = [(tuple(run), False) for run in runs]
    found += [((block,), True) for block in _outputs(traced, flow, {block.output for run in runs for block in run})]
    order = {name: k for k, name in enumerate(flow.inputs)}
    found.sort(key=lambda entry: order[entry[0][-1].output])
    depths = [0.0, *(stage_blocks[-1].depth for stage_blocks, _ in found)]
    return tuple(
        NetworkStage(k, stage_blocks, depths[k + 1] - depths[k], is_output)
        for k, (stage_blocks, is_output) in enumerate(found)
    )


def _runs(traced: TracedModel, flow: Flow, blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks between two changes of resolution (or of width, where convolutions are dilated)."""
    sized = [name for name in flow.main_path if name in flow.levels]
    number, numbers = 0, dict.fromkeys(sized[:1], 0)
    for before, name in pairwise(sized):
        number += abs(flow.levels[name] - flow.levels[before]) > SAME_LEVEL
        numbers[name] = number
    runs = [list(run) for _, run in groupby(blocks, key=lambda block: numbers.get(block.start, 0))]
    return [part for run in runs for part in _by_dilation(traced, run)]


def _by_dilation(traced: TracedModel, run: Sequence[Block]) -> list[list[Block]]:
    """The run, split where both width and dilation change; plain convolutions that lead to a merge stay with it."""
    merges = any(block.form == "merge" for block in run)
    parts: list[list[Block]] = []
    for _, same in groupby(run, key=lambda block: traced.facts[block.output].channels):
        part = list(same)
        leads = merges and bool(parts) and all(block.form == "unit" for block in parts[-1])
        if parts and (leads or _dilation(parts[-1]) == _dilation(part)):
            parts[-1] += part
        else:
            parts.append(part)
    return parts


def _dilation(run: Sequence[Block]) -> int:
    return max(block.dilation for block in run)


def _without_stem(runs: Sequence[list[Block]]) -> Sequence[list[Block]]:
    """The runs without the stem: the first run, and cheap ones after it, as long as they contain no merge."""
    first = next(k for k, run in enumerate(runs) if any(block.form == "merge" for block in run))
    depths = [0.0, *(run[-1].depth for run in runs)]
    plain = [k for k in range(1, first) if all(block.form == "unit" for block in runs[k])]
    stem = {0, *(k for k in plain if depths[k + 1] - depths[k] < 0.5 / len(runs))} if first else set()
    return [run for k, run in enumerate(runs) if k not in stem]


def _without_lead(run: Sequence[Block]) -> list[Block]:
    """The run without the plain convolutions that lead to its first merge."""
    first = next((k for k, block in enumerate(run) if block.form == "merge"), 0)
    return [block for block in run[:first] if block.form == "separable"] + list(run[first:])


def _before_outputs(runs: Sequence[list[Block]], flow: Flow) -> list[list[Block]]:
    """The runs without the plain convolutions after the main path's first output: further outputs of a pyramid, made from that one."""
    place = {name: k for k, name in enumerate(flow.main_path)}
    first = min((place[end] for end in flow.ends if end in place), default=len(place))
    merges = [place[block.output] for run in runs for block in run if block.form != "unit"]
    last = max(first, *merges)
    kept = [[block for block in run if place[block.output] <= last] for run in runs]
    return [run for run in kept if run]


def _without_tail(run: Sequence[Block]) -> list[Block]:
    """The run without the plain convolutions that lead from its last merge to an output."""
    last = max((k for k, block in enumerate(run) if block.form != "unit"), default=-1)
    return list(run[: last + 1])


def _cut(run: Sequence[Block], count: int) -> list[list[Block]]:
    ends = [round(len(run) * k / count) for k in range(count + 1)]
    return [list(run[a:b]) for a, b in pairwise(ends)]


def _outputs(traced: TracedModel, flow: Flow, known: set[str]) -> list[Block]:
    """The outputs of a pyramid that are not computed from another one, or from a stage's exit, without work."""
    found = []
    for end in flow.ends if len(flow.ends) > 1 else ():
        origin, alone = end, True
        while alone and not traced.facts[origin].macs and len(flow.inputs[origin]) == 1:
            alone = origin not in known and (origin == end or origin not in flow.ends)
            origin = flow.inputs[origin][0]
        if alone and origin not in known and (origin == end or origin not in flow.ends):
            found.append(Block(end, end, end, end, "unit", 1, flow.levels.get(end, 0.0), flow.depth[end]))
    return found
