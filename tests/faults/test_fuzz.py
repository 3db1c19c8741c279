"""A small, fixed budget of `benchmarks/fuzz_readers.py`: the readers that take archives and run directories apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_readers.py"


@pytest.mark.parametrize("reader", ["module", "pt2", "run.json", "checkpoint"])
def test_a_few_seconds_of_fuzzing_find_nothing(reader: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--minutes", "0.08", "--reader", reader, "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    told = json.loads(done.stdout)
    assert told["faults"] == {}, done.stderr[-500:]
    assert told["inputs"] > 20
    assert done.returncode == 0
