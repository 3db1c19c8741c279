"""Named pipes, sockets, directories and devices where a file is due: none is waited for, none is overwritten, all are named."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import run
from indistill_fx.errors import ConfigError
from indistill_fx.plan import AlignmentPlan
from indistill_fx.runs.checkpoint import load_checkpoint
from indistill_fx.system.files import write
from indistill_fx.system.user_code import load_object


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # the names of sockets are short


KINDS: dict[str, Callable[[Path], None]] = {
    "a named pipe": lambda path: os.mkfifo(path),
    "a socket": bound,
    "a device": lambda path: path.symlink_to(os.devnull),
    "a directory": lambda path: path.mkdir(),
}
READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "models.py": (lambda path: load_object(f"{path}:make"), "'{path}' is {kind}, not a file."),
    "m.pt": (ifx.load, "`{path}` is {kind}, not a "),
    "m.onnx": (ifx.load, "`{path}` is {kind}, not a "),
    "w.safetensors": (lambda path: ifx.load(f"torchvision:resnet18@{path}"), "`{path}` is {kind}, not a "),
    "plan.json": (AlignmentPlan.load, "The plan {path} cannot be read: it is {kind}, not a file."),
    "last.safetensors": (load_checkpoint, "{path} is not a checkpoint of a run: it is {kind}, not a file."),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_named(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was said not to be there, or the system's words for it were printed with their number."""
    monkeypatch.chdir(tmp_path)
    KINDS[kind](path := tmp_path / name)
    read, said = READERS[name]
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(said.format(path=path, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_not_overwritten(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipes and sockets were replaced by the file; what reads the pipe waited for ever."""
    monkeypatch.chdir(tmp_path)
    KINDS[kind](path := tmp_path / "page.onnx")
    before = os.lstat(path)
    for asked in (
        lambda: write(path, "x"),
        lambda: ifx.export_onnx(nn.Linear(3, 2), path, torch.zeros(2, 3)),
        lambda: AlignmentPlan.model_construct(pairs=()).save(path),
    ):
        with pytest.raises(ConfigError, match=rf"^Cannot write `{path}`: it is {kind}\. Name a file\.$"):
            asked()
    assert os.lstat(path).st_ino == before.st_ino and os.listdir(tmp_path) == ["page.onnx"]


def test_a_file_is_no_folder_of_images(tmp_path: Path) -> None:
    (tmp_path / "images").touch()
    with pytest.raises(ConfigError, match=r"images' is a file, not a folder\."):
        ifx.open_data(f"imagefolder:{tmp_path / 'images'}")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe' is a named pipe, not a folder\."):
        ifx.open_data(f"imagefolder:{tmp_path / 'pipe'}")


def test_code_that_may_not_be_read_has_no_line_to_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of ours was named, with the advice to fix it."""
    from indistill_fx.system import user_code

    (tmp_path / "models.py").write_text("")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "models.py")

    monkeypatch.setattr(user_code, "open", refused, raising=False)
    with pytest.raises(ConfigError, match=r"models.py' cannot be read: Permission denied\. Make it readable"):
        ifx.load(f"{tmp_path / 'models.py'}:make")


def test_without_a_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that is run by a user of no name: CIFAR-10 was our bug, and a run of one's own was said to be another's."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(
        ConfigError, match=r"^CIFAR10 is looked for in the home folder, but there is none.*cifar10:DIR\.$"
    ):
        ifx.open_data("cifar10")
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODEL)
    train = "train models.py:make --data digits --limit 20 --epochs 1 --device cpu -o run"
    assert run(train.split()) == 0
    assert run(["evaluate", "run", "--data", "digits"]) == 2
    said = capsys.readouterr().err
    assert "nothing proves that you began that run (no proof can be kept without a home folder" in said
    assert "models.py:make@run/student.safetensors" in said
    assert run("evaluate models.py:make@run/student.safetensors --data digits".split()) == 0


MODEL = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def backbone():
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())

def features():
    return nn.Sequential(backbone(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def test_backbones_are_told_from_classifiers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their features were taken for logits, and the advice to measure retrieval led to an error."""
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODEL)
    assert run(["evaluate", "models.py:backbone", "--data", "digits"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "The labels are one class a sample, but the outputs, of shape (256, 16, 8, 8), are features with positions."
        in said
    )
    assert run(["evaluate", "models.py:features", "--data", "digits"]) == 0
    said = " ".join("".join(capsys.readouterr()).split())
    assert (
        "The model has 16 outputs, but the data have only 10 classes" in said and "--task embedding --retrieval" in said
    )
    for name in ("features", "backbone"):
        assert run(["evaluate", f"models.py:{name}", "--data", "digits", "--task", "embedding", "--retrieval"]) == 0
        said = " ".join("".join(capsys.readouterr()).split())
        assert "map_cosine: " in said and "Task: embedding, as requested." in said and "accuracy" not in said
