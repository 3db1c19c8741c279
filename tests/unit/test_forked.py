"""Programs that are forked end, print and die as those that are started: otherwise the tests that use them could not fail."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest


def run(commands: Path, tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "program.py").write_text(code)
    return subprocess.run(
        [commands / "python", "program.py", *arguments], cwd=tmp_path, env={"COLOUR": "red"}, capture_output=True, text=True, check=False
    )  # fmt: skip


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("1 / 0", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
    ],
)
def test_the_exit_code_is_the_programs(commands, tmp_path, code, ends):
    assert run(commands, tmp_path, code).returncode == ends


def test_arguments_folder_environment_and_streams_are_the_commands(commands, tmp_path):
    code = (
        "import os, sys; print(sys.argv, os.getcwd(), os.environ['COLOUR'], 'HOME' in os.environ)\n"
        "print('said', file=sys.stderr); raise ValueError('x')"
    )
    done = run(commands, tmp_path, code, "a b", "c")
    assert done.stdout == f"['program.py', 'a b', 'c'] {tmp_path} red False\n"
    assert done.stderr.startswith("said\n") and done.stderr.endswith("ValueError: x\n")


def test_a_program_whose_command_is_killed_ends(commands, tmp_path):
    (tmp_path / "program.py").write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)")
    with subprocess.Popen([commands / "python", "program.py"], cwd=tmp_path) as command:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        command.kill()
    number = int((tmp_path / "pid").read_text())
    ends = time.monotonic() + 60
    while os.path.exists(f"/proc/{number}") and time.monotonic() < ends:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{number}")
