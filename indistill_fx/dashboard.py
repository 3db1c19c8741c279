"""What a terminal shows while a run trains: a line per stage, the running one with its bar, and the accuracy so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_LINES = 8
"""So many stages at the most are shown; those around the running one."""

_WIDE = 76
"""Columns from which on there is room for curves."""

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Seen:
    """What is known of a stage.

    Attributes:
        total: its optimiser steps, at most.
        step: those done.
        losses: of its finished epochs, and last the running one's.
        ended: epochs finished.
        over: whether it is.
    """

    total: int
    step: int = 0
    losses: list[float] = field(default_factory=list)
    ended: int = 0
    over: bool = False

    def note(self, loss: float) -> None:
        """The running epoch's loss so far."""
        self.losses[self.ended :] = [loss]


@dataclass(slots=True)
class Board:
    """All that the dashboard shows.

    Attributes:
        stages: in order.
        running: name of the one that is; empty before the first.
        pace: steps a second, and the time left, in words.
        accuracies: of the student, as they were measured.
        teacher: its accuracy.
    """

    stages: dict[str, Seen]
    running: str = ""
    pace: str = ""
    accuracies: list[float] = field(default_factory=list)
    teacher: float | None = None

    def draw(self, width: int) -> Group:
        """The dashboard for a terminal of so many columns."""
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(width=1)
        table.add_column(max_width=max(width // 4, 10), overflow="ellipsis", no_wrap=True)
        for _ in range(4 if width >= _WIDE else 3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        shown, before, behind = self._window()
        if before:
            table.add_row("", Text(f"{before} before", style="dim"))
        for name in shown:
            table.add_row(*self._line(name, self.stages[name], width))
        if behind:
            table.add_row("", Text(f"{behind} to come", style="dim"))
        return Group(table, *self._foot())

    def _window(self) -> tuple[list[str], int, int]:
        names = list(self.stages)
        at = names.index(self.running) if self.running in names else 0
        start = max(0, min(at - _LINES // 2, len(names) - _LINES))
        shown = names[start : start + _LINES]
        return shown, start, len(names) - start - len(shown)

    def _line(self, name: str, stage: Seen, width: int) -> Sequence[Text | ProgressBar]:
        runs = name == self.running and not stage.over
        mark = Text("✓", style="green") if stage.over else Text("▸", style="bold") if runs else Text("·", style="dim")
        title = Text(
            "".join(sign if sign.isprintable() else "\ufffd" for sign in name),
            style="bold" if runs else "" if stage.over else "dim",
        )
        bar = ProgressBar(total=max(stage.total, 1), completed=stage.total if stage.over else stage.step, width=14)
        ends = dict.fromkeys(f"{value:.4g}" for value in (*stage.losses[: int(width >= _WIDE)], *stage.losses[-1:]))
        told = Text(f"loss {' → '.join(ends)}" if ends else "", style="" if runs else "dim")
        cells: list[Text | ProgressBar] = [
            mark,
            title,
            bar,
            Text(f"{stage.step}/{stage.total}", style="" if runs else "dim"),
        ]
        return [*cells, told, Text(spark(stage.losses, 16), style="cyan")][: 6 if width >= _WIDE else 5]

    def _foot(self) -> list[Text]:
        parts = [self.pace] if self.pace else []
        if self.accuracies:
            parts.append(f"accuracy {self.accuracies[-1]:.2%}, best {max(self.accuracies):.2%}")
        if self.teacher is not None:
            parts.append(f"teacher {self.teacher:.2%}")
        return [Text("  " + " · ".join(parts), no_wrap=True, overflow="ellipsis")] if parts else []


def board(steps: Mapping[str, int]) -> Board:
    """A dashboard before the first stage.

    Args:
        steps: optimiser steps of each stage in order, at most.
    """
    return Board({name: Seen(total) for name, total in steps.items()})


def spark(values: Sequence[float], width: int) -> str:
    """A curve of block characters: all the values, thinned out evenly to at most `width`.

    >>> spark([4, 3, 2, 1], 10), spark([1, 1], 10), spark([], 10)
    ('█▆▃▁', '▁▁', '')
    """
    known = [min(max(value, -1e300), 1e300) for value in values if isfinite(value)]
    if len(known) > width:
        known = [known[round(k * (len(known) - 1) / (width - 1))] for k in range(width)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BLOCKS[round((value - low) / span * (len(_BLOCKS) - 1))] for value in known)
