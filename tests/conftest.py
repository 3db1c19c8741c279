"""For all tests: programs that start at once, and SIGINT."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forked import forked

# A script that starts the tests in the background leaves it ignored, which processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder with the commands `python` and `indistill-fx`, which start without importing."""
    with forked() as found:
        yield found
