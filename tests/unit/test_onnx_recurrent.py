"""Recurrent and quantised operators of ONNX files: converted, and compared with onnxruntime; what torch cannot do is named."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.convert import convert, inputs_of
from indistill_fx.loading.onnx.runtime import compare

LENGTH, WIDTH, HIDDEN = 7, 5, 4
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.7, 0.7, shape).astype(np.float32)


def model_of(nodes: list[Any], constants: dict[str, np.ndarray], shape: tuple[int, ...], outputs: list[str]) -> Any:
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return model


def recurrent(kind: str, *, direction: str = "forward", bias: bool = True, state: str = "", **attributes: Any) -> Any:
    """(n, length, width) → the sequence (n, length, directions, hidden) and the last states (n, directions, hidden)."""
    directions, gates = 2 if direction == "bidirectional" else 1, GATES[kind] * HIDDEN
    constants = {"w": drawn(directions, gates, WIDTH, seed=1), "r": drawn(directions, gates, HIDDEN, seed=2)}
    nodes = [helper.make_node("Transpose", ["x"], ["turned"], perm=[1, 0, 2])]
    names = ["turned", "w", "r", "", "", *([""] if kind != "LSTM" else ["", ""])]
    if bias:
        constants["b"], names[3] = drawn(directions, 2 * gates, seed=3), "b"
    if state:  # as exporters write it: repeated for every sample
        constants |= {"d": np.array([directions]), "h": np.array([HIDDEN])}
        nodes += [
            helper.make_node("Shape", ["x"], ["count"], start=0, end=1),
            helper.make_node("Concat", ["d", "count", "h"], ["whole"], axis=0),
        ]
        for place in range(5, len(names)):
            first = drawn(directions, 1, HIDDEN, seed=place)
            constants[f"s{place}"] = first if state == "constant" else np.zeros_like(first)
            nodes.append(helper.make_node("Expand", [f"s{place}", "whole"], [f"full{place}"]))
            names[place] = f"full{place}"
    results = ["y", *[f"l{place}" for place in range(len(names) - 5)]]
    nodes.append(helper.make_node(kind, names, results, hidden_size=HIDDEN, direction=direction, **attributes))
    nodes.append(helper.make_node("Transpose", ["y"], ["out0"], perm=[2, 0, 1, 3]))
    nodes += [
        helper.make_node("Transpose", [name], [f"out{k}"], perm=[1, 0, 2]) for k, name in enumerate(results[1:], 1)
    ]
    return model_of(nodes, constants, (LENGTH, WIDTH), [f"out{k}" for k in range(len(results))])


def difference(model: Any) -> float:
    inputs = inputs_of(model)
    return compare(convert(model, inputs, "case.onnx"), model, inputs, "case.onnx")


def layers_of(model: Any) -> list[nn.Module]:
    made = convert(model, inputs_of(model), "case.onnx")
    return [part for part in made.modules() if isinstance(part, nn.RNNBase)]


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_recurrent_layer_computes_what_onnxruntime_does(kind, direction, bias):
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    assert difference(recurrent(kind, direction=direction, bias=bias, **attributes)) < 2e-6


@pytest.mark.parametrize("state", ["zero", "constant"])
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_first_states(kind, state):
    attributes = {"linear_before_reset": 1} if kind == "GRU" else {}
    model = recurrent(kind, direction="bidirectional", state=state, **attributes)
    assert difference(model) < 2e-6 and len(layers_of(model)) == 1


def test_an_rnn_of_relus():
    assert difference(recurrent("RNN", activations=["Relu"])) < 2e-6


@pytest.mark.parametrize(
    ("kind", "attributes", "why"),
    [
        ("GRU", {}, "linear_before_reset = 0"),
        ("LSTM", {"clip": 3.0}, "a clip"),
        ("LSTM", {"activations": ["Sigmoid", "Relu", "Tanh"]}, "has the activations sigmoid, relu, tanh"),
        ("RNN", {"activations": ["Elu"]}, "has the activations elu"),
    ],
)
def test_what_torch_has_no_layer_for_is_named_with_the_way_out(kind, attributes, why):
    model = recurrent(kind, **attributes)
    with pytest.raises(ConfigError, match=rf"the operator `{kind}`.*{why}") as caught:
        convert(model, inputs_of(model), "case.onnx")
    assert "onnxruntime:case.onnx" in str(caught.value)


class Speech(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.rnn = kind(8, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.rnn(torch.relu(self.stem(x)))[0].mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_file_of_torchs_exporter_is_a_teacher(kind, tmp_path):
    torch.manual_seed(0)
    module = Speech(kind).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, (torch.randn(2, 9, 6),), tmp_path / "t.onnx", dynamo=False,
            input_names=["x"], dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    teacher = ifx.load(str(tmp_path / "t.onnx"))
    x = torch.randn(3, 9, 6)
    torch.testing.assert_close(teacher(x), module(x), atol=1e-5, rtol=1e-5)
    assert sum(isinstance(part, nn.RNNBase) for part in teacher.modules()) == 2
    student = nn.Sequential(nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 3))
    stages = [
        ifx.compile_stages(own, student, example_inputs=x, curriculum=ifx.Curriculum(lengths=0), main="kd")[-1]
        for own in (teacher, module)
    ]
    losses = [stage.eval()((x, torch.arange(3))).item() for stage in stages]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
