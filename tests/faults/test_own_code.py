"""Code of the user's own that changes the working directory, or that fails: nothing lands elsewhere, and the error names its line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import indistill_fx as ifx
from indistill_fx.cli import run as run_cli
from indistill_fx.demo import DigitsStudent

DATA = """
import os, torch
from torch.utils.data import DataLoader, TensorDataset
def make_loaders(batch_size):
    os.chdir("elsewhere")
    data = TensorDataset(torch.randn(32, 1, 8, 8), torch.arange(32) % 10)
    return DataLoader(data, batch_size=16), DataLoader(data, batch_size=16)
"""
MODELS = """
import os
from indistill_fx.demo import DigitsStudent
def make():
    os.chdir("elsewhere")
    return DigitsStudent()
"""
FAILING = """
import torch
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 32
    def __getitem__(self, number):
        return torch.load(f"{number}.pt")
def make_loaders():
    return [torch.utils.data.DataLoader(Rows())] * 2
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name, text in (("data.py", DATA), ("models.py", MODELS), ("failing.py", FAILING)):
        (tmp_path / name).write_text(text)
    return tmp_path


def test_all_paths_of_a_command_are_taken_from_where_it_began(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--data", "data.py:make_loaders", "--epochs", "1"]
    assert run_cli(["train", "models.py:make", *short, "-o", "runs/teacher"]) == 0
    told = capsys.readouterr().err
    for whose in ("models.py:make", "data.py:make_loaders"):
        assert f"{whose} changed the working directory to {home / 'elsewhere'}; it is {home} again" in told
    assert json.loads((home / "runs/teacher/run.json").read_text())["about"]["model"] == f"{home}/models.py:make"
    assert run_cli(["distill", "runs/teacher", "models.py:make", *short, "-o", "runs/student"]) == 0
    assert run_cli(["export", "runs/student", "-o", "student.onnx", *short[:2]]) == 0
    assert (home / "student.onnx").exists() and (home / "runs/student/export.json").exists()
    assert not list((home / "elsewhere").iterdir())


class Wandering(Dataset[tuple[Tensor, Tensor]]):
    """Changes the working directory whenever it is read."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        os.makedirs("deeper", exist_ok=True)
        os.chdir("deeper" if number == 7 else ".")
        return torch.full((1, 8, 8), float(number)), torch.tensor(number % 10)


@pytest.mark.parametrize("way", ["train", "chain", "compare", "compress"])
def test_a_run_directory_stays_where_it_was_named(home: Path, way: str) -> None:
    loader = DataLoader(Wandering(), batch_size=16)
    teacher, short = DigitsStudent(widths=(8, 8, 8)).eval(), {"epochs": 1, "progress": False}
    if way == "train":
        ifx.train(DigitsStudent(), loader, run_dir="run", **short)
    elif way == "chain":
        ifx.distill_chain([teacher, DigitsStudent(), DigitsStudent()], loader, run_dir="run", **short)
    elif way == "compare":
        ifx.compare(
            teacher,
            DigitsStudent(),
            loader,
            run_dir="run",
            epochs=2,
            curriculum=ifx.Curriculum(lengths=1, layers=["blocks.0"]),
            progress=False,
        )
    else:
        ifx.compress(
            teacher, loader, run_dir="run", macs=0.5, samples=32, curriculum=ifx.Curriculum(lengths=[]), **short
        )
    assert Path.cwd() != home
    assert not [found for found in (home / "deeper").rglob("*") if found.is_file()]
    assert (home / "run").is_dir()


def test_the_error_of_code_of_the_users_own_names_its_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["train", "models.py:make", "--data", "failing.py:make_loaders", "-o", "run"]) == 2
    told = capsys.readouterr().err
    assert f"your own code failed at {home}/failing.py:6: FileNotFoundError: " in told
    assert "our fault" not in told
