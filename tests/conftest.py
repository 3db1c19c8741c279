"""For all tests: programs that start at once, and the usual signals."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import forked

# A script that starts the tests in the background, or nohup, leaves them ignored, which processes that tests start would inherit.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder with the commands `python` and `indistill-fx`, which start without importing."""
    with forked() as found:
        yield found
