"""For tests of commands: one that is run in an empty folder, and what it prints."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from indistill_fx.cli import run


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """What a command prints, on both streams; it must end with `code`."""
    monkeypatch.chdir(tmp_path)

    def printed(*arguments: str, code: int = 0) -> str:
        assert run(list(arguments)) == code
        found = capsys.readouterr()
        return found.out + found.err

    return printed
