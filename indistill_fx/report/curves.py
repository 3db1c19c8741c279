"""Curves: how a number went over the epochs, for one run or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from indistill_fx.report.palette import PAPER, Palette, curve_colour
from indistill_fx.report.read_runs import Epoch, Run
from indistill_fx.report.svg import Drawing, shorten


def charts_of(runs: Sequence[Run]) -> list[Chart]:
    """The charts of some runs; those that would be empty are left out.

    Args:
        runs: to compare; or one.
    """
    charts = [
        *_metric_charts(runs),
        Chart("Validation loss", "epoch of the whole run", _over_run(runs, lambda epoch: epoch.val_loss)),
    ]
    for stage in dict.fromkeys(phase.name for run in runs for phase in run.phases):
        curves = [
            Curve(
                run.name,
                tuple((float(e.epoch), e.loss) for e in phase.epochs if e.loss is not None),
                colour=number,
            )
            for number, run in enumerate(runs)
            for phase in run.phases
            if phase.name == stage
        ]
        title = f"Loss, main stage{' (each run has its own loss)' if len(curves) > 1 else ''}"
        charts.append(
            Chart(title if stage == "main" else f"Loss, warm-up of {stage}", "epoch of the stage", tuple(curves))
        )
    return [chart for chart in charts if any(curve.points for curve in chart.curves)]


def _metric_charts(runs: Sequence[Run]) -> list[Chart]:
    """One chart for every metric that decides in at least one run."""
    charts = []
    for metric in dict.fromkeys(run.metric for run in runs):
        measured_runs = [run if run.metric == metric else None for run in runs]
        curves = _over_run(measured_runs, lambda epoch: epoch.value)
        if curves:
            levels = _teachers([run for run in measured_runs if run is not None])
            title = f"Validation {metric.title}"
            charts.append(Chart(title, "epoch of the whole run", (*curves, *levels), percent=metric.share))
    return charts


def _teachers(runs: Sequence[Run]) -> list[Curve]:
    """A horizontal line for every teacher; the teachers of a chain differ."""
    levels: dict[float, list[str]] = {}
    for run in runs:
        if run.teacher_value is not None:
            levels.setdefault(run.teacher_value, []).append(run.name)
    if len(levels) == 1:
        name = "the distilled runs' teacher" if len(runs) > 1 else "teacher"
        return [Curve(name, ((1.0, next(iter(levels))),), level=True)]
    return [Curve(f"teacher of {', '.join(names)}", ((1.0, level),), level=True) for level, names in levels.items()]


def _over_run(runs: Sequence[Run | None], value: Callable[[Epoch], float | None]) -> tuple[Curve, ...]:
    curves = [
        Curve(
            run.name,
            tuple((float(k), y) for k, epoch in enumerate(run.epochs, 1) if (y := value(epoch)) is not None),
            colour=number,
        )
        for number, run in enumerate(runs)
        if run is not None
    ]
    return tuple(curve for curve in curves if curve.points)


_WIDTH, _HEIGHT = 480.0, 280.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 16.0, 34.0, 40.0


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: in the legend.
        points: (x, y); those that are not finite are left out.
        level: a dashed horizontal line at the first y instead.
        colour: its number; a run has the same in every chart. None: its place in the chart.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    level: bool = False
    colour: int | None = None


@dataclass(frozen=True, slots=True)
class Chart:
    """Several curves over one axis.

    Attributes:
        title: above it.
        across: name of the horizontal axis.
        curves: the lines.
        percent: whether the values are shares.
    """

    title: str
    across: str
    curves: tuple[Curve, ...]
    percent: bool = False


def curves_svg(charts: Sequence[Chart], *, palette: Palette = PAPER) -> str:
    """Charts in two columns, as one picture.

    Args:
        charts: one at the least.
        palette: the colours.

    Returns:
        The text of an SVG file.
    """
    columns = min(2, len(charts))
    tallest = max(_height(chart) for chart in charts)
    drawing = Drawing(
        _WIDTH * columns,
        tallest * ceil(len(charts) / columns),
        title="; ".join(chart.title for chart in charts),
        background="#ffffff" if palette is PAPER else None,
    )
    for k, chart in enumerate(charts):
        _draw(drawing, chart, palette, _WIDTH * (k % columns), tallest * (k // columns))
    return str(drawing)


def _height(chart: Chart) -> float:
    return _HEIGHT + (18.0 * len(chart.curves) if len(chart.curves) > 1 else 0.0)


def _draw(drawing: Drawing, chart: Chart, palette: Palette, x0: float, y0: float) -> None:
    points = [p for curve in chart.curves for p in _finite(curve)]
    drawing.write(x0 + 12, y0 + 20, shorten(chart.title, 56), colour=palette.text, size=14, bold=True, hint=chart.title)
    if not points:
        drawing.write(x0 + 12, y0 + 60, "There are no measurements.", colour=palette.muted)
        return
    curve_points = [p for curve in chart.curves if not curve.level for p in _finite(curve)] or points
    low_x, high_x = min(x for x, _ in curve_points), max(x for x, _ in curve_points)
    low_x, high_x = (low_x, high_x) if high_x > low_x else (low_x - 0.5, high_x + 0.5)
    steps = ticks(min(y for _, y in points), max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x)
        up = (y - steps[0]) / (steps[-1] - steps[0])
        return (
            x0 + _LEFT + (_WIDTH - _LEFT - _RIGHT) * across,
            y0 + _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - up),
        )

    for value in steps:
        _, y = place(low_x, value)
        drawing.add("path", d=f"M{x0 + _LEFT:.1f} {y:.1f}H{x0 + _WIDTH - _RIGHT:.1f}", style=f"stroke:{palette.line}")
        label = f"{100 * value:.4g}%" if chart.percent else f"{value:.4g}"
        drawing.write(x0 + _LEFT - 6, y + 4, label, colour=palette.muted, size=11, anchor="end")
    for value in (value for value in ticks(low_x, high_x) if low_x <= value <= high_x and value == int(value)):
        x, y = place(value, steps[0])
        drawing.write(x, y + 16, f"{value:.0f}", colour=palette.muted, size=11, anchor="middle")
    drawing.write(
        x0 + (_LEFT + _WIDTH - _RIGHT) / 2,
        y0 + _HEIGHT - 6,
        chart.across,
        colour=palette.muted,
        size=11,
        anchor="middle",
    )
    for k, curve in enumerate(chart.curves):
        _draw_curve(drawing, curve, [place(*p) for p in _finite(curve)], palette, k, x0, y0, chart)


def _draw_curve(
    drawing: Drawing,
    curve: Curve,
    placed: Sequence[tuple[float, float]],
    palette: Palette,
    number: int,
    x0: float,
    y0: float,
    chart: Chart,
) -> None:
    colour_number = number if curve.colour is None else curve.colour
    colour = palette.muted if curve.level else curve_colour(palette, colour_number)
    values = [y for _, y in _finite(curve)]
    value_texts = [f"{100 * value:.2f}%" if chart.percent else f"{value:.4g}" for value in values]
    if curve.level and placed:
        drawing.add(
            "path",
            d=f"M{x0 + _LEFT:.1f} {placed[0][1]:.1f}H{x0 + _WIDTH - _RIGHT:.1f}",
            style=f"stroke:{colour};stroke-width:1.5;stroke-dasharray:5 4",
            hint=f"{curve.name}: {value_texts[0]}",
        )
    elif placed:
        line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        drawing.add("path", d=line, style=f"fill:none;stroke:{colour};stroke-width:2;stroke-linejoin:round")
        for (x, y), (at, _), text in zip(placed, _finite(curve), value_texts, strict=True):
            if len(placed) <= 40:
                hint = f"{curve.name}, {chart.across} {at:g}: {text}"
                drawing.add("circle", cx=x, cy=y, r=2.5 if len(placed) > 1 else 4, style=f"fill:{colour}", hint=hint)
        if len(placed) == 1:  # a single epoch has no curve; show its value
            (x, y), text = placed[0], value_texts[0]
            drawing.write(x + 9, y + 4, text, colour=palette.text, size=12)
    if len(chart.curves) > 1:
        y = y0 + _HEIGHT + 12 + 18 * number
        dash = ";stroke-dasharray:5 4" if curve.level else ""
        drawing.add("path", d=f"M{x0 + _LEFT:.1f} {y - 4:.1f}h22", style=f"stroke:{colour};stroke-width:2.5{dash}")
        last = f", {value_texts[-1]}" if value_texts else ", not measured"
        drawing.write(x0 + _LEFT + 30, y, shorten(curve.name, 40) + last, colour=palette.text, size=12, hint=curve.name)


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve.points if isfinite(x) and isfinite(y)]


def ticks(low: float, high: float) -> list[float]:
    """Round values that span a range, about five of them.

    >>> ticks(0.0, 8.9)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    largest = max(abs(low), abs(high))
    if high - low <= 1e-9 * largest or largest < 1e-30:
        spread = largest / 10 if largest >= 1e-30 else 0.1
        low, high = low - spread, high + spread
    rough = (high - low) / 5
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    return [float(f"{step * k:.12g}") for k in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]
