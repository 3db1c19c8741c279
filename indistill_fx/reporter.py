"""Say how a run is getting on: a dashboard on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.live import Live

from indistill_fx.dashboard import board
from indistill_fx.printable import printable
from indistill_fx.terminal import SafeConsole

_LINE_SECONDS = 5.0
_BOARD_SECONDS = 0.25


class Reporter:
    """Progress of a run, on standard error.

    Args:
        shown: False: says nothing.
        steps: optimiser steps of each stage in order, at most.
        console: where to; default: standard error.
        costs: of a step of each stage, in any unit; by default all cost the same.
    """

    def __init__(
        self,
        *,
        shown: bool,
        steps: Mapping[str, int],
        console: Console | None = None,
        costs: Mapping[str, float] | None = None,
    ):
        self._shown, self._board = shown, board(steps)
        self._costs, self._tap = dict.fromkeys(steps, 1.0) | dict(costs or {}), ""
        self._console = console or SafeConsole(stderr=True)
        self._live: Live | None = None
        self._since, self._since_step, self._last = 0.0, 0, 0.0

    def __enter__(self) -> Reporter:
        if self._shown and self._console.is_terminal and not self._console.is_dumb_terminal:
            # Redrawn from `step`, not by a thread of its own, which would take its time from the training.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._board.pace = ""  # what it says of the time left is over; the rest stays to be read
            self._draw()
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False)
        elif self._shown:
            print(printable(text), file=sys.stderr, flush=True)

    def teacher(self, accuracy: float) -> None:
        """The teacher was measured."""
        self._board.teacher = accuracy
        self.say(f"Teacher's accuracy: {accuracy:.2%}")

    def open(self, stage: str, step: int, *, tap: str = "") -> None:
        """Begin a stage, or go on with it at a step.

        Args:
            stage: its name, which is the student's layer.
            step: done so far.
            tap: the teacher's layer, if it compares one.
        """
        self._tap = f" ← {tap}" if tap else ""
        self._board.running, self._since_step = stage, step
        self._board.stages[stage].step = step
        self._since = self._last = time.monotonic()
        self._draw()

    def step(self, step: int, epoch: int, loss: float) -> None:
        """An optimiser step is done. Cheap: most calls only look at the clock."""
        now = time.monotonic()
        if not self._shown or now - self._last < (_LINE_SECONDS if self._live is None else _BOARD_SECONDS):
            return
        self._last = now
        stage = self._board.stages[self._board.running]
        stage.step = step
        stage.note(loss)
        rate = (step - self._since_step) / max(now - self._since, 1e-9)
        pace = f"{rate:.3g} steps/s, {self._left(step, rate)}"
        if self._live is not None:
            self._board.pace = f"epoch {epoch}{self._tap} · {pace}"
            self._draw()
        else:
            self.say(
                f"{self._board.running}{self._tap}: step {step} of {stage.total}, epoch {epoch}, loss {loss:.4g}, {pace}"
            )

    def epoch(self, stage: str, step: int, loss: float, accuracy: float | None) -> None:
        """An epoch is over, now or before the run was resumed."""
        seen = self._board.stages.get(stage)
        if seen is None:
            return
        seen.step = step
        seen.note(loss)
        seen.ended += 1
        if accuracy is not None:
            self._board.accuracies.append(accuracy)
        if self._board.running:
            self._draw()

    def close(self, stage: str, text: str) -> None:
        """A stage is over; the dashboard shows it, elsewhere the text does."""
        self._board.stages[stage].over = True
        if self._live is None:
            self.say(text)
        else:
            self._draw()

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._board.draw(self._console.width), refresh=True)

    def _left(self, step: int, rate: float) -> str:
        """Time left, as if a later stage's step took as much longer than this one's as it costs more."""
        names, stages, running = list(self._board.stages), self._board.stages, self._board.running
        later = sum(stages[name].total * self._costs[name] for name in names[names.index(running) + 1 :])
        own = stages[running].total - step
        seconds = round((own + later / max(self._costs[running], 1e-9)) / max(rate, 1e-9))
        if seconds < 90:
            return f"about {seconds} s left"
        return f"about {seconds // 60} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
