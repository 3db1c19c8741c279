"""For all tests: the same random numbers in any order, programs that start at once, the usual signals, and quick garbage collections."""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  as it asks, when it is imported, what refers to random generators: frozen objects are not told
import numpy as np
import pytest
import torch

from tests.forked import forked

# A script that starts the tests in the background, or nohup, leaves them ignored, which processes that tests start would inherit.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)


SLOW = (
    "test_site",
    "test_processes",
    "test_stage_distributed",
    "test_fuzz",
    "test_streams",
    "test_compression",
    "test_signals",
    "test_cli",
)
"""Files of tests that take longest, the slowest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest: with two processes, each of which takes whole files, none of them is left for the end."""
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOW)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test draws the same numbers, whichever tests ran before it."""
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


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
