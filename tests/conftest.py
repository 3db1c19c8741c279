"""For all tests: programs that start at once, the usual signals, and quick garbage collections."""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  as it asks, when it is imported, what refers to random generators: frozen objects are not told
import pytest

from tests.forked import forked

# A script that starts the tests in the background, or nohup, leaves them ignored, which processes that tests start would inherit.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Leave what was imported until here out of garbage collections: each stage of training has one, which took longer than its steps."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def commands() -> Iterator[Path]:
    """A folder with the commands `python` and `indistill-fx`, which start without importing."""
    with forked() as found:
        yield found
