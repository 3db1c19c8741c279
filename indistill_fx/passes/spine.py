"""The spine of a network: the tensors that hold all the information, and the stages they fall into.

Rules, in order:
  1. The spine are the trunk's nodes: every path from the input to the main output passes through them.
  2. A stage is a run of blocks at one resolution; its exit is the output of its last block. In a dilated network, where a growing
     width takes the place of a stride, a change of width opens a stage too.
  3. What comes before the first block of a network of joins is its stem, and no stage.
  4. In a plain chain whose last run has twice (three times, …) the units of the run before it, that run is two (three, …) stages:
     the pooling between them was left out because the input is small.
  5. A feature pyramid's outputs are stages of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from indistill_fx.ops import op_name
from indistill_fx.passes.blocks import _SAME_LEVEL, Block, find_blocks
from indistill_fx.passes.flow import Flow, information_flow
from indistill_fx.traced import NodeFacts, TracedModel

_WIDER = 1.5
"""Ratio of widths that opens a stage in a dilated network."""


@dataclass(frozen=True, slots=True)
class SpineNode:
    """One tensor of the spine.

    Attributes:
        node: its name in the graph.
        tap: its name for people.
        op: the operation that makes it.
        facts: what is known of it.
        depth: share of the MACs spent before it and in it, 0 to 1.
        octaves: how often the input's sides were halved on the way; None for vectors.
        stage: index of the stage it belongs to; None before the first and behind the last.
        is_block_exit: a block's output.
        is_stage_exit: a stage's output.
    """

    node: str
    tap: str
    op: str
    facts: NodeFacts
    depth: float
    octaves: float | None
    stage: int | None
    is_block_exit: bool
    is_stage_exit: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """A run of blocks at one resolution.

    Attributes:
        index: from the input.
        blocks: in order; the last one's output is the stage's exit.
        cost: share of the network's MACs spent in it.
    """

    index: int
    blocks: tuple[Block, ...]
    cost: float

    @property
    def exit(self) -> Block:
        """The last block."""
        return self.blocks[-1]


def find_stages(traced: TracedModel, flow: Flow, blocks: Sequence[Block]) -> tuple[Stage, ...]:
    """Group blocks into stages.

    Args:
        traced: the model.
        flow: its information flow.
        blocks: its blocks, in order.
    """
    runs = _runs(traced, flow, blocks)
    if any(block.joins for block in blocks):
        first = next(k for k, run in enumerate(runs) if any(block.joins for block in run))
        runs = runs[min(first, 1) :]
    elif len(runs) > 1 and len(runs[-1]) >= 2 * len(runs[-2]):
        runs = [*runs[:-1], *_cut(runs[-1], len(runs[-1]) // len(runs[-2]))]
    starts = [0.0, *(run[-1].depth for run in runs)]
    stages = [Stage(k, tuple(run), run[-1].depth - start) for k, (run, start) in enumerate(zip(runs, starts, strict=False))]
    return tuple(stages)


def _runs(traced: TracedModel, flow: Flow, blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks between two changes of resolution (or of width, where convolutions are dilated)."""
    levels: dict[str, int] = {}
    level, before = 0, None
    for name in flow.trunk:
        now = flow.octaves.get(name)
        if now is None:
            continue
        if before is not None and abs(now - before) > _SAME_LEVEL:
            level += 1
        levels[name], before = level, now
    runs = [list(run) for _, run in groupby(blocks, key=lambda block: levels[block.sum])]
    return [part for run in runs for part in (_by_width(traced, run) if any(b.dilated for b in run) else [run])]


def _by_width(traced: TracedModel, run: list[Block]) -> list[list[Block]]:
    parts: list[list[Block]] = []
    for block in run:
        width = traced.facts[block.output].channels
        before = traced.facts[parts[-1][-1].output].channels if parts else 0
        if parts and max(width, before) < _WIDER * min(width, before):
            parts[-1].append(block)
        else:
            parts.append([block])
    return parts


def _cut(run: list[Block], count: int) -> list[list[Block]]:
    ends = [round(len(run) * (k + 1) / count) for k in range(count)]
    return [run[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def stages(traced: TracedModel) -> tuple[Stage, ...]:
    """The stages of a model, from the input to the output.

    Args:
        traced: the model.
    """
    flow = information_flow(traced)
    return find_stages(traced, flow, find_blocks(traced, flow))


def spine(traced: TracedModel) -> tuple[SpineNode, ...]:
    """The spine of a model, from the input to the output.

    Args:
        traced: the model.
    """
    flow = information_flow(traced)
    blocks = find_blocks(traced, flow)
    found = find_stages(traced, flow, blocks)
    place = {name: k for k, name in enumerate(flow.trunk)}
    ends = [place[stage.exit.output] for stage in found if stage.exit.output in place]
    exits, outputs = {stage.exit.output for stage in found}, {block.output for block in blocks}
    nodes = []
    for k, name in enumerate(flow.trunk):
        if name not in traced.facts:
            continue
        stage = next((n for n, end in enumerate(ends) if k <= end), None)
        nodes.append(
            SpineNode(
                node=name,
                tap=traced.tap_name(name),
                op=op_name(next(n for n in traced.graph_module.graph.nodes if n.name == name)),
                facts=traced.facts[name],
                depth=flow.depth[name],
                octaves=flow.octaves.get(name),
                stage=stage,
                is_block_exit=name in outputs,
                is_stage_exit=name in exits,
            )
        )
    return tuple(nodes)
