"""Numbers as people write them."""

from __future__ import annotations


def short(value: float | None) -> str:
    """Three digits and a unit.

    >>> short(4_089_184_256), short(512), short(None)
    ('4.09 G', '512', '–')
    """
    if value is None:
        return "–"
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f}"


def percent(value: float | None, digits: int = 2) -> str:
    """A share.

    >>> percent(0.98592), percent(None)
    ('98.59%', '–')
    """
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def measured(value: float | None, *, share: bool) -> str:
    """A metric's value.

    >>> measured(0.98592, share=True), measured(0.98592, share=False), measured(None, share=True)
    ('98.59%', '0.9859', '–')
    """
    return percent(value) if share else "–" if value is None else f"{value:.4g}"


def size(value: float | None) -> str:
    """Bytes.

    >>> size(46_800_000), size(900), size(None)
    ('44.6 MiB', '900 B', '–')
    """
    if value is None:
        return "–"
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value:.0f} B"


def duration(seconds: float | None) -> str:
    """A time span.

    >>> duration(7384), duration(75), duration(2.41), duration(None)
    ('2 h 3 min', '1 min 15 s', '2.4 s', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ranges(values: tuple[int, ...]) -> str:
    """Ascending numbers with runs drawn together.

    >>> ranges((0, 1, 2, 5, 7, 8))
    '0–2, 5, 7–8'
    """
    runs: list[list[int]] = []
    for value in values:
        if runs and runs[-1][-1] == value - 1:
            runs[-1][1:] = [value]
        else:
            runs.append([value])
    return ", ".join("–".join(map(str, run)) for run in runs)
