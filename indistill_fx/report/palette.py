"""Colours: of papers as literals, of pages as the style sheet's variables; and what a score looks like."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Palette:
    """The colours of a picture. `score1` … `score4` go from a weak pair to a strong one, `line1` … distinguish curves."""

    text: str
    muted: str
    line: str
    band: str
    bar: str
    score1: str
    score2: str
    score3: str
    score4: str
    line1: str
    line2: str
    line3: str
    line4: str
    line5: str
    line6: str


PAPER = Palette(
    text="#16181d",
    muted="#565e6c",
    line="#d5dae1",
    band="#f4f6f8",
    bar="#a9b2bf",
    score1="#b3261e",
    score2="#9a5b00",
    score3="#00736b",
    score4="#1a56c4",
    line1="#1a56c4",
    line2="#b54708",
    line3="#00736b",
    line4="#8e3fb0",
    line5="#b3261e",
    line6="#565e6c",
)

PAGE = Palette(*(f"var(--{field.name})" for field in fields(Palette)))


class Grade(NamedTuple):
    """Scores from `floor` up, and their name."""

    floor: float
    number: int
    name: str


GRADES = (
    Grade(0.95, 4, "0.95 and more"),
    Grade(0.8, 3, "0.80 to 0.95"),
    Grade(0.6, 2, "0.60 to 0.80"),
    Grade(0.0, 1, "below 0.60"),
)


def grade(score: float) -> int:
    """4: a strong pair; 1: a weak one.

    >>> [grade(score) for score in (1.0, 0.9, 0.1)]
    [4, 3, 1]
    """
    return next(entry.number for entry in GRADES if score >= entry.floor)


def score_colour(palette: Palette, score: float) -> str:
    """The colour of a score."""
    colour: str = getattr(palette, f"score{grade(score)}")
    return colour


def curve_colour(palette: Palette, number: int) -> str:
    """The colour of the n-th curve, from 0; they repeat after six."""
    colour: str = getattr(palette, f"line{number % 6 + 1}")
    return colour
