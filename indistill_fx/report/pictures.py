"""The alignment as one picture for papers and pull requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from indistill_fx.errors import ConfigError
from indistill_fx.report.alignment_view import Alignment, Column, Match, Row
from indistill_fx.report.numbers import ranges, short
from indistill_fx.report.palette import GRADES, PAPER, Palette, score_colour
from indistill_fx.report.svg import Drawing, shorten


def to_png(svg: str, *, width: int = 1840) -> bytes:
    """The picture in pixels.

    Args:
        svg: the text of an SVG file.
        width: of the PNG.

    Raises:
        ConfigError: CairoSVG, or the cairo library that it needs, is not installed.
    """
    try:
        import cairosvg
    except ImportError as error:
        raise ConfigError(
            "A PNG file needs CairoSVG, which is not installed.",
            where="--png",
            hint="pip install 'indistill-fx[png]', or write --svg, which needs no extra library.",
        ) from error
    except OSError as error:  # CairoSVG is installed, but libcairo is not
        raise ConfigError(
            "A PNG file needs the cairo library, which is not installed.",
            where="--png",
            hint="Install it (Debian: apt-get install libcairo2; macOS: brew install cairo), or write --svg, which needs no extra library.",
        ) from error
    found: bytes = cairosvg.svg2png(bytestring=svg.encode(), output_width=width)
    return found


_WIDTH, _MARGIN, _BAR, _COLUMN = 920.0, 16.0, 190.0, 384.0
_TOP, _BOTTOM, _ROW, _HEAD, _GAP, _PAD = 64.0, 58.0, 20.0, 20.0, 8.0, 4.0
_CELLS = 64
"""Channels side by side in a map of kept channels."""


@dataclass(frozen=True, slots=True)
class _Place:
    """The position of a row: the inner end of its bar."""

    row: Row
    x: float
    y: float


def alignment_svg(alignment: Alignment) -> str:
    """Teacher and student side by side, and the pairs between them.

    Args:
        alignment: see `alignment_view.see`.

    Returns:
        The text of an SVG file.
    """
    columns = (alignment.teacher, alignment.student)
    heights = [sum(_HEAD + _ROW * len(band.runs) + 2 * _PAD for band in column.bands) for column in columns]
    most = max(height + _GAP * max(len(column.bands) - 1, 0) for height, column in zip(heights, columns, strict=True))
    title = f"Alignment of {alignment.teacher.name} (teacher) with {alignment.student.name} (student)"
    drawing = Drawing(_WIDTH, _TOP + most + _BOTTOM, title=title, background="#ffffff")
    places: dict[str, _Place] = {}
    for column, height in zip(columns, heights, strict=True):
        space = (most - height) / max(len(column.bands) - 1, 1) if len(column.bands) > 1 else 0.0
        places |= {place.row.key: place for place in _draw_column(drawing, column, alignment, space)}
    for match in reversed(alignment.drawn):
        _draw_arc(drawing, match, places, dashed=match is alignment.embedding)
    _draw_legend(drawing, _TOP + most + 28)
    return str(drawing)


def _draw_column(drawing: Drawing, column: Column, alignment: Alignment, space: float) -> Iterator[_Place]:
    left = column.role == "teacher"
    outer, anchor = (_MARGIN, "start") if left else (_WIDTH - _MARGIN, "end")
    drawing.write(
        outer, 26, shorten(column.name, 40), colour=PAPER.text, size=16, anchor=anchor, bold=True, hint=column.name
    )
    size = (
        f", {short(column.parameters)} parameters, {short(column.macs)} MACs" if column.parameters is not None else ""
    )
    drawing.write(outer, 46, f"{column.role}{size}", colour=PAPER.muted, anchor=anchor)
    scores = {match.key: match.pair.score for match in alignment.matches}
    edge = _COLUMN if left else _WIDTH - _COLUMN
    y = _TOP
    for band in column.bands:
        height = _HEAD + _ROW * len(band.runs) + 2 * _PAD
        drawing.add(
            "rect",
            x=_MARGIN - 8 if left else _WIDTH - _COLUMN - 6,
            y=y,
            width=_COLUMN - _MARGIN + 14,
            height=height,
            rx=6,
            style=f"fill:{PAPER.band}",
        )
        share = "" if band.share is None or band.share < 0.0005 else f"{100 * band.share:.1f}% of MACs"
        text = " · ".join(filter(None, (band.title, band.size, share)))
        drawing.write(outer, y + _PAD + 13, text, colour=PAPER.muted, size=11, anchor=anchor)
        y += _PAD + _HEAD
        for run in band.runs:
            middle = y + _ROW / 2
            _draw_run(drawing, run, alignment.widest, scores, outer, edge, middle, left=left)
            yield from (_Place(row, edge, middle) for row in run)
            y += _ROW
        y += _PAD + space


def _draw_run(
    drawing: Drawing,
    run: Sequence[Row],
    widest: int,
    scores: dict[str, float],
    outer: float,
    edge: float,
    y: float,
    *,
    left: bool,
) -> None:
    row, many = run[-1], len(run) > 1
    width = max(_BAR * row.channels / widest, 2.0)
    x = edge - width if left else edge
    colour = score_colour(PAPER, scores[row.pair]) if row.pair in scores else PAPER.muted if row.pair else PAPER.bar
    kept = row.kept is not None
    if many:
        for k in range(-2, 3):
            drawing.add("rect", x=x, y=y + 3 * k - 1, width=width, height=2, style=f"fill:{PAPER.bar}")
    else:
        shown = PAPER.bar if kept else colour
        drawing.add("rect", x=x, y=y - 6, width=width, height=12, rx=1, style=f"fill:{shown}")
    if kept and row.channels:
        step = width / row.channels
        ticks = "".join(
            f"M{x + step * channel:.2f} {y - 6:.2f}h{max(step, 0.4):.2f}v12h-{max(step, 0.4):.2f}z"
            for channel in row.kept or ()
        )
        drawing.add("path", d=ticks, style=f"fill:{colour}", hint=f"kept channels: {ranges(row.kept or ())}")
    name = f"{shorten(run[0].tap, 11)} … {shorten(row.tap, 11)} ({len(run)})" if many else shorten(row.tap, 26)
    drawing.write(
        outer,
        y + 4,
        name,
        colour=PAPER.text if row.pair else PAPER.muted,
        size=11,
        anchor="start" if left else "end",
        mono=True,
        bold=bool(row.pair),
        hint=f"{row.tap}: {row.shape}",
    )


def _draw_arc(drawing: Drawing, match: Match, places: dict[str, _Place], *, dashed: bool) -> None:
    ends = {place.x: place for place in places.values() if place.row.pair == match.key}
    if len(ends) != 2:
        return
    start, end = (ends[x] for x in sorted(ends))
    middle = (start.x + end.x) / 2
    colour = PAPER.muted if dashed else score_colour(PAPER, match.pair.score)
    line = f"fill:none;stroke:{colour};stroke-width:{1.5 if dashed else 2.5}" + (
        ";stroke-dasharray:4 4" if dashed else ""
    )
    drawing.add(
        "path",
        d=f"M{start.x + 4:.1f} {start.y:.1f}C{middle:.1f} {start.y:.1f} {middle:.1f} {end.y:.1f} {end.x - 4:.1f} {end.y:.1f}",
        style=line,
        class_="arc embedding" if dashed else "arc",
        hint=f"{match.pair.teacher} ↔ {match.pair.student}, score {match.pair.score:.2f}: {match.pair.reason}",
    )
    if not dashed:
        y = (start.y + end.y) / 2
        drawing.add("rect", x=middle - 16, y=y - 8, width=32, height=16, rx=8, style=f"fill:#ffffff;stroke:{colour}")
        drawing.write(middle, y + 4, f"{match.pair.score:.2f}", colour=colour, size=11, anchor="middle", bold=True)


def _draw_legend(drawing: Drawing, y: float) -> None:
    x = _MARGIN
    drawing.write(x, y, "Score", colour=PAPER.muted, size=11)
    x += 40
    for entry in GRADES:
        drawing.add("rect", x=x, y=y - 8, width=18, height=4, rx=2, style=f"fill:{score_colour(PAPER, entry.floor)}")
        drawing.write(x + 24, y, entry.name, colour=PAPER.muted, size=11)
        x += 122
    legend = (
        "The length of a bar is the number of channels; kept channels are coloured. Dashed: the penultimate vectors."
    )
    drawing.write(_MARGIN, y + 18, legend, colour=PAPER.muted, size=11)


def kept_svg(kept: tuple[int, ...], channels: int, *, palette: Palette) -> str:
    """A map of kept channels: one square per channel, in rows of 64.

    Args:
        kept: ascending.
        channels: how many there are.
        palette: the colours.
    """
    across = _CELLS  # a fixed width, so that a channel has the same size in every map
    down = -(-channels // _CELLS)
    title = f"{len(kept)} of {channels} channels are kept: {ranges(kept)}"
    drawing = Drawing(4 * across, 4 * down, title=title)
    rest = sorted(set(range(channels)) - set(kept))
    for cells, colour in ((rest, palette.line), (list(kept), palette.score4)):
        squares = "".join(f"M{4 * (k % _CELLS)} {4 * (k // _CELLS)}h3v3h-3z" for k in cells)
        drawing.add("path", d=squares, style=f"fill:{colour}")
    return str(drawing)
