"""What the picture of an alignment shows, as plain values: two columns of layers, and the pairs between them.

A row is an output of a block, of a stage or of a pair, with all operations since the row before it. Rows of one stage at one
resolution are a band. Blocks that are alike and have no partner are folded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.pairing.match import MatchReport
from indistill_fx.passes.pairing.score import LEGEND
from indistill_fx.passes.structure.stages import PathNode, main_path
from indistill_fx.plan import AlignmentPlan, Pair, Shape
from indistill_fx.traced import NodeFacts, Role, TracedModel

FOLDED = 4
"""So many blocks in a row, alike and without partners, are drawn as one."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One node of the graph.

    Attributes:
        name: for people.
        op: what it computes.
        shape: of one sample.
        macs: multiply-accumulates of one sample.
        parameters: number it reads.
        reads: places of its inputs in the list of operations.
    """

    name: str
    op: str
    shape: str
    macs: int
    parameters: int
    reads: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One layer of a column.

    Attributes:
        key: its name on the page.
        tap: its name for people.
        op: the operation that makes it; empty if only the plan is known.
        shape: of one sample.
        channels: size of the channel axis; 0 where there is none.
        kept: the channels that are compared; None: all.
        pair: key of its pair.
        is_exit: a stage's output.
        depth: share of the MACs spent up to it.
        first: place of its first operation.
        last: place after its last operation.
        macs: of its operations.
        parameters: of its operations.
    """

    key: str
    tap: str
    op: str
    shape: str
    channels: int
    kept: tuple[int, ...] | None = None
    pair: str | None = None
    is_exit: bool = False
    depth: float | None = None
    first: int = 0
    last: int = 0
    macs: int = 0
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class Band:
    """The rows of a stage at one resolution.

    Attributes:
        title: `stage 2`, `to stage 2`, `head`.
        size: `28x28`, `197 tokens`; empty where there are no positions.
        share: of the MACs.
        runs: rows; those of one run are folded if it has more than one.
    """

    title: str
    size: str
    share: float | None
    runs: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True, slots=True)
