from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.faults.harness import Victims


@pytest.fixture(scope="session")
def victims() -> Iterator[Victims]:
    found = Victims()
    yield found
    found.close()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """As the victims: with another number of threads a sum has other bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
