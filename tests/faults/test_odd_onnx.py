"""ONNX files that are damaged, odd or greedy, wherever one is read: as a teacher, by `check`, by `bench`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from indistill_fx.cli import run as run_cli
from indistill_fx.deploy.bench import bench, example_of
from indistill_fx.deploy.check_onnx import check_onnx
from indistill_fx.deploy.onnx_session import file_size
from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.models import convert_file, run_file

IMAGES = torch.randn(2, 3, 8, 8)
Change = Callable[[onnx.ModelProto], object]


def model() -> onnx.ModelProto:
    """A convolution, a function of the file's own, and a mean."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["t"], kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("twice", ["t"], ["r"], domain="own"),
        helper.make_node("ReduceMean", ["r"], ["y"], axes=[2, 3], keepdims=0),
    ]
    body = helper.make_function(
        "own", "twice", ["a"], ["c"], [helper.make_node("Add", ["a", "a"], ["c"])], [helper.make_opsetid("", 17)]
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=9)


def file(tmp_path: Path, change: Change = lambda _: None) -> Path:
    made = model()
    change(made)
    path = tmp_path / "a.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def reference(made: onnx.ModelProto) -> None:
    made.graph.node[0].attribute[0].ref_attr_name = "kernel"


def too_many(made: onnx.ModelProto) -> None:
    made.graph.node[1].input.append("t")


@pytest.mark.parametrize("change", [reference, too_many])
def test_functions_that_are_called_wrongly_are_refused(change: Change, tmp_path: Path) -> None:
    convert_file(file(tmp_path))
    path = file(tmp_path, change)
    for read in (convert_file, lambda path: run_file(path, [])):
        with pytest.raises(ConfigError, match=r"called wrongly|outside of one"):
            read(path)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (2 * x).sum(1, keepdim=True).expand(-1, 2, -1, -1).mean((2, 3))


@pytest.mark.parametrize(
    "text",
    ["5", "[", "{}", '{"mean": 1, "std": 2}', '{"mean": ["a"], "std": [1]}', '{"mean": [0], "std": [0]}',
     '{"mean": [0], "std": [NaN]}', '{"mean": [], "std": []}', '{"mean": [1e999], "std": [1]}', "[" * 100_000],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_invalid_preprocessing_is_a_difference(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file(tmp_path, lambda made: helper.set_model_props(made, {"preprocess": text}))
    report = check_onnx(path, Twice(), IMAGES)
    assert "The preprocessing in the file's metadata is invalid" in report.differences[0]
    assert run_cli(["bench", str(path)]) == 2
    message = capsys.readouterr().err
    assert "The preprocessing in the file's metadata is invalid" in message and "--input" not in message


def outside(name: str) -> Change:
    def change(made: onnx.ModelProto) -> None:
        weight = made.graph.initializer[0]
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value=name)

    return change


@pytest.mark.parametrize("name", ["../w.bin", "absent.bin", "link.bin", "", "x" * 300, "a\0b", "pipe", "/dev/zero"])
def test_weights_from_elsewhere_are_read_by_nobody(name: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(216))
    home = tmp_path / "home"
    home.mkdir()
    os.mkfifo(home / "pipe")
    (home / "link.bin").symlink_to(tmp_path / "w.bin")
    path = file(home, outside(name))
    for read in (convert_file, example_of, file_size):
        with pytest.raises(ConfigError, match="only such files are read"):
            read(path)
    assert not check_onnx(path, Twice(), IMAGES).agrees
    assert run_cli(["bench", str(path)]) == 2
    (home / "w.bin").write_bytes(bytes(216))
    beside = file(home, outside("w.bin"))
    convert_file(beside)
    assert file_size(beside) == beside.stat().st_size + 216


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.onnx")
    read = threading.Thread(target=lambda: run_cli(["bench", str(tmp_path / "a.onnx")]), daemon=True)
    read.start()
    read.join(60)
    assert not read.is_alive()


def inputs(kind: int, *shape: object) -> Change:
    def change(made: onnx.ModelProto) -> None:
        del made.graph.input[:], made.graph.node[:], made.graph.output[:], made.functions[:]
        made.graph.input.append(helper.make_tensor_value_info("x", kind, shape))
        made.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))
        made.graph.output.append(helper.make_tensor_value_info("y", kind, shape))

    return change


