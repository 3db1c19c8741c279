"""Odd run directories, given to every command that takes one: read, or refused with a sentence (exit code 2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from indistill_fx.cli import run as run_cli
from indistill_fx.demo import DigitsStudent
from indistill_fx.runs.directory import STUDENT
from indistill_fx.system.tensor_files import save_tensors

MODEL = "indistill_fx.demo:DigitsStudent"
DATA = ("--data", "digits", "--limit", "24")
NEW = ("--epochs", "1", "--no-warmup", "-o", "new")
COMMANDS: dict[str, tuple[str, ...]] = {
    "inspect": ("inspect", "RUN"),
    "evaluate": ("evaluate", "RUN", *DATA),
    "export": ("export", "RUN", "-o", "a.onnx", *DATA),
    "bench": ("bench", "RUN", "--threads", "1", "--batch", "1"),
    "report": ("report", "RUN", "-o", "a.html"),
    "check": ("check", "absent.onnx", "--against", "RUN"),
    "prune": ("prune", "RUN", "--ratio", "0.5", "-o", "a.pt2"),
    "align, teacher": ("align", "RUN", MODEL),
    "align, student": ("align", MODEL, "RUN"),
    "save-outputs": ("save-outputs", "RUN", *DATA, "-o", "outputs"),
    "distill, teacher": ("distill", "RUN", MODEL, *DATA, *NEW),
    "distill, student": ("distill", MODEL, "RUN", *DATA, *NEW),
    "distill, saved outputs": ("distill", "saved:RUN", MODEL, *DATA, *NEW),
    "distill, resumed": ("distill", MODEL, MODEL, *DATA, *NEW[:-1], "RUN", "--resume"),
    "train": ("train", "RUN", *DATA, "--epochs", "1", "-o", "new"),
    "train, resumed": ("train", MODEL, *DATA, "--epochs", "1", "-o", "RUN", "--resume"),
    "compress": ("compress", "RUN", *DATA, "--macs", "0.5", "--samples", "16", "--no-export", *NEW),
}
ABOUT = {"model": MODEL, "data": "digits", "input_size": [1, 8, 8], "classes": [], "normalisation": [[0.5], [0.5]]}
ODD: dict[str, Any] = {
    "nothing": None,
    "a list": [],
    "two channels": {"about": ABOUT | {"normalisation": [[0.5, 0.5], [1, 1]]}},
    "odd all over": {
        "about": ABOUT | {"classes": [None, {}], "seal": 5},
        "phases": 5,
        "metric": [],
        "result": 3,
        "models": 5,
    },
}


@pytest.mark.parametrize("name", ["run", "a?b@c:d%[x]", "x" * 300], ids=["plain", "signs", "long"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_odd_run_directory_is_no_fault_of_ours(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (what, told) in enumerate(ODD.items() if name == "run" else [("odd all over", ODD["odd all over"])]):
        place = tmp_path / str(number) / name
        if len(name) < 256:
            place.mkdir(parents=True)
            save_tensors(place / STUDENT, DigitsStudent().state_dict())
            if told is not None:
                (place / "run.json").write_text(json.dumps(told))
        code = run_cli([part.replace("RUN", str(place)) for part in COMMANDS[command]])
        shown = capsys.readouterr().err
        assert code in (0, 2), (what, shown)
        assert code == 0 or shown.splitlines()[-1].startswith("Error: "), (what, shown)
