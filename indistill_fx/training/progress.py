"""Say how a run is getting on: a dashboard on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from indistill_fx.runs.record import MetricFacts
from indistill_fx.system.terminal import SafeConsole, one_line

_LINES = 8
"""So many stages at the most are shown; those around the running one."""

_WIDE = 76
"""Columns from which on there is room for curves."""

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Seen:
    """What is known of a stage.

    Attributes:
        total: its optimiser steps, at most; None: not known before its first epoch ends.
        step: those done.
        losses: of its finished epochs, and last the running one's.
        ended: epochs finished.
        over: whether it is.
    """

    total: int | None
    step: int = 0
    losses: list[float] = field(default_factory=list)
    ended: int = 0
    over: bool = False

    def note(self, loss: float) -> None:
        """Store the running epoch's loss so far."""
        self.losses[self.ended :] = [loss]


@dataclass(slots=True)
class Board:
    """All that the dashboard shows.

    Attributes:
        stages: in order.
        running: name of the one that is; empty before the first.
        pace: steps a second, and the time left, in words.
        values: of the deciding metric, the student's, as they were measured.
        teacher: likewise, the teacher's.
        metric: that metric.
        memory: the most bytes held so far; None: not known.
    """

    stages: dict[str, Seen]
    running: str = ""
    pace: str = ""
    values: list[float] = field(default_factory=list)
    teacher: float | None = None
    metric: MetricFacts = field(default_factory=MetricFacts)
    memory: int | None = None

    def draw(self, width: int) -> Group:
        """The dashboard for a terminal with `width` columns."""
        table = Table.grid(padding=(0, 1), expand=False)
        table.add_column(width=1)
        table.add_column(max_width=max(width // 4, 10), overflow="ellipsis", no_wrap=True)
        for _ in range(4 if width >= _WIDE else 3):
            table.add_column(no_wrap=True, overflow="ellipsis")
        shown, before, after = self._window()
        if before:
            table.add_row("", Text(f"{before} before", style="dim"))
        for name in shown:
            table.add_row(*self._line(name, self.stages[name], width))
        if after:
            table.add_row("", Text(f"{after} to come", style="dim"))
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
            one_line(name),
            style="bold" if runs else "" if stage.over else "dim",
        )
        total = stage.total if stage.total is not None else stage.step
        bar = ProgressBar(total=max(total, 1), completed=total if stage.over else stage.step, width=14)
        ends = dict.fromkeys(f"{value:.4g}" for value in (*stage.losses[: int(width >= _WIDE)], *stage.losses[-1:]))
        losses_text = Text(f"loss {' → '.join(ends)}" if ends else "", style="" if runs else "dim")
        cells: list[Text | ProgressBar] = [
            mark,
            title,
            bar,
            Text(f"{stage.step}/{'?' if stage.total is None else stage.total}", style="" if runs else "dim"),
        ]
        return [*cells, losses_text, Text(spark(stage.losses, 16), style="cyan")][: 6 if width >= _WIDE else 5]

    def _foot(self) -> list[Text]:
        parts = [self.pace] if self.pace else []
        metric = self.metric
        if self.values:
            best = (max if metric.higher_is_better else min)(self.values)
            parts.append(f"{metric.title} {metric.text(self.values[-1])}, best {metric.text(best)}")
        if self.teacher is not None:
            parts.append(f"teacher {metric.text(self.teacher)}")
        if self.memory is not None:
            parts.append(f"memory up to {self.memory / 2**30:.2f} GiB")
        return [Text("  " + " · ".join(parts), no_wrap=True, overflow="ellipsis")] if parts else []


def board(steps: Mapping[str, int | None], metric: MetricFacts | None = None) -> Board:
    """A dashboard before the first stage.

    Args:
        steps: optimiser steps of each stage in order, at most; None: not known.
        metric: what the student is measured by; by default accuracy.
    """
    return Board({name: Seen(total) for name, total in steps.items()}, metric=metric or MetricFacts())


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


def throughput(samples: int, seconds: float, waited: float) -> str:
    """How fast data are learnt from, in words.

    >>> throughput(1200, 10.0, 0.5)
    '120 samples/s, 5% of the time waiting for data'
    """
    return f"{samples / max(seconds, 1e-9):.3g} samples/s, {min(waited / max(seconds, 1e-9), 1):.0%} of the time waiting for data"


_LINE_SECONDS = 5.0
_BOARD_SECONDS = 0.25


class Reporter:
    """Progress of a run, on standard error.

    Args:
        shown: False: says nothing.
        steps: optimiser steps of each stage in order, at most.
        console: where to; default: standard error.
        costs: of a step of each stage, in any unit; by default all cost the same.
        metric: the one that decides what is best; by default accuracy.
        memory: the most bytes held so far; None: not known.
    """

    def __init__(
        self,
        *,
        shown: bool,
        steps: Mapping[str, int | None],
        console: Console | None = None,
        costs: Mapping[str, float] | None = None,
        metric: MetricFacts | None = None,
        memory: Callable[[], int | None] = lambda: None,
    ):
        self._shown, self._board = shown, board(steps, metric)
        self._costs, self._tap = dict.fromkeys(steps, 1.0) | dict(costs or {}), ""
        self._console = console or SafeConsole(stderr=True)
        self._live: Live | None = None
        self._since, self._since_step, self._last = 0.0, 0, 0.0
        self._samples, self._waited, self._memory = 0, 0.0, memory

    def __enter__(self) -> Reporter:
        if self._shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Redrawn from `step`: a thread of its own would take time from the training.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            with self._costing_no_work():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._board.pace = ""  # the time left is no longer true; the rest stays on the screen
            self._draw()
        if self._live is not None:
            with self._costing_no_work():
                self._live.stop()

    def say(self, *lines: str) -> None:
        """Print lines above the dashboard, which stay on the screen."""
        with self._costing_no_work():
            for line in map(one_line, lines):
                if self._live is not None:
                    self._live.console.print(line, markup=False)
                elif self._shown and sys.stderr is not None:  # if stderr is None, `print` would write to stdout
                    print(line, file=sys.stderr, flush=True)

    @contextmanager
    def _costing_no_work(self) -> Iterator[None]:
        """Within the block, a closed or full standard error ends the progress display, not the run."""
        try:
            yield
        except (OSError, ValueError):
            self._shown, self._live = False, None

    def teacher(self, value: float) -> None:
        """Show the teacher's measured value."""
        self._board.teacher = value
        self.say(f"Teacher's {self._board.metric.title}: {self._board.metric.text(value)}")

    def open(self, stage: str, step: int, *, tap: str = "") -> None:
        """Begin a stage, or continue it at a step.

        Args:
            stage: its name, which is the student's layer.
            step: done so far.
            tap: the teacher's layer, if it compares one.
        """
        self._tap = f" ← {tap}" if tap else ""
        self._board.running, self._since_step = stage, step
        self._board.stages[stage].step = step
        self._since = self._last = time.monotonic()
        self._samples, self._waited = 0, 0.0
        self._draw()

    def batch(self, samples: int, waited: float) -> None:
        """Record the arrival of a batch: its number of samples, and the seconds spent waiting for it."""
        self._samples += samples
        self._waited += waited

    def step(self, step: int, epoch: int, loss: float) -> None:
        """Record an optimiser step. Cheap: most calls only read the clock."""
        now = time.monotonic()
        if not self._shown or now - self._last < (_LINE_SECONDS if self._live is None else _BOARD_SECONDS):
            return
        self._last = now
        stage = self._board.stages[self._board.running]
        stage.step = step
        stage.note(loss)
        seconds = max(now - self._since, 1e-9)
        rate = (step - self._since_step) / seconds
        pace = f"{rate:.3g} steps/s, {self._left(step, rate)}, {throughput(self._samples, seconds, self._waited)}"
        if self._live is not None:
            self._board.pace, self._board.memory = f"epoch {epoch}{self._tap} · {pace}", self._memory()
            self._draw()
        else:
            self.say(
                f"{self._board.running}{self._tap}: step {step}{'' if stage.total is None else f' of {stage.total}'}, "
                f"epoch {epoch}, loss {loss:.4g}, {pace}"
            )

    def epoch(self, stage: str, step: int, loss: float, value: float | None) -> None:
        """Record the end of an epoch, now or before the run was resumed, with the deciding metric's value if it was measured."""
        seen = self._board.stages.get(stage)
        if seen is None:
            return
        seen.step = step
        seen.note(loss)
        seen.ended += 1
        if value is not None:
            self._board.values.append(value)
        if self._board.running:
            self._draw()

    def close(self, stage: str, text: str) -> None:
        """Record the end of a stage: the dashboard shows it; without a terminal, the text is printed."""
        self._board.stages[stage].over = True
        if self._live is None:
            self.say(text)
        else:
            self._draw()

    def _draw(self) -> None:
        with self._costing_no_work():
            if self._live is not None:
                self._live.update(self._board.draw(self._console.width), refresh=True)

    def _left(self, step: int, rate: float) -> str:
        """The time left, assuming that a later stage's steps take longer in proportion to their cost."""
        names, stages, running = list(self._board.stages), self._board.stages, self._board.running
        totals = {name: stages[name].total for name in names[names.index(running) :]}
        known = {name: total for name, total in totals.items() if total is not None}
        if len(known) < len(totals):
            return "the length of an epoch is not known"
        remaining = known.pop(running) - step
        later = sum(total * self._costs[name] for name, total in known.items())
        seconds = round((remaining + later / max(self._costs[running], 1e-9)) / max(rate, 1e-9))
        if seconds < 90:
            return f"about {seconds} s left"
        return f"about {seconds // 60} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
