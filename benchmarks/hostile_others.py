"""Hostile files that are not torch models: ONNX, saved outputs, plans, run directories that hold code, for `attacks.py`."""

from __future__ import annotations

import importlib.util
import json
import marshal
import os
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from files_made import Make, Reduced, network, saved
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

DIGITS = "indistill_fx.demo:DigitsStudent"
node = helper.make_node


def others(canary: str) -> Iterator[tuple[str, Make]]:
    """All of them."""
    for kind in (hostile_onnx, hostile_outputs, hostile_code, hostile_plans, hostile_lists):
        yield from kind(canary)


# ---- ONNX ----------------------------------------------------------------------------------------------------------------
def network_of(nodes: list[Any], weights: dict[str, Any], **more: Any) -> onnx.ModelProto:
    """Nodes from x to y."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", ["n", 3, 8, 8]), ("y", None))
    )
    held = [numpy_helper.from_array(np.array(value), name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], held), opset_imports=opsets, ir_version=9, **more)


def convolution() -> onnx.ModelProto:
    weight = np.ones((2, 3, 3, 3), np.float32)
    return network_of([node("Conv", ["x", "w"], ["t"]), node("Relu", ["t"], ["y"])], {"w": weight})


def weights_at(**told: str) -> onnx.ModelProto:
    """A convolution whose weights are kept elsewhere."""
    made = convolution()
    weight = made.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in told.items():
        weight.external_data.add(key=key, value=value)
    return made


def chained(depth: int) -> onnx.ModelProto:
    """Functions that call each other, each the next one twice."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    bodies = []
    for k in range(depth):
        calls = [node(f"f{k + 1}", ["a"], ["b"], domain="own"), node(f"f{k + 1}", ["b"], ["c"], domain="own")]
        body = calls if k < depth - 1 else [node("Relu", ["a"], ["c"])]
        bodies.append(helper.make_function("own", f"f{k}", ["a"], ["c"], body, opsets))
    return network_of([node("f0", ["x"], ["y"], domain="own")], {}, functions=bodies)


def itself() -> onnx.ModelProto:
    body = helper.make_function(
        "own", "f", ["a"], ["c"], [node("f", ["a"], ["c"], domain="own")], [helper.make_opsetid("own", 1)]
    )
    return network_of([node("f", ["x"], ["y"], domain="own")], {}, functions=[body])


def a_loop() -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    nodes = [node("Identity", ["c"], ["d"]), node("Relu", ["v"], ["w"])]
    inputs = [value("i", TensorProto.INT64, []), value("c", TensorProto.BOOL, []), value("v", TensorProto.FLOAT, None)]
    outputs = [value("d", TensorProto.BOOL, []), value("w", TensorProto.FLOAT, None)]
    body = helper.make_graph(nodes, "b", inputs, outputs)
    return network_of([node("Loop", ["n", "t", "x"], ["y"], body=body)], {"n": 1 << 60, "t": True})


def greedy() -> dict[str, onnx.ModelProto]:
    """Small files that ask for much."""
    steps = [node("Range", ["a", "b", "c"], ["r"]), node("Cast", ["r"], ["f"], to=TensorProto.FLOAT)]
    steps += [node("ReduceSum", ["f"], ["q"], keepdims=0), node("Add", ["x", "q"], ["y"])]
    filled = [node("ConstantOfShape", ["s"], ["c"]), node("Add", ["x", "c"], ["y"])]
    names = ["x", *(f"a{k}" for k in range(59_999)), "y"]
    ends = np.array([0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20])
    times = np.array([1, 1, 2.0**20, 2.0**20], np.float32)
    return {
        "a constant of 2**40 elements": network_of(filled, {"s": np.array([1 << 40])}),
        "an expansion to 2**40": network_of([node("Expand", ["x", "s"], ["y"])], {"s": [1, 3, 1 << 20, 1 << 20]}),
        "a tiling to 2**60": network_of([node("Tile", ["x", "s"], ["y"])], {"s": [1, 1, 1 << 30, 1 << 30]}),
        "a range of 2**40": network_of(steps, {"a": 0, "b": 1 << 40, "c": 1}),
        "a padding of 2**40": network_of([node("Pad", ["x", "p"], ["y"])], {"p": ends}),
        "an enlargement by 2**20": network_of([node("Resize", ["x", "", "s"], ["y"])], {"s": times}),
        "a loop": a_loop(),
        "functions that call themselves": itself(),
        "2**60 calls": chained(60),
        "60,000 operators": network_of([node("Relu", [one], [other]) for one, other in pairwise(names)], {}),
        "an operator of another library": network_of([node("Run", ["x"], ["y"], domain="own")], {}),
    }


