"""Paths whose bytes are no UTF-8: refused before anything is written, and no hindrance to commands inside such a folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from indistill_fx.cli import run

NAME = b"d\xff\xe9"


@pytest.mark.parametrize(
    "command",
    [
        ("train", "indistill_fx.demo:DigitsStudent", "--data", "digits", "-o", "{}/run"),
        ("prune", "{}/net.pt", "--ratio", "0.5", "-o", "{}/"),
        ("evaluate", "{}", "--data", "imagefolder:{}"),
        ("check", "x{}.onnx", "--against", "{}"),
        ("report", "{}", "-o", "r{}.html"),
    ],
)
def test_refused_before_anything_is_written(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert run([argument.format(os.fsdecode(NAME)) for argument in command]) == 2
    said = capsys.readouterr().err
    assert "is not text in UTF-8" in said and "Rename the file or folder" in said and "\\udcff" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_inside_such_a_folder_relative_names_work(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), NAME)
    os.mkdir(folder)
    with open(os.path.join(folder, b"nets.py"), "w") as file:
        file.write("from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    script = """
import sys
from indistill_fx.cli import run
quick = ["--data", "digits", "--limit", "32"]
for command in (
    ["train", "nets.py:net", *quick, "--epochs", "1", "--device", "cpu", "-o", "run"],
    ["evaluate", "run", *quick],
    ["export", "run", "-o", "net.onnx"],
    ["evaluate", "net.onnx", *quick],
    ["report", "run", "-o", "run.html"],
    ["evaluate", "nothing.pt", *quick],
):
    code = run(command)
    if code != (2 if "nothing.pt" in command else 0):
        sys.exit(f"{command}: {code}")
"""
    for locale in ("C", "C.UTF-8"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=folder,
            env={**os.environ, "LC_ALL": locale, "PYTHONPATH": os.getcwd()},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"Traceback" not in done.stderr and b"our fault" not in done.stderr
        for name in os.listdir(folder):
            if name != b"nets.py":
                subprocess.run([b"rm", b"-r", os.path.join(folder, name)], check=True)
