"""Tables in the docs can be made again from the figures that are kept in benchmarks/results."""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("script", "kept", "page", "options"),
    [
        ("regimes", "regimes", "results", {"on": "digits"}),
        ("regimes", "regimes_cifar10", "results", {"on": "cifar10"}),
        ("why", "why", "why", {}),
    ],
)
def test_a_page_holds_the_table_of_what_is_kept(script, kept, page, options, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("sys.argv", ["table"])
    table = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["table"]
    copied, source = tmp_path / "page.md", ROOT / "docs" / f"{page}.md"
    copied.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    file = str(ROOT / "benchmarks" / "results" / f"{kept}.json")
    again = tmp_path / "again.json"
    table(argparse.Namespace(out=[file], json=str(again), into=str(copied), svg=None, **options))
    assert copied.read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    rows = json.loads(again.read_text())["rows"]
    # what is in a folder and in a file counts once
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows[:3]))
    table(argparse.Namespace(out=[file, str(folder)], json=str(again), into=None, svg=None, **options))
    assert json.loads(again.read_text())["rows"] == rows
