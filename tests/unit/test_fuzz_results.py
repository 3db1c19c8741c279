"""Results of `benchmarks/fuzz_readers.py`: several sittings add up."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from indistill_fx.deploy import check_onnx
from indistill_fx.errors import IndistillError

REFUSED = {
    ("legacy module", 0),
    ("safetensors", 0),
    ("classes", 1),
    ("classes", 2),
    ("plan with views", 2),
    ("plan with views", 3),
}
"""On purpose: whole modules of old, wrong digests, lists of lines as JSON, views of three channels for a teacher of one."""
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_readers.py"


def test_sittings_add_up(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
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


def test_every_sound_file_is_one(tmp_path, monkeypatch):
    """Fuzzing that starts from what is refused at the door finds nothing."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check_onnx, "capture", check_onnx.capture)  # which the readers replace
    from file_readers import GROUPS

    refused = set()
    for group, names in GROUPS.items():
        found = group()
        assert tuple(found) == names
        for name, (read, sound) in found.items():
            for number, content in enumerate(sound()):
                place = tmp_path / f"{name}-{number}" / "now"
                place.mkdir(parents=True)
                (place / "file").write_bytes(content)
                try:
                    read(place / "file")
                except IndistillError:
                    refused.add((name, number))
    assert refused == REFUSED
