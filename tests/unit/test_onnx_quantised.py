"""Quantised operators of ONNX files, each compared with onnxruntime; and whole int8 files as teachers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from torch import nn

import indistill_fx as ifx
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher
from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx import quantised
from indistill_fx.loading.onnx.convert import convert, inputs_of
from indistill_fx.loading.onnx.runtime import compare, example_of, open_session, run_session
from indistill_fx.loading.onnx.table import RULES
from indistill_fx.loading.onnx.values import Traced
from tests.nets import unsettle

DRAW = np.random.default_rng(0)


def f(*numbers: float) -> np.ndarray:
    return np.array(numbers if len(numbers) > 1 else numbers[0], np.float32)


def i8(*shape: int) -> np.ndarray:
    return DRAW.integers(-127, 128, shape).astype(np.int8)


U8, I8 = np.array(120, np.uint8), np.array(3, np.int8)
# operator, its inputs ("x" floats, "q" x in uint8, "s" x in int8, or a constant), attributes, number of outputs
CASES: list[tuple[str, list[Any], dict[str, Any], int]] = [
    ("QuantizeLinear", ["x", f(0.02), U8], {}, 1),
    ("QuantizeLinear", ["x", f(0.01), I8], {}, 1),
    ("QuantizeLinear", ["x", f(0.02)], {}, 1),
    ("QuantizeLinear", ["x", f(0.0002), np.array(-7, np.int16)], {}, 1),
    ("QuantizeLinear", ["x", f(0.01, 0.02, 0.03, 0.04), np.array([1, 2, 3, 4], np.uint8)], {"axis": 1}, 1),
    ("DequantizeLinear", ["q", f(0.02), U8], {}, 1),
    ("DequantizeLinear", ["s", f(0.5)], {}, 1),
    ("DequantizeLinear", ["s", f(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), np.array([0, 1, 2, 3, 4, 5], np.int8)], {"axis": -1}, 1),
    ("DynamicQuantizeLinear", ["x"], {}, 3),
    ("QLinearConv", ["q", f(0.02), U8, i8(5, 4, 3, 3), f(0.003), np.array(0, np.int8), f(0.05), U8], {"pads": [1] * 4}, 1),
    (
        "QLinearConv",
        ["q", f(0.02), U8, i8(5, 4, 3, 3), f(0.003, 0.002, 0.004, 0.001, 0.005), np.zeros(5, np.int8), f(0.05), U8,
         DRAW.integers(-900, 900, 5).astype(np.int32)],
        {"strides": [2, 2]}, 1,
    ),
    ("QLinearMatMul", ["q", f(0.02), U8, i8(6, 3), f(0.0041), np.array(0, np.int8), f(0.0637), U8], {}, 1),
    ("ConvInteger", ["q", i8(5, 4, 3, 3).astype(np.uint8), U8, np.array(9, np.uint8)], {"pads": [1] * 4}, 1),
    ("MatMulInteger", ["q", i8(6, 3), U8, np.array(0, np.int8)], {}, 1),
    ("MatMulInteger", ["q", i8(6, 3)], {}, 1),
]  # fmt: skip


def one_node(kind: str, given: list[Any], attributes: dict[str, Any], count: int) -> Any:
    """A file from floats (n, 4, 6, 6) to the operator's results as floats."""
    constants = {"scale": f(0.02), "u8": U8, "i8": I8}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "u8"], ["q"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "i8"], ["s"]),
    ]
    names = []
    for number, value in enumerate(given):
        names.append(value if isinstance(value, str) else f"c{number}")
        constants |= {} if isinstance(value, str) else {f"c{number}": value}
    results = [f"r{number}" for number in range(count)]
    nodes.append(helper.make_node(kind, names, results, **attributes))
    whole = [helper.make_node("Cast", [name], [f"f{name}"], to=TensorProto.FLOAT) for name in results]
    shaped = [f"f{name}" for name in results]
    if count > 1:  # a scale and a zero have no batch axis
        whole += [helper.make_node("Add", [shaped[0], name], [f"y{name}"]) for name in shaped[1:]]
        shaped = [shaped[0], *[f"y{name}" for name in shaped[1:]]]
    graph = helper.make_graph(
        [*nodes, *whole],
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in shaped],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return model


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_an_operator_computes_what_onnxruntime_does(case):
    model = one_node(*case)
    inputs = inputs_of(model)
    assert compare(convert(model, inputs, "case.onnx"), model, inputs, "case.onnx") < 2e-6


