"""What the machine refuses: space, devices, open files, memory. Nothing is half written, and it is not called our fault."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.cli import app, run
from indistill_fx.compression import compress as compression
from indistill_fx.compression.write_source import StudentSource, source_of
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsStudent
from indistill_fx.deploy.save_pt2 import save_program
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.plan import AlignmentPlan, ModelStamp
from indistill_fx.system import files
from indistill_fx.system.shortage import is_out_of_memory
from indistill_fx.system.tensor_files import save_tensors
from tests.faults.harness import network


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_weights_can_be_read_by_whom_the_umask_lets_read(
    mask: int, mode: int, tmp_path: Path, umask: Callable[[int], int]
) -> None:
    umask(mask)
    save_tensors(tmp_path / "student.safetensors", {"x": torch.ones(2)})
    files.save_json(tmp_path / "run.json", {})
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {mode}


def test_what_a_library_leaves_beside_its_draft_goes_with_the_draft(tmp_path: Path) -> None:
    """As safetensors does when it is killed: it writes `.tmpXXXXXX` beside the file it is given."""
    (tmp_path / "last.safetensors").write_text("before")

    def torn(draft: Path) -> None:
        draft.with_name(".tmpa1B2c3").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainError, match=r"last\.safetensors cannot be written: No space left on device\."):
        files.replace_file(tmp_path / "last.safetensors", torn)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"last.safetensors": "before"}


def plan() -> AlignmentPlan:
    stamp = ModelStamp(name="A", fingerprint="0")
    return AlignmentPlan(teacher=stamp, student=stamp, pairs=(), unmatched=())


WRITERS: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: plan().save(path),
    "page": lambda path: files.write(path, "x"),
    "program": lambda path: save_program(network().eval(), (torch.zeros(2, 1, 6, 6),), path),
    "onnx": lambda path: ifx.export_onnx(network(), path, torch.zeros(2, 1, 6, 6)),
    "asked beforehand": files.try_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_device_is_not_replaced_by_a_file(name: str, tmp_path: Path) -> None:
    """Root may: `-o /dev/null` would leave a machine without one."""
    target = tmp_path / "null"
    target.symlink_to(os.devnull)
    with pytest.raises(ConfigError, match=r"^Cannot write `.*null`: it is a device\. Name a file\.$"):
        WRITERS[name](target)
    assert target.is_symlink() and os.listdir(tmp_path) == ["null"]


@pytest.fixture
def source() -> StudentSource:
    return source_of(trace(network().eval(), torch.zeros(2, 1, 6, 6), role="teacher"))


def test_the_files_of_a_pruned_network_are_written_all_or_none(
    source: StudentSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and code without student.json would be measured on images that are normalised in another way."""
    write_bytes = Path.write_bytes

    def full(self: Path, *args: Any, **options: Any) -> int:
        if self.name == "student.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(self, *args, **options)

    for before in ({}, {"plan.json": "old", "student.json": "old"}):
        if before:
            source.save(tmp_path, before)
        kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        with monkeypatch.context() as patched:
            patched.setattr(Path, "write_bytes", full)
            with pytest.raises(ConfigError, match="No space left on device"):
                source.save(tmp_path, {"plan.json": "new", "student.json": "new"})
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders are there, and nothing can be written in them."""

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)


@pytest.mark.usefixtures("read_only")
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unrun(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pytest.fail("it ran")

    data = open_data("digits", limit=24, augment=False)
    images, x = data.train, torch.zeros(2, 1, 8, 8)
    monkeypatch.setattr(compression, "make_student", lambda *_, **__: pytest.fail("it was pruned"))
    for asked in (
        lambda: ifx.save_outputs(Unrun(), images, tmp_path),
        lambda: ifx.compress(DigitsStudent(), images, macs=0.5, run_dir=tmp_path, example_inputs=x),
    ):
        with pytest.raises(
            ConfigError, match=r"^Nothing can be written in `.*`: .*Read-only file system.*Free some space"
        ):
            asked()
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize(
    "command", ["align {0} {0} -o plan.json", "align {0} {0} --png plan.png", "prune {0} --ratio 0.5 -o small.pt2"]
)
def test_commands_refuse_a_file_that_cannot_be_written_before_they_load_a_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(command.format("absent.pt").split()) == 2
    assert "Nothing can be written in `.`" in capsys.readouterr().err


def test_memory_that_is_full_is_told_from_other_errors() -> None:
    for asked in (lambda: torch.empty(1 << 55), lambda: np.empty(1 << 55)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            asked()
        assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("full"))
    with pytest.raises(RuntimeError) as other:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(other.value)


HUNGRY = """
import torch
class Hungry(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)
    def forward(self, x):
        x = self.layer(x.flatten(1))
        return x + torch.empty(1 << 55)[:10] if len(x) > 2 and self.training is MODE else x
"""


@pytest.mark.parametrize(
    ("mode", "command", "said"),
    [
        ("False", "evaluate models.py:Hungry --data digits --limit 24", "There is not enough memory. Take smaller batches (--batch-size)"),
        ("True", "train models.py:Hungry --data digits --limit 24 -o run", "has no memory left"),
    ],
)  # fmt: skip
def test_memory_of_the_machine_that_is_full_is_said(
    mode: str,
    command: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(HUNGRY.replace("MODE", mode))
    assert run(command.split()) == 2
    found = capsys.readouterr().err
    assert said in found and "our fault" not in found


REFUSED: dict[str, tuple[Exception, str]] = {
    "open files": (
        OSError(errno.EMFILE, "Too many open files", "x.py"),
        "Error: The system refused: too many open files: x.py. Let a process open more files (ulimit -n 4096), and "
        "run the command again.\n",
    ),
    "permission": (
        PermissionError(errno.EACCES, "Permission denied", "x"),
        "Error: The system refused: permission denied: x. Make the place readable and writable, or name another, and "
        "run the command again.\n",
    ),
    "memory": (
        MemoryError(),
        "Error: There is not enough memory. Take smaller batches (--batch-size), smaller images (--size) or fewer samples (--limit), and "
        "run the command again.\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_machine_refuses_is_not_called_our_fault(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error, said = REFUSED[name]

    def refused(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(app, "main", refused)
    assert run(["demo"]) == 2
    assert capsys.readouterr().err == said


def test_a_current_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run(["demo"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "Error: The system refused: no such file or directory. Go to a folder that exists, and run the command again.\n"
    )
