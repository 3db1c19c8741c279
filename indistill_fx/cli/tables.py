"""Tables for the terminal, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from indistill_fx.passes.contract import PassRecord
    from indistill_fx.passes.pairing.match import MatchReport
    from indistill_fx.passes.structure.stages import PathNode
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.traced import TracedModel


def plain_table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table with a line under its head; the columns in `numbers` are right-aligned."""
    from rich.box import SIMPLE_HEAD

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return table


def size(shape: Sequence[int]) -> str:
    """A shape without its batch axis: 256x56x56."""
    return "x".join(map(str, shape[1:]))


def count(number: float) -> str:
    """A large number in three or four digits: 4.09 G."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"


def alignment_table(
    plan: AlignmentPlan, report: MatchReport, teacher: TracedModel, *, explain: int | None = None
) -> RenderableType:
    """The pairs of a plan, the legend of their reasons, the unpaired layers and, on request, one pair's runners-up."""
    from indistill_fx.passes.pairing.score import LEGEND

    table = plain_table(
        "", "teacher", "shape", "student", "shape", "kept", "score", "reason", numbers=("", "kept", "score")
    )
    for number, pair in enumerate(plan.pairs, 1):
        kept = f"{len(pair.kept)} of {teacher.facts_of(pair.teacher).channels}" if pair.kept is not None else "all"
        row = [
            pair.teacher,
            size(pair.teacher_shape),
            pair.student,
            size(pair.student_shape),
            kept,
            f"{pair.score:.2f}",
            pair.reason,
        ]
        table.add_row(str(number), *map(Text, row))
    parts: list[RenderableType] = [Text(f"{plan.teacher.name} → {plan.student.name}"), table]
    if plan.embedding is not None:
        parts.append(
            Text(
                f"Penultimate vectors: {plan.embedding.teacher} ({size(plan.embedding.teacher_shape)})"
                f" ↔ {plan.embedding.student} ({size(plan.embedding.student_shape)})"
            )
        )
    parts += [Text(f"Not paired: {line}") for line in plan.unmatched]
    parts += [Text(f"{line[0].upper()}{line[1:]}.") for line in plan.described_views]
    used = {reason for pair in plan.pairs for reason in pair.reason.split(", ")}
    parts.append(
        Text(
            "Reasons: " + "; ".join(f"{reason}: {meaning}" for reason, meaning in LEGEND.items() if reason in used),
            style="dim",
        )
    )
    if explain is not None:
        parts.append(_runners_up(report, explain))
    return Group(*parts)


def _runners_up(report: MatchReport, number: int) -> RenderableType:
    from indistill_fx.errors import ConfigError

    if number > len(report.explained):
        raise ConfigError(
            f"There is no pair {number}; the plan has {len(report.explained)}.",
            where="--explain",
            hint="Give the number of a pair as the table shows it.",
        )
    explained = report.explained[number - 1]
    table = plain_table("teacher", "student", "score", "why it lost", numbers=("score",))
    for pair, evidence, why in explained.runners_up:
        table.add_row(Text(pair.teacher), Text(pair.student), f"{evidence.score:.2f}", Text(why))
    title = Text(f"Pair {number}, {explained.pair.teacher} ↔ {explained.pair.student}: the candidates that lost")
    return Group("", title, table if explained.runners_up else Text("None: no other candidate was above the floor."))


def main_path_table(traced: TracedModel, nodes: Sequence[PathNode]) -> RenderableType:
    """A model's main path from the input to the output, with stage and block exits."""
    table = plain_table("stage", "layer", "operation", "shape", "MACs up to it", "", numbers=("stage", "MACs up to it"))
    last: int | None = None
    for node in nodes:
        if node.stage != last and last is not None:
            table.add_section()
        last = node.stage
        mark = "stage exit" if node.is_stage_exit else "block exit" if node.is_block_exit else ""
        shape = size(node.facts.shape)
        row: list[Text | str] = [Text(node.tap), Text(node.op), shape, f"{100 * node.depth:.1f}%", mark]
        table.add_row(
            "" if node.stage is None else str(node.stage + 1), *row, style="bold" if node.is_stage_exit else ""
        )
    return table


def passes_lines(title: str, records: Iterable[PassRecord]) -> Iterator[str]:
    """What passes did to a graph: the first graph, then for each pass what it did, skipped and changed in the text."""
    for number, record in enumerate(records):
        if not number:
            yield from (f"# {title}", *record.before, "")
        count = f"{len(record.after)} lines" + ("" if record.changed else ", as before")
        yield f"# {title}, after {record.name}: {count}"
        yield from (f"#   {entry}" for entry in record.done)
        yield from (f"#   skipped {entry}" for entry in record.skipped)
        yield from (*record.diff(), "")
