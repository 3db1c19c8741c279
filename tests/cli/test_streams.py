"""Standard output and error that are closed or full: no work is lost, and it is not called our fault."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import indistill_fx as ifx

MODEL = "indistill_fx.demo:DigitsStudent"
PROGRAM = f"{sys.executable} -m indistill_fx"


def code(command: str, folder: Path) -> int:
    """Of a command in a shell."""
    path = str(Path(ifx.__file__).parents[1])
    return subprocess.run(
        ["sh", "-c", command], cwd=folder, env={"PYTHONPATH": path, "HOME": str(folder)}, check=False
    ).returncode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_standard_error_that_is_full_or_closed_changes_no_answer(tmp_path: Path) -> None:
    evaluate = f"{PROGRAM} evaluate {MODEL} --data digits --limit 24 --json"
    assert code(f"{evaluate} > plain 2>/dev/null", tmp_path) == 0
    for where in ("2>/dev/full", "2>&-"):
        assert code(f"{evaluate} > told {where}", tmp_path) == 0
        assert (tmp_path / "told").read_text() == (tmp_path / "plain").read_text()
    assert code(f"{PROGRAM} inspect absent.pt 2>/dev/full", tmp_path) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_standard_output_that_is_full_is_said(tmp_path: Path) -> None:
    assert code(f"{PROGRAM} inspect {MODEL} --input 1x8x8 >/dev/full 2> said", tmp_path) == 2
    said = (tmp_path / "said").read_text()
    assert "no space left" in said and "our fault" not in said


def test_streams_that_are_closed_change_no_answer(tmp_path: Path) -> None:
    """Without a standard output it was our fault; without both, files of the run got their numbers."""
    inspect = f"{PROGRAM} inspect {MODEL} --input 1x8x8"
    assert code(f"{inspect} >&- 2> said", tmp_path) == 0 and (tmp_path / "said").read_text() == ""
    train = f"{PROGRAM} train {MODEL} --data digits --limit 24 --epochs 1 -o run"
    assert code(f"{train} <&- >&- 2>&-", tmp_path) == 0
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_text_that_the_locale_reads_otherwise_is_not_called_no_text(tmp_path: Path) -> None:
    """It was said not to be UTF-8."""
    settings = "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0"
    assert code(f"{settings} {PROGRAM} inspect mödel.pt 2> said", tmp_path) == 2
    said = (tmp_path / "said").read_text()
    assert "is in UTF-8, but Python reads arguments and file names in ascii. Set PYTHONUTF8=1" in " ".join(said.split())


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_standard_output_without_our_arrows_shows_their_numbers(tmp_path: Path, encoding: str) -> None:
    """As in LC_ALL=C, and in pipes on Windows."""
    align = f"PYTHONIOENCODING={encoding} {PROGRAM} align {MODEL} {MODEL} --input 1x8x8 -o plan.json"
    assert code(f"{align} > told 2> said", tmp_path) == 0, (tmp_path / "said").read_text()
    assert "\\u2192" in (tmp_path / "told").read_text(encoding=encoding)
