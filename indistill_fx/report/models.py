"""The table of models: teacher, assistant, student; what they reach, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from indistill_fx.report import numbers
from indistill_fx.report.read_runs import ModelFacts, Run

COLUMNS = (
    "Accuracy",
    "Best",
    "Parameters",
    "MACs",
    "Weights",
    "Latency",
    "In int8",
    "int8 size",
    "Training",
)


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One line of the table.

    Attributes:
        label: the run's name, or `teacher`.
        role: teacher, assistant or student.
        model: its class; empty if unknown.
        cells: one per column of `columns`.
    """

    label: str
    role: str
    model: str
    cells: tuple[str, ...]


def columns(runs: Sequence[Run]) -> tuple[str, ...]:
    """Names of the cells: `COLUMNS`, with the metric that decides in its place."""
    titles = dict.fromkeys(run.metric.title for run in runs)
    return (" / ".join(titles).capitalize(), *COLUMNS[1:])


def role_of(run: Run, runs: Sequence[Run]) -> str:
    """What the model that a run trained is to the other runs.

    Rules, in order:
      1. The model that another run distils from is an assistant if it was distilled itself, else a teacher.
      2. A run called `teacher` that had none is a teacher; every other model is a student.
    """
    facts = run.student
    taught = run.teacher is not None or run.teacher_value is not None
    if facts is not None and facts != run.teacher and any(other.teacher == facts for other in runs if other is not run):
        return "assistant" if taught else "teacher"
    return "teacher" if run.name == "teacher" and not taught else "student"


def model_rows(runs: Sequence[Run]) -> list[ModelRow]:
    """The teachers that are not among these runs, then the runs."""
    trained = [run.student for run in runs if role_of(run, runs) != "student"]
    rows: list[ModelRow] = []
    seen: list[ModelFacts | None] = []
    for run in runs:
        foreign = run.teacher not in trained if run.teacher else all(role_of(r, runs) == "student" for r in runs)
        if (run.teacher or run.teacher_value is not None) and foreign and run.teacher not in seen:
            seen.append(run.teacher)
            rows.append(_foreign(run))
    return rows + [_own(run, runs) for run in runs]


def note(runs: Sequence[Run]) -> str:
    """The note below the table of models."""
    text = "Latency is that of one sample in onnxruntime. –: not measured"
    if not any(run.export for run in runs):
        text += "; `indistill-fx export RUN_DIR` measures latency and, with `--int8`, the int8 file, and saves both in the run"
    return f"{text}."


def _foreign(run: Run) -> ModelRow:
    facts = run.teacher
    export = run.teacher_export
    cells = (
        numbers.measured(run.teacher_value, share=run.metric.share),
        "–",
        numbers.short(facts.parameters if facts else None),
        numbers.short(facts.macs if facts else export.get("macs")),
        "–",
        *_exported(export, share=run.metric.share),
        "–",
    )
    return ModelRow("teacher", "teacher", facts.name if facts else "", cells)


def _own(run: Run, runs: Sequence[Run]) -> ModelRow:
    facts = run.student
    as_teacher = next((other.teacher for other in runs if facts is not None and other.teacher == facts), None)
    macs = next((f.macs for f in (facts, as_teacher) if f is not None and f.macs is not None), run.export.get("macs"))
    cells = (
        numbers.measured(run.value, share=run.metric.share),
        numbers.measured(run.best, share=run.metric.share),
        numbers.short(facts.parameters if facts else run.parameters),
        numbers.short(macs),
        numbers.size(run.weights),
        *_exported(run.export, share=run.metric.share),
        numbers.duration(run.seconds) if run.epochs else "–",
    )
    return ModelRow(run.name, role_of(run, runs), facts.name if facts else "", cells)


def _exported(export: Mapping[str, float], *, share: bool) -> tuple[str, str, str]:
    latency = export.get("latency_ms")
    return (
        "–" if latency is None else f"{latency:.3g} ms",
        numbers.measured(export.get("int8_value"), share=share),
        numbers.size(export.get("int8_size")),
    )
