"""Runs that were moved or renamed: every command reads them where they are now."""

from __future__ import annotations

import json
import shutil

import pytest

NETS = """
import torch
from torch import nn

def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1)
    )

X = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))

def data():
    return [(X, X.mean((2, 3)))], [(X, X.mean((2, 3)))]
"""
QUICK = ("--data", "nets.py:data", "--epochs", "1", "--device", "cpu")


@pytest.fixture
def told(tmp_path, printed):
    (tmp_path / "nets.py").write_text(NETS)

    def said(*arguments, code=0):
        return " ".join(printed(*arguments, code=code).split())

    half = ("--macs", "0.5", "--samples", "8", "--warmup", "1", "--qat", "1", "--no-export")
    said("compress", "nets.py:net", *half, *QUICK, "-o", "half")
    return said


def test_a_run_of_compress_moves_with_its_student(told, tmp_path):
    before = told("evaluate", "half", "--data", "nets.py:data").partition(" on nets.py:data: ")[2].partition("Task:")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "half").rename(tmp_path / "runs/small")
    assert (
        told("evaluate", "runs/small", "--data", "nets.py:data")
        .partition(" on nets.py:data: ")[2]
        .partition("Task:")[0]
        == before
    )
    told("evaluate", "runs/small/int8", "--data", "nets.py:data")
    told("export", "runs/small", "-o", "small.onnx")
    told("check", "small.onnx", "--against", "runs/small")
    told("distill", "runs/small", "runs/small", "--no-warmup", *QUICK, "-o", "again")
    kept = json.loads((tmp_path / "again/run.json").read_text())["about"]["model"]
    assert kept == f"{tmp_path}/runs/small/student.py:Student"
    told("evaluate", "again", "--data", "nets.py:data")  # knows the student where it was when this run began


@pytest.mark.parametrize("line", ["import helpers", "import math, helpers", "from helpers import net"])
def test_code_that_reads_what_lies_beside_it_does_not_move(told, tmp_path, line):
    """What lies there is not signed: with a copy of a run whose code is the user's own, it would be run."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/student.py").write_text(f"{NETS}\ntry:\n    {line}\nexcept ImportError:\n    pass\n")
    told("train", "mine/student.py:net", *QUICK, "-o", "run")
    (tmp_path / "mine/student.py").rename(tmp_path / "run/student.py")
    (tmp_path / "run/helpers.py").write_text("raise SystemExit('was run')\n")
    said = told("evaluate", "run", "--data", "nets.py:data", code=2)
    assert "so it was not run" in said and "was run" not in said.replace("not run", "")


def test_code_that_is_not_the_one_that_was_signed_is_not_run(told, tmp_path):
    (tmp_path / "half").rename(tmp_path / "other")
    code = tmp_path / "other/student.py"
    code.write_text(code.read_text() + "\nraise SystemExit('was run')\n")
    said = told("evaluate", "other", "--data", "nets.py:data", code=2)
    assert "and was moved since that run began, or another user or machine began it, so it was not run" in said
    assert "other/student.py:Student@other/student.safetensors" in said and "was run" not in said.replace("not run", "")
    shutil.copytree(tmp_path / "other", tmp_path / "half")  # where it was, but changed
    said = told("evaluate", "half", "--data", "nets.py:data", code=2)
    assert "has changed since that run began" in said