def hostile_onnx(canary: str) -> Iterator[tuple[str, Make]]:
    """As a teacher, as a black box, and as a deployed file."""
    outside = {
        name: weights_at(location=name) for name in ("/dev/zero", "../secret", "link", "pipe", "/etc/passwd", canary)
    }
    beyond = {f"bytes {start} to {length}": weights_at(location="w.bin", offset=start, length=length)
              for start, length in (("0", str(1 << 40)), (str(1 << 62), "216"), ("-8", "216"), ("1e3", "x"))}  # fmt: skip
    asks = greedy()
    unbounded = {"a black box": list(asks)[6:7], "timed": list(asks)[:7]}  # to run them is to do what they ask for
    made = {f"weights in {name}": model for name, model in outside.items()} | beyond | asks
    ways: dict[str, Callable[[str], list[str]]] = {
        "converted": lambda path: ["inspect", path],
        "a black box": lambda path: ["inspect", f"onnxruntime:{path}"],
        "timed": lambda path: ["bench", path, "--batch", "1", "--threads", "1"],
    }
    for name, model in made.items():
        for way, command in ways.items():
            if name in unbounded.get(way, ()):
                continue

            def make(folder: Path, model: Any = model, command: Any = command) -> list[str]:
                (folder / "secret").write_bytes(bytes(216))
                home = folder / "home"
                home.mkdir()
                (home / "link").symlink_to(folder / "secret")
                (home / "w.bin").write_bytes(bytes(216))
                os.mkfifo(home / "pipe")
                (home / "a.onnx").write_bytes(model.SerializeToString())
                return command(str(home / "a.onnx"))

            yield f"an ONNX file with {name}, {way}", make
    for name in ("\x1b[2J\nError: x", "forward", 'a"; import os; "', "../../x", "self"):
        yield f"an ONNX file with a name {name[:12]!r}", _named(name)


def _named(name: str) -> Make:
    def make(folder: Path) -> list[str]:
        made = convolution()
        made.graph.initializer[0].name = made.graph.node[0].input[1] = name
        made.graph.node[0].output[0] = made.graph.node[1].input[0] = f"{name}2"
        (folder / "a.onnx").write_bytes(made.SerializeToString())
        return ["inspect", str(folder / "a.onnx"), "--all"]

    return make


