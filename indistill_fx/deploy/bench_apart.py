"""Time an ONNX file in a process of its own, as it will run where it is deployed.

In a process that has trained or traced networks, the same file takes up to 7% longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from indistill_fx.deploy.bench import bench
from indistill_fx.deploy.onnx_session import as_inputs
from indistill_fx.errors import ExportError, IndistillError

_NAMES = "{:03d}"
"""Of the inputs in their file, so that their order by name is their order."""


def bench_apart(file: Path, inputs: tuple[Tensor, ...], **settings: Any) -> dict[str, Any]:
    """The report of `bench` on one ONNX file, made by a new process.

    Args:
        file: the ONNX file.
        inputs: example inputs.
        settings: further arguments of `bench`.

    Returns:
        The report, as plain values.

    Raises:
        ConfigError: an input is not a tensor.
        ExportError: the process failed; says its last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, examples, report = (Path(folder) / name for name in ("request.json", "inputs.safetensors", "report"))
        request.write_text(json.dumps({"file": str(Path(file).absolute()), "settings": settings}), encoding="utf-8")
        save_file({_NAMES.format(i): value.contiguous() for i, value in enumerate(as_inputs(inputs))}, examples)
        # -P: a file of the working directory never stands in for a module
        command = [sys.executable, "-P", "-m", __spec__.name, str(request), str(examples), str(report)]
        path = os.pathsep.join(entry for entry in sys.path if os.path.isabs(entry))
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise ExportError(
                f"The process that timed `{file.name}` failed: {lines[-1]}", where=str(file),
                hint="Time it by another runtime (--on torch), or export the model and run `indistill-fx bench` on the file.",
            )  # fmt: skip
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found


def _main(request: str, examples: str, report: str) -> None:
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    inputs = [value for _, value in sorted(load_file(examples).items())]
    found = bench({"candidate": asked["file"]}, tuple(inputs), **asked["settings"])
    Path(report).write_text(json.dumps(found.to_json()), encoding="utf-8")


if __name__ == "__main__":
    try:
        _main(*sys.argv[1:])
    except IndistillError as error:
        sys.exit(str(error))
