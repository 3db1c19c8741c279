"""Signals: one that asks a run to stop saves and stops it, a queue's notice saves it; processes that serve a run leave them to it.

What is no run ends in order: drafts and child processes go with it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_STOP = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
_SAVE = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and did; `str()` says what was saved.

    Args:
        message: where the checkpoint is and how to continue.
        number: the signal; the command line exits with 128 + number.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class StopRequest:
    """Within the block, SIGINT, SIGTERM and SIGHUP set `number` instead of ending the program, and SIGUSR1 sets `save`.

    A first signal that asks to stop also puts the program's own handlers back, so that a second one ends it as usual. A signal that the
    program ignores (SIGHUP under nohup) stays ignored, and a handler of its own for SIGUSR1 stays. Outside the main thread, where
    Python allows no handlers, nothing is changed. A signal that the block no longer looked for is raised again at its end.

    Args:
        enabled: whether to do anything at all.

    Attributes:
        number: the signal that asked to stop; None: none did.
        save: whether SIGUSR1 arrived; whoever saves sets it back.
    """

    def __init__(self, *, enabled: bool = True):
        self.number: int | None = None
        self.save = False
        self._enabled = enabled
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if self._enabled and threading.current_thread() is threading.main_thread():
            for number in _STOP:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._stop)
            for number in _SAVE:
                if signal.getsignal(number) is signal.SIG_DFL:
                    self._before[number] = signal.signal(number, self._save)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self.number is not None:  # it came after the last step, and there may be a next run
            signal.raise_signal(self.number)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _save(self, number: int, frame: FrameType | None) -> None:
        self.save = True

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within the block, a first SIGTERM or SIGHUP raises `Interrupted`, as Ctrl-C does, instead of ending the program on the spot.

    So drafts and temporary folders are removed, and child processes ended. A second one ends the program at once. What the program handles
    itself or ignores stays as it is, and so do its children; outside the main thread nothing is changed.
    """
    owner, before = os.getpid(), dict[int, Any]()

    def end(number: int, frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        if os.getpid() != owner:
            signal.raise_signal(number)  # a child that was forked within the block ends as it always did
        raise Interrupted("", number)

    if threading.current_thread() is threading.main_thread():
        for number in _STOP:
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block, the signals that ask to stop wait for its end: for what takes no time, and must not be left half done."""
    arrived, before = list[int](), dict[int, Any]()
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        for each in arrived:
            signal.raise_signal(each)


def left_to_the_parent(_: int = 0) -> None:
    """For a process that serves another (a DataLoader's `worker_init_fn`): signals to the whole group are its parent's business.

    A queue, a service manager or a terminal sends its signal to every process of a run. The run finishes its step and saves, and needs its
    readers for that. SIGTERM from the parent itself ends the process; without a parent torch ends it.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return
    parent, signals = os.getppid(), {*_STOP, *_SAVE}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while True:
            received = signal.sigwaitinfo(signals)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
