"""A run that is killed, asked to stop, or meets another one: nothing that was saved is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.system.files import replace_file
from indistill_fx.system.files import write as write_file
from tests.faults.harness import STEPS, Victims, finishes_as_if_nothing_happened, run, steps_saved

# Where the kill falls: the draft half written, written and not synced, synced and not renamed, renamed.
MOMENTS = {
    "before the draft": ("save_file", True),
    "the draft is written": ("save_file", False),
    "before the rename": ("replace", True),
    "after the rename": ("replace", False),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_in_the_middle_of_saving(moment: str, tmp_path: Path, victims: Victims) -> None:
    place = tmp_path / "run"
    assert victims.run("killed_in_saving", place, *MOMENTS[moment]) == -signal.SIGKILL
    assert 1 <= steps_saved(place) < STEPS
    finishes_as_if_nothing_happened(place)


def test_kill_9_while_the_draft_is_half_written(tmp_path: Path, victims: Victims) -> None:
    place = tmp_path / "run"
    assert victims.run("killed_with_half_a_draft", place) == -signal.SIGKILL
    assert list(place.rglob("*.draft")) != []
    assert 1 <= steps_saved(place) < STEPS
    finishes_as_if_nothing_happened(place)


def test_kill_9_in_the_middle_of_a_line_of_metrics(tmp_path: Path, victims: Victims) -> None:
    place = tmp_path / "run"
    assert victims.run("killed_in_a_line", place) == -signal.SIGKILL
    assert (place / "metrics.jsonl").read_text() == '{"kind": "ep'
    finishes_as_if_nothing_happened(place)
    lines = (place / "metrics.jsonl").read_text().splitlines()
    assert [line.startswith('{"kind": "epoch"') for line in lines] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(("moment", "content"), [("writing", "old"), ("renaming", "new")])
def test_a_command_that_is_told_to_end_leaves_old_files_or_new_ones_and_no_draft(
    number: int, moment: str, content: str, tmp_path: Path, victims: Victims
) -> None:
    """SIGTERM and SIGHUP ended commands without a run on the spot; Ctrl-C left the first of two files new and the second old."""
    names = ["two.onnx", "two.onnx.data"]
    for name in names:
        (tmp_path / name).write_text("old")
    assert victims.run("ended_while_writing", tmp_path, int(number), moment) == 128 + number
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, content)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_under_way_and_stops(number: int, tmp_path: Path, victims: Victims) -> None:
    place = tmp_path / "run"
    assert victims.run("signalled", place, int(number)) == 40
    assert steps_saved(place) == 7
    finishes_as_if_nothing_happened(place)


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path, victims: Victims) -> None:
    place, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    child = victims.start("waiting", place, pipe)
    try:
        assert pipe.read_text() == "training"
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        for resume in (True, False):
            with pytest.raises(ConfigError, match="Another process is running in"):
                run(place, resume=resume)
        assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    finally:
        os.kill(child, signal.SIGKILL)
        assert victims.end(child) == -signal.SIGKILL
    finishes_as_if_nothing_happened(place)


KILLED = """
import os, signal, sys
from pathlib import Path
from indistill_fx.system.files import replace_file, staged

def write(draft):
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "file":
    replace_file(Path("plan.json"), write)
else:
    with staged(Path("student.onnx")) as draft:
        write(draft)
"""


@pytest.mark.parametrize(("how", "name"), [("file", "plan.json"), ("folder", "student.onnx")])
def test_what_a_killed_writer_leaves_is_gone_when_the_file_is_next_written(
    how: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(ifx.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", KILLED, how], cwd=tmp_path, env=environment, check=False)
    monkeypatch.chdir(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    write_file(name, "whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_draft_of_another_living_writer_stays(tmp_path: Path) -> None:
    def beside(draft: Path) -> None:
        draft.write_text("first")
        write_file(tmp_path / "plan.json", "second")
        replace_file(tmp_path / "plan.json", lambda other: other.write_text("third"))

    replace_file(tmp_path / "plan.json", beside)
    assert (tmp_path / "plan.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
