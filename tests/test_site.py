"""The documentation: the site builds without a warning, and the Python in its guides runs as it stands."""

from __future__ import annotations

import dataclasses
import inspect
import io
import os
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


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_a_guide_runs_as_it_stands(guide, tmp_path, commands):
    """Its blocks of Python and of sh, in order and in one folder beside examples/; `# name.py` says where Python is kept."""
    text = guide.read_text(encoding="utf-8")
    for package in sorted(set(re.findall(r"^(?:from|import) (lightning|transformers)", text, flags=re.M))):
        pytest.importorskip(package, reason=f"needs {package}, which `pip install -e '.[dev]'` brings")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    given = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": f"{commands}:{os.environ['PATH']}"}
    given |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", text, flags=re.S)
    assert blocks
    for number, (kind, block) in enumerate(blocks):
        name = re.match(r"# (\w+\.py)\n", block)
        file = tmp_path / (name[1] if name else f"block-{number}")
        file.write_text(block, encoding="utf-8")
        command = [str(commands / "python"), str(file)] if kind == "python" else ["bash", "-e", str(file)]
        done = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize(("name", "outputs"), [("how_it_works", 8), ("glossary", 11)])
def test_a_page_prints_what_it_says(name, outputs, tmp_path, monkeypatch):
    """Each block of text is what the Python above it prints."""
    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    home: dict[str, object] = {}
    compared = 0
    for code, text in re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, flags=re.S):
        with redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, f"{name}.md", "exec"), home)
        assert printed.getvalue() == text
        compared += bool(text)
    assert compared == outputs


def test_the_glossary_defines_fifteen_words():
    words = re.findall(r"^\*\*(.+?)\*\*:", (ROOT / "docs/glossary.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(words) == len(set(words)) == 15


REFERENCE = ROOT / "docs/reference/python.md"
SETTINGS = re.compile(
    r"(?<=<!-- settings: made by `python -m tests.test_site` -->\n)(.*?)(?=<!-- settings: end -->)", re.S
)


def settings_table() -> str:
    """The options of training, from the place where each is declared."""
    from indistill_fx.training.options.settings import Settings

    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(Settings):
        about = field.metadata["about"]
        flag = f" On the command line `--{about.flag}`." if about.flag else ""
        flag += f" On the command line also `--{about.alias}`." if about.alias else ""
        text = about.help.replace("[default: ", "Default: ").replace("]", ".").replace("|", "\\|")
        lines.append(f"| `{field.name}` | `{field.default!r}` | {text}{flag} |")
    return "\n".join(lines) + "\n"


LOSSES = ROOT / "docs/reference/losses.md"


def losses_page() -> str:
    """Every loss by name, with its class's docstring below."""
    from indistill_fx.losses.registry import MAIN_LOSSES, WARMUP_LOSSES

    reads = {"logits": "logits", "embedding": "penultimate vectors", "features": "features of pairs"}
    lines = ["# Losses", "", "<!-- made by `python -m tests.test_site` -->", ""]
    lines += [
        "Main losses, by their name in `--main` (`main=`). The loss is `weight` × its own term + `weight_labels` × the",
        "",
    ]
    lines[-1:] = [
        "task's supervised loss; the options are given by `--main-option`. [Comparing losses](../guides/compare_losses.md)"
    ]
    lines += ["shows how to compare them.", "", "| loss | compares | defaults of its options |", "|---|---|---|"]
    for name, kind in MAIN_LOSSES.items():
        options = inspect.signature(kind.__init__).parameters.values()
        given = [
            f"`{own.name}={own.default!r}`"
            for own in options
            if own.kind is own.KEYWORD_ONLY and own.default is not own.empty
        ]
        what = ", ".join(reads[need] for need in sorted(kind.needs)) or "labels only"
        lines.append(f"| [`{name}`](#{kind.__module__}.{kind.__name__}) | {what} | {', '.join(given)} |")
    lines += ["", "## Main losses", ""]
    lines += [
        f"::: {kind.__module__}.{kind.__name__}\n    options: {{ members: false }}\n" for kind in MAIN_LOSSES.values()
    ]
    lines += [
        "## Warm-up losses",
        "",
        f"By their name in `--warmup-loss`: {', '.join(f'`{name}`' for name in WARMUP_LOSSES)}, in this order.",
        "",
    ]
    lines += [
        f"::: {kind.__module__}.{kind.__name__}\n    options: {{ members: false }}\n" for kind in WARMUP_LOSSES.values()
    ]
    return "\n".join(lines).rstrip() + "\n"


def test_every_loss_is_in_the_reference():
    """After a change that is meant: `python -m tests.test_site`."""
    assert LOSSES.read_text(encoding="utf-8") == losses_page()


def test_every_public_name_is_in_the_reference():
    import indistill_fx as ifx

    named, returned = REFERENCE.read_text(encoding="utf-8").split("## What functions return")
    returned, errors = returned.split("## Passes and errors")
    found = [re.findall(r"::: indistill_fx\.[\w.]*\.(\w+)$", part, flags=re.M) for part in (named + errors, returned)]
    assert sorted(found[0]) == sorted(set(ifx.__all__) - {"__version__"})
    assert len(found[1]) == 16


def test_every_option_of_training_is_in_the_reference():
    """After a change that is meant: `python -m tests.test_site`."""
    assert SETTINGS.findall(REFERENCE.read_text(encoding="utf-8")) == [settings_table()]


if __name__ == "__main__":
    LOSSES.write_text(losses_page(), encoding="utf-8")
    REFERENCE.write_text(
        SETTINGS.sub(lambda _: settings_table(), REFERENCE.read_text(encoding="utf-8")), encoding="utf-8"
    )
