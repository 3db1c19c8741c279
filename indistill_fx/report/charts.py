"""Which charts a report has: the loss of every stage, and what was measured over the whole run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from indistill_fx.report.curves import Chart, Curve
from indistill_fx.report.runs import Epoch, Run


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts of some runs; those that would be empty are left out.

    Args:
        runs: to compare; or one.
    """
    charts = [
        Chart(
            "Validation accuracy", "epoch of the whole run", _over_run(runs, lambda epoch: epoch.accuracy), percent=True
        ),
        Chart("Validation loss", "epoch of the whole run", _over_run(runs, lambda epoch: epoch.val_loss)),
    ]
    if charts[0].curves:
        charts[0] = Chart(charts[0].title, charts[0].across, (*charts[0].curves, *_teachers(runs)), percent=True)
    for stage in dict.fromkeys(leg.name for run in runs for leg in run.legs):
        curves = [
            Curve(
                run.name,
                tuple((float(e.epoch), e.loss) for e in leg.epochs if e.loss is not None),
                colour=number,
            )
            for number, run in enumerate(runs)
            for leg in run.legs
            if leg.name == stage
        ]
        title = f"Loss, main stage{' (each run has its own loss)' if len(curves) > 1 else ''}"
        charts.append(
            Chart(title if stage == "main" else f"Loss, warm-up of {stage}", "epoch of the stage", tuple(curves))
        )
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def _teachers(runs: Sequence[Run]) -> list[Curve]:
    """A level for every teacher; those of a chain differ."""
    levels: dict[float, list[str]] = {}
    for run in runs:
        if run.teacher_accuracy is not None:
            levels.setdefault(run.teacher_accuracy, []).append(run.name)
    if len(levels) == 1:
        name = "the distilled runs' teacher" if len(runs) > 1 else "teacher"
        return [Curve(name, ((1.0, next(iter(levels))),), level=True)]
    return [Curve(f"teacher of {', '.join(names)}", ((1.0, level),), level=True) for level, names in levels.items()]


def _over_run(runs: Sequence[Run], value: Callable[[Epoch], float | None]) -> tuple[Curve, ...]:
    curves = [
        Curve(
            run.name,
            tuple((float(k), y) for k, epoch in enumerate(run.epochs, 1) if (y := value(epoch)) is not None),
            colour=number,
        )
        for number, run in enumerate(runs)
    ]
    return tuple(curve for curve in curves if curve.points)