# ---- saved outputs -------------------------------------------------------------------------------------------------------
def hostile_outputs(canary: str) -> Iterator[tuple[str, Make]]:
    """`saved:DIR` as a teacher."""
    logits = torch.zeros(1442, 10)
    state = {"schema_version": 1, "data": "x", "samples": 1442, "teacher": "t", "axes": {}}

    def tables(tensors: dict[str, Any], **more: Any) -> Callable[[Path], None]:
        return lambda path: save_file(
            {name: tensor.clone() for name, tensor in tensors.items()}, path, {"state": json.dumps({**state, **more})}
        )

    evil = pickle.dumps(Reduced(os.system, (f"touch {canary}",)))
    code = f'x"; __import__("os").system("touch {canary}"); "'
    made: dict[str, Callable[[Path], object]] = {
        "a pickle": lambda path: path.write_bytes(evil),
        "a name that is code": tables({"logits": logits, code: logits}),
        "escapes": tables({"logits": logits, "\x1b[2J\nb": logits}, teacher="\x1b]0;owned\x07\nError: x"),
        "names that hide methods": tables({"logits": logits, "forward": logits, "_modules.train": logits}),
        "20,000 levels of names": tables({"logits": logits, ".".join("a" * 20_000): logits}),
        "whole numbers": tables({"logits": logits.long()}),
        "2**40 samples": tables({"logits": logits}, samples=1 << 40),
        "samples in words": tables({"logits": logits}, samples="many"),
        "axes that are none": tables({"logits": logits}, axes={"logits": 1 << 70}),
        "no tables": tables({"a": logits}),
        "a pipe": lambda path: os.mkfifo(path),
        "a huge header": lambda path: path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
        "brackets without end": lambda path: save_file({"logits": logits}, path, {"state": "[" * 10**5}),
    }
    for name, write in made.items():

        def make(folder: Path, write: Any = write) -> list[str]:
            (folder / "saved").mkdir()
            write(folder / "saved" / "outputs.safetensors")
            options = ["--data", "digits", "--epochs", "1", "--no-augment", "--no-warmup", "-o", str(folder / "run")]
            return ["distill", f"saved:{folder / 'saved'}", DIGITS, *options]

        yield f"saved outputs: {name}", make


# ---- run directories that hold code --------------------------------------------------------------------------------------
SOUND = """from torch import nn


class Student(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
"""


def run_with_code(folder: Path, code: str) -> Path:
    """As `compress` leaves it, of somebody else's machine: student.py, its weights, a story, a signature of another key."""
    home = folder / "run"
    home.mkdir()
    (home / "student.py").write_text(code)
    spec = f"{home / 'student.py'}:Student"
    about = {"model": spec, "seal": "0" * 64, "input_size": [1, 8, 8], "data": "digits"}
    (home / "run.json").write_text(json.dumps({"status": "done", "about": about, "phases": []}))
    weights = {"1.weight": torch.zeros(10, 64), "1.bias": torch.zeros(10)}
    for name in ("student.safetensors", "start.safetensors"):
        save_file(weights, home / name)
    return home


def hostile_code(canary: str) -> Iterator[tuple[str, Make]]:
    """A student.py that nobody named must not run; of one that was named, nothing else must."""
    evil = f"open({canary!r}, 'w').close()\n{SOUND}"
    data = ["--data", "digits"]
    commands: dict[str, Callable[[str], list[str]]] = {
        "inspect": lambda run: ["inspect", run],
        "evaluate": lambda run: ["evaluate", run, *data],
        "export": lambda run: ["export", run, "-o", f"{run}.onnx"],
        "bench": lambda run: ["bench", run],
        "report": lambda run: ["report", run, "-o", f"{run}.html"],
        "align as teacher": lambda run: ["align", run, DIGITS],
        "distill as teacher": lambda run: ["distill", run, DIGITS, *data, "--epochs", "1", "-o", f"{run}2"],
        "train": lambda run: ["train", run, *data, "--epochs", "1", "-o", f"{run}2"],
        "save-outputs": lambda run: ["save-outputs", run, *data, "-o", f"{run}2"],
        "compress --resume": lambda run: ["compress", f"{run}/teacher.pt", *data, "--macs", "0.5", "--epochs", "1", "--samples", "32",
                                          "--limit", "64", "--no-warmup", "--no-export", "-o", run, "--resume"],
        "prune": lambda run: ["prune", run, "--input", "1x8x8", "--ratio", "0.5", "-o", f"{run}2"],
        "check": lambda run: ["check", f"{run}/a.onnx", "--against", run],
    }  # fmt: skip
    for name, command in commands.items():

        def make(folder: Path, command: Any = command) -> list[str]:
            run = run_with_code(folder, evil)
            torch.save(network(), run / "teacher.pt")
            (run / "a.onnx").write_bytes(convolution().SerializeToString())
            step = {"name": "teacher", "macs": 1, "parameters": 1}
            story = {
                "identity": {},
                "seal": "0" * 64,
                "made": 1,
                "steps": [step],
                "widths": {},
                "sensitivity": [],
                "repaired": None,
            }
            (run / "compress.json").write_text(json.dumps(story))
            arguments = command(str(run))
            return arguments if "--resume" not in arguments else [*arguments, "--main", "kd"]

        yield f"student.py of somebody else's run, {name}", make

    def compiled(folder: Path) -> list[str]:
        run = run_with_code(folder, SOUND)
        cache = Path(importlib.util.cache_from_source(str(run / "student.py")))
        cache.parent.mkdir()
        content = compile(evil, "student.py", "exec")
        cache.write_bytes(importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8) + marshal.dumps(content))
        return ["inspect", f"{run / 'student.py'}:Student", "--input", "1x8x8"]

    yield "a sound student.py, with another one compiled beside it", compiled
    for library in ("torch", "safetensors", "math"):

        def beside(folder: Path, library: str = library) -> list[str]:
            run = run_with_code(folder, f"import {library}\n{SOUND}")
            (run / f"{library}.py").write_text(f"open({canary!r}, 'w').close()\n")
            return ["inspect", f"{run / 'student.py'}:Student@{run / 'student.safetensors'}", "--input", "1x8x8"]

        yield f"a {library}.py beside a sound student.py", beside