@pytest.mark.parametrize(
    "change",
    [inputs(TensorProto.STRING, 1, 2), inputs(TensorProto.FLOAT, 1 << 40, 3), inputs(TensorProto.FLOAT, 1, 1 << 40),
     inputs(TensorProto.INT8, 1, 2), inputs(TensorProto.FLOAT, 0, 2)],
    ids=["strings", "a huge batch", "a huge sample", "int8", "nothing"],
)  # fmt: skip
def test_inputs_that_cannot_be_made_up(change: Change, tmp_path: Path) -> None:
    path = file(tmp_path, change)
    with pytest.raises(ConfigError, match="cannot be made up"):
        bench({"a": str(path)}, example_of(path), seconds=0.01)
    assert run_cli(["bench", str(path)]) == 2
    assert not check_onnx(path, Twice(), IMAGES).agrees


def test_a_huge_fixed_batch_is_not_tried(tmp_path: Path) -> None:
    def change(made: onnx.ModelProto) -> None:
        made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1 << 40
        made.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1 << 40

    report = check_onnx(file(tmp_path, change), Twice(), IMAGES)
    assert "too large" in report.differences[0]


def test_preprocessing_of_other_pictures_is_a_difference(tmp_path: Path) -> None:
    text = '{"mean": [0.5, 0.5], "std": [0.5, 0.5]}'
    path = file(tmp_path, lambda made: helper.set_model_props(made, {"preprocess": text}))
    assert "images of 2 channels" in check_onnx(path, Twice(), IMAGES).differences[0]


def test_metadata_that_are_no_text(tmp_path: Path) -> None:
    path = file(tmp_path, lambda made: helper.set_model_props(made, {"preprocess": "abcd"}))
    path.write_bytes(path.read_bytes().replace(b"abcd", b"\xb7\xff\xfe\xb7"))
    assert not check_onnx(path, Twice(), IMAGES).agrees
    assert run_cli(["bench", str(path)]) in (0, 2)


def twice_the_same_input(made: onnx.ModelProto) -> None:
    made.graph.input.append(made.graph.input[0])


def twice_the_same_output(made: onnx.ModelProto) -> None:
    made.graph.output.append(made.graph.output[0])


@pytest.mark.parametrize("change", [twice_the_same_input, twice_the_same_output])
def test_two_inputs_or_outputs_of_one_name_are_refused(change: Change, tmp_path: Path) -> None:
    for read in (convert_file, lambda path: run_file(path, [])):
        with pytest.raises(ConfigError, match=r"two of its (in|out)puts have the same name"):
            read(file(tmp_path, change))


@pytest.mark.parametrize("place", ["input", "node", "weight", "location"])
def test_names_that_are_no_text_are_refused_by_all(place: str, tmp_path: Path) -> None:
    def change(made: onnx.ModelProto) -> None:
        if place == "input":
            made.graph.input[0].name = made.graph.node[0].input[0] = "abcd"
        elif place == "node":
            made.graph.node[0].name = "abcd"
        elif place == "weight":
            made.graph.initializer[0].name = made.graph.node[0].input[1] = "abcd"
        else:
            outside("abcd")(made)

    path = file(tmp_path, change)
    path.write_bytes(path.read_bytes().replace(b"abcd", b"\xb7\xff\xfe\xb7"))
    for read in (convert_file, lambda path: run_file(path, []), example_of):
        with pytest.raises(ConfigError, match="a name in it is not text"):
            read(path)
    assert run_cli(["bench", str(path)]) == 2
    assert not check_onnx(path, Twice(), IMAGES).agrees
