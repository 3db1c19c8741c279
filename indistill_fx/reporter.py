"""Say how a run is getting on: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.25


class Reporter:
    """Progress of a run, on standard error.

    Args:
        shown: False: says nothing.
        steps: optimiser steps of each stage in order, at most.
    """

    def __init__(self, *, shown: bool, steps: Mapping[str, int]):
        self._shown, self._steps = shown, dict(steps)
        self._console = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._since, self._since_step, self._last = 0.0, 0, 0.0

    def __enter__(self) -> Reporter:
        if self._shown and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            # Redrawn from `step`, not by a thread of its own, which would take its time from the training.
            self._bar = Progress(*columns, console=self._console, auto_refresh=False, transient=True)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def open(self, stage: str, step: int) -> None:
        """Begin a stage, or go on with it at a step."""
        self._stage, self._since_step = stage, step
        self._since = self._last = time.monotonic()
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(stage, total=self._steps[stage], completed=step, text="")

    def step(self, step: int, epoch: int, loss: float) -> None:
        """An optimiser step is done. Cheap: most calls only look at the clock."""
        now = time.monotonic()
        if not self._shown or now - self._last < (_LINE_SECONDS if self._bar is None else _BAR_SECONDS):
            return
        self._last = now
        rate = (step - self._since_step) / max(now - self._since, 1e-9)
        text = f"epoch {epoch}, loss {loss:.4g}, {rate:.3g} steps/s, {self._left(step, rate)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
        else:
            self.say(f"{self._stage}: step {step} of {self._steps[self._stage]}, {text}")

    def _left(self, step: int, rate: float) -> str:
        """Time left, as if the later stages' steps took as long as this one's."""
        names = list(self._steps)
        later = sum(self._steps[name] for name in names[names.index(self._stage) + 1 :])
        seconds = round((self._steps[self._stage] - step + later) / max(rate, 1e-9))
        if seconds < 90:
            return f"about {seconds} s left"
        return f"about {seconds // 60} min left" if seconds < 5400 else f"about {seconds / 3600:.1f} h left"