# ---- plans, lists --------------------------------------------------------------------------------------------------------
def hostile_plans(canary: str) -> Iterator[tuple[str, Make]]:
    golden = json.loads((Path(__file__).parents[1] / "tests" / "golden" / "0.1.0" / "plan.json").read_text())
    figures = {"mean": [0.5], "std": [0.5]}
    views: dict[str, Any] = {
        "pictures of 4 gigapixels": {"size": [65535, 65535]},
        "pictures of no size": {"size": [0, -1]},
        "2**21 classes": {"classes": [0] * (1 << 21)},
        "classes that are not there": {"classes": [5, 1 << 30]},
        "deviations of zero": {"rescaling": {"given": figures, "wanted": {"mean": [0.5], "std": [0.0]}}},
        "numbers that are none": {"rescaling": {"given": figures, "wanted": {"mean": [float("nan")], "std": [1.0]}}},
        "a dtype that is code": {"dtype": "__class__"},
        "an entry that is unknown": {"load": canary},
    }
    for name, view in views.items():
        for several in (False, True):

            def make(folder: Path, view: Any = view, several: bool = several) -> list[str]:
                (folder / "plan.json").write_text(
                    json.dumps(golden | ({"views": [view]} if several else {"view": view}))
                )
                return ["align", DIGITS, DIGITS, "--input", "1x8x8", "--plan", str(folder / "plan.json")]

            yield f"a plan whose teacher{'s' * several} see {name}", make

    def beside(folder: Path) -> list[str]:
        run = run_with_code(folder, SOUND)
        (run / "plan.json").write_text("[" * 10**6)
        saved(network())(folder)
        options = ["--data", "digits", "--epochs", "1", "--limit", "32", "-o", str(folder / "out")]
        return ["distill", DIGITS, f"{run / 'student.py'}:Student", *options]

    yield "brackets without end in the plan beside a student.py", beside


def hostile_lists(canary: str) -> Iterator[tuple[str, Make]]:
    """Files of class names."""
    contents = {"brackets": "[" * 10**6, "objects": '[{"a": 1}]', "a number": "5", "escapes": '["\\u001b[2J"]'}
    contents["a long number"] = "[1" + "0" * 10**6 + "]"
    for name, content in contents.items():

        def make(folder: Path, content: str = content) -> list[str]:
            (folder / "classes.json").write_text(content)
            options = ["--teacher-classes", str(folder / "classes.json"), "--epochs", "1", "-o", str(folder / "run")]
            return ["distill", DIGITS, DIGITS, "--data", "digits", "--limit", "32", *options]

        yield f"a list of classes: {name}", make
