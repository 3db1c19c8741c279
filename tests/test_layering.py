"""Imports point one way: errors → data types → passes → stage, train, export → cli. Read from the source, function-level imports too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "indistill_fx"
LAYERS = [
    {"errors", "result", "bounded", "printable"},
    {"attention", "ops", "untouched", "usercode"},
    {"graphs", "traced", "curriculum"},
    {"plan", "losses"},
    {"passes"},
    {"pipeline"},
    {"*"},  # stage, train, evaluate, export, data, sources, …
    {"cli", "__main__"},
]


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]


def layer(module: str) -> int:
    parts = module.split(".")[1:] or ["*"]
    name = parts[-1] if parts[0] == "passes" and parts[-1] == "pipeline" else parts[0]
    return next((k for k, names in enumerate(LAYERS) if name in names), LAYERS.index({"*"}))


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("indistill_fx"):
            found.add(str(node.module))
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("indistill_fx"))
    return found


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", [p for p in modules() if p != PACKAGE / "__init__.py"], ids=name_of)
def test_imports_point_one_way(path):
    own = name_of(path)
    for target in imports(path):
        assert layer(target) <= layer(own), f"{own} imports {target}, which stands above it"


def test_the_check_sees_a_wrong_import(tmp_path):
    assert (
        layer("indistill_fx.cli.align")
        > layer("indistill_fx.stage")
        > layer("indistill_fx.passes.narrow")
        > layer("indistill_fx.errors")
    )
    bad = tmp_path / "bad.py"
    bad.write_text("def late():\n    from indistill_fx.cli import app\n")
    assert imports(bad) == {"indistill_fx.cli"}


def test_files_stay_short():
    long = {
        name_of(path): lines
        for path in modules()
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert long == {}
