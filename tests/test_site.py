"""The documentation: the site builds without a warning, and the Python in its guides runs as it stands."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("guides/*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ifx" in (tmp_path / "site/reference/python/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_the_python_of_a_guide_runs(guide, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_how_it_works_prints_what_it_says():
    """Each block of text is what the Python above it prints."""
    page = (ROOT / "docs/how_it_works.md").read_text(encoding="utf-8")
    home: dict[str, object] = {}
    compared = 0
    for code, text in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, flags=re.S):
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "how_it_works.md", "exec"), home)
        assert printed.getvalue() == text
        compared += bool(text)
    assert compared == 8


def test_every_public_name_is_in_the_reference():
    import indistill_fx as ifx

    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"::: indistill_fx\.[\w.]*\.(\w+)$", page, flags=re.M))
    assert listed == set(ifx.__all__) - {"__version__"}