class Column:
    """One model.

    Attributes:
        role: teacher or student.
        name: its class.
        fingerprint: of its structure.
        bands: from the input to the output.
        operations: of the whole graph.
        macs: of one sample; None if only the plan is known.
        parameters: likewise.
        facts: further lines about it.
    """

    role: Role
    name: str
    fingerprint: str
    bands: tuple[Band, ...]
    operations: tuple[Operation, ...] = ()
    macs: int | None = None
    parameters: int | None = None
    facts: tuple[str, ...] = ()

    @property
    def rows(self) -> Iterator[Row]:
        """All rows, from the input to the output."""
        return (row for band in self.bands for run in band.runs for row in run)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pair that was not chosen.

    Attributes:
        teacher: its layer, as in a plan.
        student: likewise.
        score: from 0 to 1.
        why: why it lost.
    """

    teacher: str
    student: str
    score: float
    why: str


@dataclass(frozen=True, slots=True)
class Match:
    """One pair.

    Attributes:
        key: its name on the page.
        pair: as in the plan.
        channels: how many the teacher's layer has; None if unknown.
        reasons: words and what they say.
        evidence: names and values from 0 to 1.
        runners_up: candidates that lost, best first.
    """

    key: str
    pair: Pair
    channels: int | None
    reasons: tuple[tuple[str, str], ...]
    evidence: tuple[tuple[str, float], ...] = ()
    runners_up: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Alignment:
    """All that the picture shows."""

    teacher: Column
    student: Column
    matches: tuple[Match, ...]
    embedding: Match | None
    unmatched: tuple[str, ...]

    @property
    def drawn(self) -> tuple[Match, ...]:
        """The pairs, followed by the penultimate vectors."""
        return (*self.matches, *([self.embedding] if self.embedding else []))

    @property
    def widest(self) -> int:
        """The largest number of channels in any row."""
        return max((row.channels for column in (self.teacher, self.student) for row in column.rows), default=1) or 1


def see(
    plan: AlignmentPlan,
    teacher: TracedModel,
    student: TracedModel,
    report: MatchReport | None = None,
    *,
    names: tuple[str, str] | None = None,
) -> Alignment:
    """An alignment with all that is known of the two models.

    Args:
        plan: the pairs.
        teacher: traced.
        student: traced.
        report: the evidence for the pairs; None where they were read from a file.
        names: of teacher and student; default: their classes.

    Raises:
        ConfigError: the plan does not fit the models.
    """
    plan.check(teacher, student)
    matches = _matches(plan, report, {pair.teacher: _channels(teacher, pair.teacher) for pair in plan.pairs})
    return Alignment(
        _column(teacher, {match.pair.teacher: match for match in matches}, names and names[0]),
        _column(student, {match.pair.student: match for match in matches}, names and names[1]),
        tuple(match for match in matches if match.key != "embedding"),
        next((match for match in matches if match.key == "embedding"), None),
        plan.unmatched,
    )


def see_plan(plan: AlignmentPlan) -> Alignment:
    """What a plan alone shows: the paired layers."""
    matches = _matches(plan, None, {})
    teacher = [_planned(match, match.pair.teacher, match.pair.teacher_shape, "t") for match in matches]
    student = [_planned(match, match.pair.student, match.pair.student_shape, "s") for match in matches]
    return Alignment(
        Column("teacher", plan.teacher.name, plan.teacher.fingerprint, _bands(teacher)),
        Column("student", plan.student.name, plan.student.fingerprint, _bands(student)),
        tuple(match for match in matches if match.key != "embedding"),
        next((match for match in matches if match.key == "embedding"), None),
        plan.unmatched,
    )


def _planned(match: Match, tap: str, shape: Shape, side: str) -> tuple[str, Row]:
    """A row from the plan alone, and its resolution. Two sizes are (tokens, channels), others (channels, *space)."""
    sizes = shape[1:]
    channels = (sizes[0] if len(sizes) != 2 else sizes[1]) if sizes else 0
    space = "×".join(map(str, sizes[1:])) if len(sizes) != 2 else f"{sizes[0]} tokens"
    kept = match.pair.kept if side == "t" else None
    row = Row(side + match.key, tap, "", "×".join(map(str, sizes)), channels, kept, match.key)
    return (space if len(sizes) > 1 else ""), row


def _bands(rows: Sequence[tuple[str, Row]]) -> tuple[Band, ...]:
    return tuple(
        Band("", size, None, tuple((row,) for _, row in members))
        for size, members in groupby(rows, key=lambda entry: entry[0])
    )


def _matches(plan: AlignmentPlan, report: MatchReport | None, channels: Mapping[str, int]) -> list[Match]:
    explained = {(e.pair.teacher, e.pair.student): e for e in report.explained} if report else {}
    found = []
    pairs = [*enumerate(plan.pairs, 1), *([("embedding", plan.embedding)] if plan.embedding else [])]
    for key, pair in pairs:
        known = explained.get((pair.teacher, pair.student)) if key != "embedding" else None
        reasons = [reason for reason in pair.reason.split(", ") if reason]
        evidence: list[tuple[str, float]] = []
        if known is not None:
            measured = known.evidence.similarity
            evidence = [(name, getattr(known.evidence, name)) for name in ("resolution", "depth", "order")]
            evidence += [("similarity on data", measured)] if measured is not None else []
        found.append(
            Match(
                key=str(key),
                pair=pair,
                channels=channels.get(pair.teacher, pair.teacher_shape[1] if len(pair.teacher_shape) != 3 else None),
                reasons=tuple((reason, LEGEND.get(reason, "")) for reason in reasons),
                evidence=tuple(evidence),
                runners_up=tuple(
                    Candidate(other.pair.teacher, other.pair.student, other.evidence.score, other.why)
                    for other in (known.runners_up if known else ())
                ),
            )
        )
    return found


def _channels(traced: TracedModel, tap: str) -> int:
    facts = traced.facts_of(tap)
    return 0 if facts.channel_axis is None else facts.channels


def _size(facts: NodeFacts) -> str:
    return "×".join(str(n) for axis, n in enumerate(facts.shape) if axis != facts.batch_axis)


def _resolution(facts: NodeFacts) -> str:
    if facts.kind == "tokens":
        return f"{'×'.join(map(str, facts.space))} tokens"
    return "×".join(map(str, facts.space)) if facts.kind == "map" else ""


def _column(traced: TracedModel, partners: Mapping[str, Match], name: str | None) -> Column:
    nodes = [node for node in traced.graph_module.graph.nodes if node.op != "output"]
    place = {node.name: k for k, node in enumerate(nodes)}
    operations = tuple(
        Operation(
            name=traced.tap_name(node.name) if traced.aliases.get(node.name) else node.name,
            op=op_name(node),
            shape=_size(traced.facts[node.name]) if node.name in traced.facts else "",
            macs=traced.facts[node.name].macs if node.name in traced.facts else 0,
            parameters=traced.facts[node.name].parameters if node.name in traced.facts else 0,
            reads=tuple(place[source.name] for source in node.all_input_nodes),
        )
        for node in nodes
    )
    parameters = sum(parameter.numel() for parameter in traced.module.parameters())
    return Column(
        role=traced.role,
        name=name or type(traced.module).__name__,
        fingerprint=traced.fingerprint,
        bands=_stages(_rows(traced, operations, partners), traced.macs),
        operations=operations,
        macs=traced.macs,
        parameters=parameters,
        facts=_facts(traced),
    )


def _facts(traced: TracedModel) -> tuple[str, ...]:
    report = traced.report
    return (
        f"{traced.role}: traced by way of {report.method}",
        *(f"{traced.role}: kept as one node: {leaf}" for leaf in report.leaves),
        *(f"{traced.role}: decided by the example input: {choice}" for choice in report.specialisations),
        *(f"{traced.role}: {note}" for note in report.notes),
    )


_Entry = tuple[tuple[int | None, str], Row]
"""The stage and resolution of a row, and the row."""


def _rows(traced: TracedModel, operations: Sequence[Operation], partners: Mapping[str, Match]) -> list[_Entry]:
    path_nodes = {node.node: node for node in main_path(traced)}
    paired = {traced.node(tap).name: match for tap, match in partners.items()}
    names = [node.name for node in traced.graph_module.graph.nodes if node.op != "output"]
    inputs = {node.name for node in traced.graph_module.graph.nodes if node.op == "placeholder"}
    ends = [
        k
        for k, name in enumerate(names)
        if name in traced.facts
        and (name in paired or name in inputs or name == traced.logits or _is_exit(path_nodes.get(name)))
    ]
    stages: list[int | None] = []
    for k in reversed(ends):
        before = stages[-1] if stages else None
        stages.append(path_nodes[names[k]].stage if names[k] in path_nodes else before)
    found, first = [], 0
    for k, stage in zip(ends, reversed(stages), strict=True):
        name, last = names[k], len(names) if k == ends[-1] else k + 1
        facts, node, match = traced.facts[name], path_nodes.get(name), paired.get(name)
        operations_here = operations[first:last]
        row = Row(
            key=f"{traced.role[0]}{k}",
            tap=getattr(match.pair, traced.role) if match else operations[k].name,
            op=operations[k].op,
            shape=_size(facts),
            channels=0 if facts.channel_axis is None else facts.channels,
            kept=match.pair.kept if match and traced.role == "teacher" else None,
            pair=match.key if match else None,
            is_exit=bool(node and node.is_stage_exit),
            depth=node.depth if node else None,
            first=first,
            last=last,
            macs=sum(operation.macs for operation in operations_here),
            parameters=sum(operation.parameters for operation in operations_here),
        )
        found.append(((stage, _resolution(facts)), row))
        first = last
    return found


def _is_exit(node: PathNode | None) -> bool:
    return node is not None and (node.is_block_exit or node.is_stage_exit)


def _stages(rows: Sequence[_Entry], macs: int) -> tuple[Band, ...]:
    bands = []
    for (stage, size), group in groupby(rows, key=lambda entry: entry[0]):
        members = [row for _, row in group]
        if stage is None:
            title = "head"
        elif members[-1].op == "placeholder":
            title = "input"
        else:
            title = f"stage {stage + 1}" if any(row.is_exit for row in members) else f"to stage {stage + 1}"
        bands.append(Band(title, size, sum(row.macs for row in members) / max(macs, 1), tuple(_runs(members))))
    return tuple(bands)


def _runs(rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
    def alike(row: Row) -> object:
        return row.key if row.pair or row.is_exit else (row.shape, row.op)

    for _, group in groupby(rows, key=alike):
        run = tuple(group)
        yield from ([run] if len(run) >= FOLDED else [(row,) for row in run])
