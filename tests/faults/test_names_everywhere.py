"""Every string of a plan, run.json, metrics and class folders holds escapes and line breaks; no output of any command obeys them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from indistill_fx.cli import run as run_cli
from indistill_fx.deploy.metadata import of_module, of_source
from indistill_fx.runs.directory import RunDirectory

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\u2028\r"
FORGED = "x\nindistill-fx: to go on, run: curl evil.example"
NASTY = ESCAPE + FORGED
OBEYED = ("\x1b]", "\x1b[2J", "\x07", "\u202e", "\u2028", "\r")


def poisoned(value: Any, kept: tuple[str, ...]) -> Any:
    """Every text replaced, but those under the kept keys."""
    if isinstance(value, dict):
        return {key: part if key in kept else poisoned(part, kept) for key, part in value.items()}
    if isinstance(value, list):
        return [poisoned(part, kept) for part in value]
    return NASTY if isinstance(value, str) else value


def obeyed_nowhere(*texts: str) -> None:
    """No command to a terminal and no line of its own in names that go into files of others."""
    assert [text for text in texts if any(sign in text for sign in (*OBEYED, "\n"))] == []


def test_names_in_onnx_metadata_and_in_event_files(tmp_path: Path) -> None:
    told = of_source(model=NASTY, run=NASTY, classes=[NASTY], normalisation=((0.5,), (0.5,)))
    obeyed_nowhere(*told.values())
    assert json.loads(told["classes"]) == [NASTY]  # whoever reads the names gets them as they are
    module = type(NASTY, (nn.Linear,), {})(2, 2)
    obeyed_nowhere(*of_module(module).values())
    with RunDirectory(tmp_path / "run", resume=False, trackers=["tensorboard"]) as directory:
        directory.log({"kind": NASTY, "epochs": 1, "step": 1, NASTY: 0.5, "values": {NASTY: 0.25}})
    events = EventAccumulator(str(next((tmp_path / "run").rglob("events.*"))))
    events.Reload()
    assert len(events.Tags()["scalars"]) == 2
    obeyed_nowhere(*events.Tags()["scalars"])


def look(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> int:
    code = run_cli(arguments)
    shown = "".join(capfd.readouterr())
    assert code in (0, 2), (arguments, shown)
    assert [sign for sign in OBEYED if sign in shown] == [], (arguments, ascii(shown))
    assert not any(line.lstrip(" │|").startswith("indistill-fx: to go on") for line in shown.splitlines()), (
        arguments,
        shown,
    )
    return code


def test_no_command_obeys_a_name(tmp_path: Path, monkeypatch, capfd) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    torch.save(net, "sound.pt")
    for split in ("train", "test"):
        for label, name in enumerate((ESCAPE, FORGED.replace("/", ""))):
            folder = Path("data", split, name)
            folder.mkdir(parents=True)
            for k in range(4):
                Image.new("RGB", (9, 9), (label * 90, k, 0)).save(folder / f"{k}.png")
    data = ["--data", "imagefolder:data"]
    assert look(capfd, ["evaluate", "sound.pt", *data]) == 0
    assert look(capfd, ["evaluate", "sound.pt", *data, "--json"]) == 0
    assert look(capfd, ["train", "sound.pt", *data, "--epochs", "1", "-o", "run", "--tensorboard"]) == 0
    assert look(capfd, ["export", "run", "-o", "m.onnx", *data]) == 0
    look(capfd, ["check", "m.onnx", "sound.pt", *data])
    told_by_onnx = {entry.key: entry.value for entry in onnx.load("m.onnx").metadata_props}
    assert json.loads(told_by_onnx["classes"]) == sorted((ESCAPE, FORGED.replace("/", "")))
    obeyed_nowhere(*told_by_onnx.keys(), *told_by_onnx.values())
    look(capfd, ["evaluate", "run", *data])
    shape = ["--input", "3x9x9"]
    assert look(capfd, ["align", "sound.pt", "sound.pt", *shape, "-o", "plan.json"]) == 0
    plan = json.loads(Path("plan.json").read_text())
    for kept in ((), ("teacher", "student"), ("pairs",), ("pairs", "embedding", "teacher", "student")):
        Path("evil.json").write_text(json.dumps(poisoned(plan, kept)))
        for way in (
            ["--plan", "evil.json"],
            ["--plan", "evil.json", "--explain"],
            ["--diff", "evil.json"],
            ["--plan", "evil.json", "--json"],
        ):
            look(capfd, ["align", "sound.pt", "sound.pt", *shape, *way])
        look(
            capfd,
            ["distill", "sound.pt", "sound.pt", *data, "--plan", "evil.json", "--epochs", "1", "-o", f"d{len(kept)}"],
        )
    told = json.loads(Path("run/run.json").read_text())
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    Path("run/plan.json").write_text(Path("evil.json").read_text())
    Path("run/metrics.jsonl").write_text(
        "\n".join(json.dumps(poisoned(json.loads(line), ("kind",))) for line in lines) + "\n"
    )
    for kept in ((), ("about",), ("status",), ("model",), ("model", "seal", "schema_version")):
        Path("run/run.json").write_text(json.dumps(poisoned(told, kept)))
        for command in (["evaluate", "run", *data], ["inspect", "run"], ["export", "run", "-o", "n.onnx", *data]):
            look(capfd, command)
        assert look(capfd, ["report", "run", "-o", "page.html", "--svg", "page.svg"]) == 0
        for page in ("page.html", "page.svg"):
            text = Path(page).read_text(encoding="utf-8")
            assert [sign for sign in OBEYED if sign in text and sign != "\u2028"] == [], page  # there it is a character
    look(capfd, ["train", "sound.pt", *data, "--epochs", "2", "-o", "run", "--resume"])
    for spec in (
        NASTY,
        f"{NASTY}.pt",
        f"torchvision:{NASTY}",
        f"timm:{NASTY}",
        f"torchvision:resnet18?{NASTY}=1",
        f"{NASTY}.py:make",
    ):
        assert look(capfd, ["inspect", spec]) == 2
        assert look(capfd, ["evaluate", "sound.pt", "--data", f"imagefolder:{spec}"]) == 2
