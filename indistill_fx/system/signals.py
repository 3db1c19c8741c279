"""Ctrl-C and SIGTERM: the first asks the run to save and stop, the second quits at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and did; `str()` says what was saved.

    Args:
        message: where the checkpoint is and how to go on.
        number: the signal; the command line exits with 128 + number.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class StopRequest:
    """Within the block, SIGINT and SIGTERM set `number` instead of ending the program.

    A first signal also puts the program's own handlers back, so that a second one ends it as usual. Outside the main
    thread, where Python allows no handlers, nothing is changed.

    Args:
        enabled: whether to do anything at all.
    """

    def __init__(self, *, enabled: bool = True):
        self.number: int | None = None
        self._enabled = enabled
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
