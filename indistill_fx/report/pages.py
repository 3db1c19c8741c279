"""Pages: one file each, with all that they need in it. Templates escape every value; no script but our own may run."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from indistill_fx.plan import AlignmentPlan
from indistill_fx.report import numbers
from indistill_fx.report.alignment_view import Alignment, Match, see_plan
from indistill_fx.report.curves import charts_of, curves_svg
from indistill_fx.report.layers import layer_tables
from indistill_fx.report.models import columns, model_rows, note, role_of
from indistill_fx.report.palette import GRADES, PAGE, grade
from indistill_fx.report.pictures import kept_svg
from indistill_fx.report.read_runs import Run, read_runs
from indistill_fx.report.svg import legible
from indistill_fx.system.files import json_text
from indistill_fx.version import __version__

_LINES = 2000
"""So many epochs at the most are listed as numbers; the curves have all."""


@dataclass(frozen=True, slots=True)
class _View:
    """An alignment as the templates draw it."""

    alignment: Alignment
    scores: Mapping[str, int]

    def kept_map(self, match: Match) -> Markup:
        return Markup(kept_svg(match.pair.kept or (), match.channels or 1, palette=PAGE))  # our own file, so it is safe


def alignment_page(plan: AlignmentPlan, alignment: Alignment) -> str:
    """Teacher and student side by side with the pairs between them, as one HTML file.

    Args:
        plan: the pairs; its text can be copied from the page.
        alignment: what `see` makes of it.

    Returns:
        The text of the file.
    """
    view = _view(alignment)
    title = f"{view.alignment.teacher.name} → {view.alignment.student.name}"
    return _render(
        "alignment.html.j2",
        title=title,
        kind=f"Alignment, {len(plan.pairs)} pairs",
        data=_data(view.alignment),
        view=view,
        plan_text=plan.model_dump_json(indent=2),
    )


def run_page(run_dir: str | os.PathLike[str]) -> str:
    """What training did, as one HTML file. Shows what there is, and says what is missing.

    Args:
        run_dir: a run directory, or a folder of runs to compare.

    Returns:
        The text of the file.

    Raises:
        ConfigError: there is no run in it.
    """
    runs = read_runs(run_dir)
    plan = next((run.plan for run in reversed(runs) if run.plan is not None), None)
    view = _view(see_plan(plan)) if plan is not None else None
    epochs = max(len(run.epochs) for run in runs)
    shares = {run.name: [max(phase.planned or 0, len(phase.epochs), 1) for phase in run.phases] for run in runs}
    name = os.path.basename(os.path.abspath(run_dir))
    return _render(
        "run.html.j2",
        title=runs[0].name if len(runs) == 1 else name,
        kind="Run" if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        data=_data(view.alignment) if view else {},
        view=view,
        runs=runs,
        tiles=_tiles(runs),
        missing=[line if len(runs) == 1 else f"{run.name}: {line}" for run in runs for line in _missing(run)],
        shares=shares,
        longest=max(*map(sum, shares.values()), 1),
        charts=[Markup(curves_svg([chart], palette=PAGE)) for chart in charts_of(runs)],  # our own file, so it is safe
        limit=_LINES,
        cut=f"Only the first {_LINES} epochs of every run are shown; metrics.jsonl has all of them."
        if epochs > _LINES
        else "",
        models=model_rows(runs),
        model_columns=columns(runs),
        model_note=note(runs),
        layers=layer_tables(runs),
        plan_text=plan.model_dump_json(indent=2) if plan is not None else "",
    )


def _missing(run: Run) -> Sequence[str]:
    """What is missing in a run; a run on labels alone needs no plan."""
    labels_only = run.status == "done" and all(phase.name == "main" for phase in run.phases)
    return [line for line in run.missing if not (labels_only and line.startswith("plan.json is missing"))]


def _view(alignment: Alignment) -> _View:
    return _View(alignment, {match.key: grade(match.pair.score) for match in alignment.matches})


def _data(alignment: Alignment) -> dict[str, Any]:
    """The data for the page's script: the rows' facts and all operations."""
    rows = {
        row.key: [
            row.tap,
            row.op,
            row.shape,
            " · ".join(filter(None, (band.title, band.size))),
            row.depth or 0.0,
            row.macs,
            row.parameters,
            row.first,
            row.last,
        ]
        for column in (alignment.teacher, alignment.student)
        for band in column.bands
        for run in band.runs
        for row in run
    }
    columns = (alignment.teacher, alignment.student)
    return {"rows": rows, "operations": {c.role: [astuple(operation) for operation in c.operations] for c in columns}}


def _tiles(runs: Sequence[Run]) -> list[dict[str, str]]:
    students = [run for run in runs if role_of(run, runs) == "student"] or runs
    metric = students[0].metric
    alike = [run for run in students if run.metric == metric and run.value is not None]
    choose = max if metric.higher_is_better else min
    best = choose((run.value for run in alike if run.value is not None), default=None)
    names = ", ".join(run.name for run in alike if run.value == best)
    teacher = next((run.teacher_value for run in runs if run.metric == metric and run.teacher_value is not None), None)
    known = [run.weights for run in students if run.weights is not None]
    tiles = {
        (metric.title if len(runs) == 1 else f"best student's {metric.title}: {names or 'none'}"): numbers.measured(
            best, share=metric.share
        ),
        f"teacher's {metric.title}": numbers.measured(teacher, share=metric.share),
        "epochs trained": str(sum(len(run.epochs) for run in runs)),
        "spent training": numbers.duration(sum(run.seconds for run in runs)),
        "student's weights on disk": numbers.size(min(known)) if known else "–",
    }
    return [{"name": name, "value": value} for name, value in tiles.items()]


def _render(template: str, **values: Any) -> str:
    script = _asset("page.js")
    return (
        _environment()
        .get_template(template)
        .render(
            style=Markup(_asset("style.css")),  # our own file, so it is safe
            script=Markup(script),  # our own file, so it is safe
            script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
            version=__version__,
            grades=GRADES,
            **values,
        )
    )


@cache
def _asset(name: str) -> str:
    return (resources.files("indistill_fx.report") / "templates" / name).read_text(encoding="utf-8").strip()


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("indistill_fx.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: legible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "short": numbers.short,
        "percent": numbers.percent,
        "duration": numbers.duration,
        "ranges": numbers.ranges,
        "digits": lambda value: "–" if value is None else f"{value:.4g}",
        "shape": lambda shape: "×".join(map(str, shape[1:])),
        "plain": _plain,
        "breakable": _breakable,
        "command": _command,
        "flat": _flat,
    }
    return environment


def _plain(text: str) -> Markup:
    """A sentence of ours as HTML: escaped, with `names` as code."""
    parts = [escape(legible(part)) for part in text.split("`")]
    if len(parts) % 2 == 0:
        return escape(legible(text))
    return Markup("").join(Markup("<code>{}</code>").format(part) if k % 2 else part for k, part in enumerate(parts))


def _breakable(name: str) -> Markup:
    """A model's name with possible line breaks after colons and slashes."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[:/])", legible(name)))


def _command(command: object) -> str:
    return shlex.join(map(str, command)) if isinstance(command, list) and command else "unknown"


def _flat(values: object) -> list[tuple[str, str]]:
    """Names and values of a nested object, in one list."""
    if not isinstance(values, dict):
        return []
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += [(f"{key}.{inner}", text) for inner, text in _flat(value)]
        else:
            found.append((str(key), value if isinstance(value, str) else json_text(value)))
    return found