def test_every_rule_has_a_case():
    wanted = {name for name in RULES if "Integer" in name or "Linear" in name}
    assert {case[0] for case in CASES} == wanted


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    """A network of the demo's with settled norms, and its file in int8."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    module = unsettle(DigitsTeacher()).eval()
    ifx.export_onnx(module, folder / "float.onnx", torch.zeros(2, 1, 8, 8))
    name = onnxruntime.InferenceSession(folder / "float.onnx").get_inputs()[0].name
    batches = iter([{name: torch.randn(64, 1, 8, 8).numpy()} for _ in range(3)])

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(batches, None)

    quantize_static(str(folder / "float.onnx"), str(folder / "int8.onnx"), Reader(), per_channel=True)
    return module, folder / "int8.onnx"


def test_an_int8_file_is_a_teacher_with_ordinary_layers(int8):
    module, path = int8
    teacher = ifx.load(str(path))
    x = torch.randn(16, 1, 8, 8)
    session = onnxruntime.InferenceSession(path)
    (wanted,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(teacher(x).detach().numpy(), wanted, atol=0.02 * abs(wanted).max())
    own, other = teacher.get_submodule("layer2.0.conv1").weight, module.layer2[0].conv1
    assert own.shape == other.weight.shape and own.unique().numel() > 200  # dequantised, a scale for every channel
    plan = ifx.align(teacher, DigitsStudent(), example_inputs=x)
    stages = ifx.compile_stages(teacher, DigitsStudent(), plan, example_inputs=x, curriculum=ifx.Curriculum(lengths=1))
    assert len(stages) > 2 and all(stage((x, torch.arange(16) % 10)).isfinite() for stage in stages)


def test_a_wrong_zero_is_noticed_in_a_whole_file(int8, monkeypatch):
    _, path = int8
    right = quantised._dequantized

    def wrong(x, scale, zero, axis, build):
        shifted = zero + 3 if isinstance(x, Traced) and zero is not None else zero
        return right(x, scale, shifted, axis, build)

    monkeypatch.setattr(quantised, "_dequantized", wrong)
    with pytest.raises(ConfigError, match=r"does not compute what onnxruntime does.*onnxruntime:"):
        ifx.load(str(path))


class _InAnotherOrder(nn.Module):
    """x * 3 / 7 in steps of 0.0002, multiplied and divided at once: the last bit is another, and with it some of the steps."""

    def __init__(self, factor: float = 3 / 7):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return torch.round(x * self.factor / 0.0002).clamp(-32768, 32767) * 0.0002


def test_sums_that_lie_between_two_steps_are_no_difference():
    nodes = [
        helper.make_node("Mul", ["x", "three"], ["tripled"]),
        helper.make_node("Div", ["tripled", "seven"], ["part"]),
        helper.make_node("QuantizeLinear", ["part", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["y"]),
    ]
    constants = {"three": f(3.0), "seven": f(7.0), "step": f(0.0002), "zero": np.array(0, np.int16)}
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 30_000]) for name in ("x", "y")]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    inputs = inputs_of(model)
    x = example_of(inputs, 2)[0]
    (wanted,) = run_session(open_session(model, "steps"), (x,), None)
    gap = (_InAnotherOrder()(x) - wanted).abs().max()
    assert 0.00019 < gap < 0.00021  # one step, for some of the numbers
    assert compare(_InAnotherOrder(), model, inputs, "steps") == pytest.approx(float(gap / wanted.abs().max()), rel=0.2)
    with pytest.raises(ConfigError, match="does not compute what onnxruntime does"):
        compare(_InAnotherOrder(3.01 / 7), model, inputs, "steps")


def test_an_operator_of_another_domain_is_named_with_the_way_out(tmp_path):
    model = one_node("QuantizeLinear", ["x", f(0.02), U8], {}, 1)
    model.graph.node[2].op_type, model.graph.node[2].domain = "QLinearAdd", "com.microsoft"
    with pytest.raises(ConfigError, match=r"`com\.microsoft\.QLinearAdd`") as caught:
        convert(model, inputs_of(model), "case.onnx")
    assert "onnxruntime:case.onnx" in str(caught.value)
