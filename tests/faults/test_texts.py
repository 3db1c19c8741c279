"""A few of the damaged texts of benchmarks/fuzz_texts.py, by a saved seed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def fuzz(request: pytest.FixtureRequest) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    request.addfinalizer(lambda: sys.path.remove(str(BENCHMARKS)))
    import fuzz_texts

    return fuzz_texts


@pytest.mark.parametrize(
    ("kind", "count"), [("plan", 60), ("spec", 60), ("option", 60), ("run.json", 60), ("command line", 12)]
)
def test_damaged_texts_are_taken_or_refused(kind: str, count: int, fuzz: ModuleType) -> None:
    result = fuzz.fuzz(kind, count, seed=0)
    assert result["faults"] == []
    assert sum(number for key, number in result.items() if key not in ("count", "faults")) == count
    if kind != "command line":
        assert result["refused"] >= 5 and result["taken"] >= 5  # neither way is vacuous


def test_a_fault_is_seen(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "parse_spec", lambda text: text.encode("ascii"))
    assert fuzz.fuzz("spec", 40, seed=0)["faults"]
