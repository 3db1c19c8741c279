"""A newcomer's path, timed: from a fresh clone to a student and its ONNX file, by a guide alone.

    python -m benchmarks.newcomer --json benchmarks/results/newcomer.json
    python -m benchmarks.newcomer --guide own_model --install             with an environment of its own

The repository is cloned into a new folder, and every block of the guide runs there in order, as in the reader's shell. Without
`--install` the environment of this command is used, so the installation is not timed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from indistill_fx.runs.record import environment

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"```(python|sh)\n(.*?)```", re.DOTALL)


def main() -> None:
    """Run a guide block by block, print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guide", default="segmentation", help="a page of docs/guides [default: segmentation]")
    parser.add_argument("--install", action="store_true", help="install into a new environment first")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = walk(Path(folder), options.guide, install=options.install)
    total = {key: round(sum(step[key] for step in steps), 1) for key in ("seconds", "cpu_seconds")}
    for step in [*steps, {"step": "in all", **total}]:
        print(f"{step['seconds']:7.1f} s  {step['cpu_seconds']:7.1f} s of CPU  {step['step']}")
    if options.json:
        about = {"command": " ".join(["python -m benchmarks.newcomer", *sys.argv[1:]]), "guide": options.guide}
        about |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment("cpu", 1)}
        options.json.write_text(
            json.dumps({**about, "installed": options.install, "steps": steps, **total}, indent=1) + "\n"
        )


def walk(folder: Path, guide: str, *, install: bool) -> list[dict[str, Any]]:
    """Clone, and run every block of a guide in the clone.

    Args:
        folder: where the clone goes.
        guide: name of a page of docs/guides.
        install: make a new environment and install the clone into it.

    Returns:
        A dictionary for each step: what it is, elapsed seconds, CPU seconds.
    """
    clone = folder / "indistill-fx"
    steps = [timed("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], folder, {})]
    binaries = Path(sys.executable).parent
    if install:
        steps.append(timed("installation", [sys.executable, "-m", "venv", ".venv"], clone, {}))
        binaries = clone / ".venv/bin"
        steps.append(
            timed("installation", [str(binaries / "python"), "-m", "pip", "install", "--quiet", "."], clone, {})
        )
    around = {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(clone), "HOME": str(folder)}
    page = (clone / f"docs/guides/{guide}.md").read_text(encoding="utf-8")
    for number, (kind, block) in enumerate(BLOCK.findall(page)):
        name = re.match(r"# (\w+\.py)\n", block)
        file = clone / (name[1] if name else f"block-{number}")
        file.write_text(block, encoding="utf-8")
        if kind == "python" and not only_defines(block):
            steps.append(timed(file.name, [str(binaries / "python"), str(file)], clone, around))
        elif kind == "sh":
            commands = [block] if re.search(r"^done$", block, re.MULTILINE) else block.replace("\\\n", " ").splitlines()
            steps += [timed(" ".join(command.split()), ["bash", "-ec", command], clone, around) for command in commands]
    return steps


def only_defines(code: str) -> bool:
    """Whether a file only defines things, so that the reader saves it and does not run it."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    return all(isinstance(statement, kinds) for statement in ast.parse(code).body)


def timed(step: str, command: list[str], folder: Path, around: dict[str, str]) -> dict[str, Any]:
    """Run a command, and measure the time that passes and the CPU time of all its processes."""
    begin, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, env={**os.environ, **around}, check=True, stdout=sys.stderr)
    seconds, now = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    return {"step": step, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}


if __name__ == "__main__":
    main()
