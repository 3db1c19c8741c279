"""Results of `benchmarks/fuzz_readers.py`: several sittings add up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_readers.py"


def test_sittings_add_up(tmp_path):
    add, path = runpy.run_path(str(SCRIPT))["add"], tmp_path / "found.json"
    add([{"reader": "plan", "seconds": 60, "inputs": 5, "faults": {"a": "b"}}], path)
    add([{"reader": "spec", "seconds": 10, "inputs": None, "faults": {}}], path)
    add([{"reader": "plan", "seconds": 30, "inputs": 2, "faults": {}}], path)
    held = json.loads(path.read_text())
    assert held["readers"] == [
        {"reader": "plan", "seconds": 90, "inputs": 7, "faults": {"a": "b"}},
        {"reader": "spec", "seconds": 10, "inputs": 0, "faults": {}},
    ]
    assert held["environment"]["versions"]
