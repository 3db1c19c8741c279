"""Models in another precision: without data, example inputs have the dtype of the weights."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from torch import nn

from indistill_fx.cli import run
from indistill_fx.loading.inputs import example_inputs


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def said(*arguments, code=0):
        assert run(list(arguments)) == code
        found = capsys.readouterr()
        return found.out + found.err

    return said


def saved(name, dtype):
    torch.manual_seed(0)
    head = [nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU()] if dtype == torch.float16 else []  # onnxruntime has no others
    layers = nn.Sequential(*head, nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    torch.save(layers.to(dtype), name)


KINDS = {
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float64: onnx.TensorProto.DOUBLE,
}


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_export_without_data(told, tmp_path, dtype):
    saved("net.pt", dtype)
    if dtype == torch.bfloat16:
        said = told("export", "net.pt", "-o", "net.onnx", "--input", "1x8x8", code=2)
        assert "export the model in float32" in said  # onnxruntime on a CPU has no such operators
        return
    told("export", "net.pt", "-o", "net.onnx", "--input", "1x8x8")
    assert onnx.load("net.onnx").graph.input[0].type.tensor_type.elem_type == KINDS[dtype]
    told("check", "net.onnx", "--against", "net.pt", "--input", "1x8x8")
    said = told("export", "net.pt", "-o", "net.onnx", "--input", "float32x1x8x8", code=2)
    assert "does not run on the example inputs" in said  # as asked


def test_other_commands_without_data(told, tmp_path):
    saved("net.pt", torch.float16)
    said = told("bench", "net.pt", "--input", "1x8x8", "--batch", "2", "--threads", "1", "--json")
    table, _ = json.JSONDecoder().raw_decode(said)  # standard output comes first
    assert [row["name"] for row in table["rows"]] == ["net.pt"]
    told("align", "net.pt", "net.pt", "--input", "1x8x8")


def test_data_of_another_dtype_are_refused_with_what_to_do(told, tmp_path):
    saved("net.pt", torch.float16)
    told("export", "net.pt", "-o", "net.onnx", "--input", "1x8x8")
    for command in (("export", "net.pt", "-o", "net.onnx"), ("check", "net.onnx", "--against", "net.pt")):
        said = told(*command, "--data", "digits", "--samples", "16", code=2)
        assert "The weights are torch.float16, an input is torch.float32" in said and "our fault" not in said


def test_named_inputs_take_it_too():
    made = example_inputs(["pixels:3x4x4", "mask:boolx4", "scale:float32x1"], "float16")
    assert [value.dtype for value in made.values()] == [torch.float16, torch.bool, torch.float32]
