from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest
from filelock import FileLock, Timeout

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.runs.directory import RunDirectory


def test_a_directory_serves_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("indistill_fx.runs.directory._PATIENCE", 0.1)
    with (
        RunDirectory(tmp_path / "run", resume=True),
        pytest.raises(ConfigError, match="Another process"),
        RunDirectory(tmp_path / "run", resume=True),
    ):
        pass
    with RunDirectory(tmp_path / "run", resume=True):
        pass


def test_the_lock_dies_with_its_process(tmp_path):
    code = f"""
import os
from indistill_fx.runs.directory import RunDirectory
with RunDirectory({str(tmp_path / "run")!r}, resume=True):
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    with RunDirectory(tmp_path / "run", resume=True):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="finds the lock's descriptor in /proc")
def test_a_lock_that_outlives_its_killed_process_for_a_moment_is_waited_for(tmp_path, monkeypatch):
    # as when the process is killed between the fork and the exec of a program it starts
    code = f"""
import os, subprocess
from indistill_fx.runs.directory import RunDirectory
with RunDirectory({str(tmp_path / "run")!r}, resume=True):
    held = [fd for fd in range(100) if os.path.realpath(f"/proc/self/fd/{{fd}}").endswith(".lock")]
    subprocess.Popen(["cat"], pass_fds=held, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), 9)
"""
    reads, writes = os.pipe()  # the program lives until this end of its input is closed
    try:
        assert subprocess.run([sys.executable, "-c", code], stdin=reads, check=False).returncode == -9
        with pytest.raises(Timeout):
            FileLock(tmp_path / "run" / ".lock").acquire(timeout=0)
        monkeypatch.setattr("indistill_fx.runs.directory._PATIENCE", 60)
        threading.Timer(0.3, os.close, [writes]).start()
        with RunDirectory(tmp_path / "run", resume=True):
            pass
    finally:
        os.close(reads)


def test_a_second_run_in_the_same_directory_must_say_resume(tmp_path):
    with RunDirectory(tmp_path / "run", resume=False) as directory:
        directory.begin(resumed=False)
    with (
        pytest.raises(ConfigError, match=r"already holds a run.*--resume"),
        RunDirectory(tmp_path / "run", resume=False),
    ):
        pass
    with RunDirectory(tmp_path / "run", resume=True):
        pass


def test_a_path_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used for a run"), RunDirectory(tmp_path / "file", resume=False):
        pass


def test_run_json_tells_how_the_run_ended(tmp_path):
    def story():
        return json.loads((tmp_path / "run" / "run.json").read_text())

    with pytest.raises(TrainError), RunDirectory(tmp_path / "run", resume=False) as directory:
        directory.begin(resumed=False, settings={"seed": 3})
        assert story()["status"] == "running"
        raise TrainError("the loss is nan")
    assert story()["status"] == "failed" and "nan" in story()["error"]
    assert story()["settings"] == {"seed": 3} and story()["command"] == sys.argv
    started = story()["started"]
    with pytest.raises(KeyboardInterrupt), RunDirectory(tmp_path / "run", resume=True) as directory:
        directory.begin(resumed=True)
        raise KeyboardInterrupt
    assert story()["status"] == "stopped" and story()["resumed"] == 1 and story()["started"] == started
    with RunDirectory(tmp_path / "run", resume=True) as directory:
        directory.begin(resumed=True)
        directory.report(status="done")
    assert story()["status"] == "done" and "error" not in story() and story()["settings"] == {"seed": 3}


def test_metrics_behind_the_checkpoint_are_dropped(tmp_path):
    with RunDirectory(tmp_path / "run", resume=False) as directory:
        for epochs, step in [(0, 5), (0, 10), (1, 10), (1, 15)]:
            directory.log({"kind": "step", "epochs": epochs, "step": step, "loss": 0.5})
        path = directory.path / "metrics.jsonl"
        path.write_text(path.read_text() + '{"kind": "st')
        directory.rewind(0, 10)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [5, 10]
        assert json.loads(path.read_text().splitlines()[-1])["epochs"] == 0


def test_processes_that_do_not_write_leave_nothing(tmp_path):
    with RunDirectory(tmp_path / "run", resume=False, writes=False) as directory:
        directory.begin(resumed=False)
        directory.log({"kind": "step", "epochs": 0, "step": 1})
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_gets_the_numbers(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunDirectory(tmp_path / "run", resume=False, trackers=("tensorboard",)) as directory:
        directory.log({"kind": "epoch", "epochs": 1, "step": 7, "loss": 0.25, "stage": "main"})
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    [scalar] = found.Scalars("epoch/loss")
    assert (scalar.step, scalar.value) == (7, 0.25)
