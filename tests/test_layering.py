"""The shape of the house: imports point one way, nothing runs in a circle, and rooms, files and functions stay small.

Read from the source, function-level imports too. A room is a package, or a module at the package's root; `passes.contract` is a room of its
own, because every pass stands above it and the pipeline above every pass.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

PACKAGE = Path(__file__).parent.parent / "indistill_fx"
FLOORS = [
    "errors version",
    "system",
    "graph batch target",
    "traced curriculum loading.onnx",
    "plan loading data passes.contract",
    "passes.capture passes.structure passes.channels passes.lowering losses runs",
    "passes.pairing passes.pruning passes.extract",
    "passes",
    "stages evaluation report training.options",
    "deploy",
    "training.parallel",
    "training.step",
    "training",
    "compression",
    "demo",
    "cli",
    "__main__",
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {name_of(path) for path in PACKAGE.rglob("__init__.py")}


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    if module not in PACKAGES and len(parts) > 1 and module != "indistill_fx.passes.contract":
        parts = parts[:-1]
    return ".".join(parts)


def imports(source: str) -> set[str]:
    """The modules of ours that a source imports; what is imported from a package counts as the module where there is one."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("indistill_fx"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name.startswith("indistill_fx"))
    return found


def wrong_imports(module: str, source: str) -> Iterator[str]:
    own = room_of(module)
    for target in sorted(imports(source)):
        room = room_of(target)
        if target == "indistill_fx":
            yield f"{module} imports the public face"
        elif room != own and FLOOR_OF[room] >= FLOOR_OF[own]:
            yield f"{module} imports {target}, which does not stand below it"


def circles(sources: Mapping[str, str]) -> list[set[str]]:
    graph = nx.DiGraph([(module, target) for module, source in sources.items() for target in imports(source)])
    return [part for part in nx.strongly_connected_components(graph) if len(part) > 1]


MODULES = [module for module in SOURCES if module != "indistill_fx"]  # the public face names everything


def test_every_room_has_its_floor():
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert list(wrong_imports(module, SOURCES[module])) == []


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_wrong_import_is_seen_on_every_floor(floor):
    """Planted: from the floor above, from a room beside, and from the public face."""
    for room in FLOORS[floor].split():
        inside = f"indistill_fx.{room}" if f"indistill_fx.{room}" not in PACKAGES else f"indistill_fx.{room}.planted"
        above = FLOORS[floor + 1].split() if floor + 1 < len(FLOORS) else []
        beside = [other for other in FLOORS[floor].split() if other != room]
        for other in [*above, *beside]:
            source = f"def late():\n    from indistill_fx.{other} import anything\n"
            assert list(wrong_imports(inside, source)), f"{inside} may import {other}"
        assert list(wrong_imports(inside, "import indistill_fx"))
        for below in FLOORS[floor - 1].split() if floor else []:
            assert not list(wrong_imports(inside, f"from indistill_fx.{below} import anything"))


def test_no_module_imports_itself_in_a_circle():
    assert circles({module: SOURCES[module] for module in MODULES}) == []


def test_a_circle_is_seen():
    first, second = "indistill_fx.data.open", "indistill_fx.data.dataset"
    planted = {first: f"from {second} import Data", second: f"def late():\n    from {first} import open_data\n"}
    assert circles(planted) == [{first, second}]


def test_rooms_stay_small():
    """At the package's root at most 9 modules and 15 packages; at most 17 modules in a folder."""
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len([path for path in entries if path.suffix == ".py"]) <= 9
    assert len([path for path in entries if path.is_dir()]) <= 15
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= 17, f"{folder.name}: {len(modules)} modules"


def test_files_and_functions_stay_short():
    """At most 400 lines a file, 60 a function, its docstring apart."""
    long = []
    for module, source in SOURCES.items():
        if (lines := len(source.splitlines())) > 400:
            long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
                if (lines := node.end_lineno - node.lineno + 1 - docstring) > 60:
                    long.append(f"{module}.{node.name}: {lines} lines")
    assert long == []
