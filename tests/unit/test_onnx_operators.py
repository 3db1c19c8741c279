"""Every operator of the table as a file of one node: converted, and compared with onnxruntime at two batch sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.convert import convert, inputs_of
from indistill_fx.loading.onnx.runtime import compare
from indistill_fx.loading.onnx.table import RULES

DRAW = np.random.default_rng(0)


def drawn(*shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return DRAW.uniform(low, high, shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def scalar(number: float) -> np.ndarray:
    return np.array(number, dtype=np.float32)


FLOORED = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
CORNERS = {"coordinate_transformation_mode": "align_corners"}
X = "x"  # the input: (batch, 6, 8, 8) unless a case says otherwise
# operator, inputs (X, or a constant), attributes, and what differs from the usual: shape, opset, kind of the input, outputs
CASES: list[tuple[str, list[Any], dict[str, Any], dict[str, Any]]] = [
    *[(name, [X], {}, {}) for name in "Relu Sigmoid Tanh HardSwish Mish Softplus Softsign Erf Exp Abs Neg Sin Cos Atan".split()],
    *[(name, [X], {}, {}) for name in "Floor Ceil Round Sign Identity Dropout Selu Celu Elu LeakyRelu HardSigmoid".split()],
    *[(name, [X], {}, {"shift": 3.0}) for name in ("Log", "Sqrt", "Reciprocal", "Tan")],
    ("IsNaN", [X], {}, {}),
    ("IsInf", [X], {}, {}),
    ("Elu", [X], {"alpha": 0.3}, {}),
    ("LeakyRelu", [X], {"alpha": 0.2}, {}),
    ("HardSigmoid", [X], {"alpha": 1 / 6, "beta": 0.5}, {}),
    ("ThresholdedRelu", [X], {"alpha": 0.3}, {}),
    ("Gelu", [X], {}, {}),
    ("Gelu", [X], {"approximate": "tanh"}, {}),
    ("Clip", [X, scalar(0), scalar(6)], {}, {}),
    ("Clip", [X, scalar(-0.5), scalar(0.4)], {}, {}),
    ("Clip", [X, scalar(0)], {}, {}),
    ("Clip", [X], {"min": -0.2, "max": 0.7}, {"opset": 10}),
    *[(name, [X, drawn(6, 1, 1)], {}, {}) for name in ("Add", "Sub", "Mul")],
    *[(name, [scalar(2.5), X], {}, {}) for name in ("Add", "Sub", "Mul", "Max", "Min")],
    ("Div", [X, drawn(6, 1, 1, low=1, high=2)], {}, {}),
    ("Div", [scalar(2), X], {}, {"shift": 4.0}),
    ("Div", [X, whole(-2)], {}, {"kind": np.int64}),
    ("Pow", [X, scalar(2)], {}, {}),
    ("Sum", [X, X, drawn(8)], {}, {}),
    ("Mean", [X, X, drawn(8)], {}, {}),
    ("Min", [X, drawn(8)], {}, {}),
    ("Mod", [X, scalar(0.7)], {"fmod": 1}, {}),
    ("Mod", [X, whole(3)], {}, {"kind": np.int64}),
    *[(name, [X, drawn(8)], {}, {}) for name in "Equal Greater GreaterOrEqual Less LessOrEqual".split()],
    *[(name, [scalar(0.1), X], {}, {}) for name in "Greater GreaterOrEqual Less LessOrEqual".split()],
    *[(name, [X, np.array([True, False] * 4)], {}, {"kind": np.bool_}) for name in ("And", "Or", "Xor")],
    *[(name, [X, np.array(True)], {}, {"kind": np.bool_}) for name in ("And", "Or", "Xor")],
    ("Mod", [scalar(0.7), X], {"fmod": 1}, {"shift": 0.1}),
    ("Not", [X], {}, {"kind": np.bool_}),
    ("Where", [X, drawn(8), scalar(0)], {}, {"kind": np.bool_}),
    ("Cast", [X], {"to": onnx.TensorProto.INT64}, {}),
    ("CastLike", [X, whole(1)], {}, {}),
    ("PRelu", [X, drawn(6, 1, 1)], {}, {}),
    ("PRelu", [X, drawn(1)], {}, {}),
    ("PRelu", [X, drawn(6, 8, 8)], {}, {}),
    ("Conv", [X, drawn(4, 6, 3, 3), drawn(4)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, {}),
    ("Conv", [X, drawn(4, 3, 3, 3)], {"pads": [0, 1, 2, 1], "group": 2}, {}),
    ("Conv", [X, drawn(6, 1, 3, 3)], {"group": 6, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, {}),
    ("Conv", [X, drawn(4, 6, 2, 2)], {"auto_pad": "SAME_LOWER"}, {}),
    ("Conv", [X, drawn(4, 6, 3), drawn(4)], {"dilations": [2], "pads": [2, 2]}, {"shape": (6, 8)}),
    ("Conv", [X, drawn(4, 2, 3, 3, 3)], {}, {"shape": (2, 4, 4, 4)}),
    ("ConvTranspose", [X, drawn(6, 4, 3, 3), drawn(4)], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}, {}),
    ("ConvTranspose", [X, drawn(6, 2, 2, 2)], {"strides": [2, 2], "group": 2}, {}),
    ("Gemm", [X, drawn(5, 6), drawn(5)], {"transB": 1}, {"shape": (6,)}),
    ("Gemm", [X, drawn(6, 5), drawn(1, 5)], {}, {"shape": (6,)}),
    ("Gemm", [X, drawn(6, 5), drawn(5)], {"alpha": 0.5, "beta": 2.0}, {"shape": (6,)}),
    ("Gemm", [X, drawn(6, 5)], {}, {"shape": (6,)}),
    ("MatMul", [X, drawn(8, 5)], {}, {}),
    ("MatMul", [X, X], {}, {}),
    ("MatMul", [X, drawn(6, 8, 5)], {}, {}),
    ("BatchNormalization", [X, drawn(6), drawn(6), drawn(6), drawn(6, low=0.5, high=2)], {"epsilon": 1e-3}, {}),
    ("BatchNormalization", [X, drawn(6), drawn(6), drawn(6), drawn(6, low=0.5, high=2)], {}, {"shape": (6,)}),
    ("LayerNormalization", [X, drawn(8), drawn(8)], {}, {}),
    ("LayerNormalization", [X, drawn(8, 8)], {"axis": -2, "epsilon": 1e-3}, {}),
    ("InstanceNormalization", [X, drawn(6), drawn(6)], {"epsilon": 1e-3}, {}),
    ("GroupNormalization", [X, drawn(6), drawn(6)], {"num_groups": 3}, {"opset": 21}),
    ("LRN", [X], {"size": 3, "alpha": 0.5, "beta": 0.7, "bias": 1.5}, {}),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, {}),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, {}),
    ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, {}),
    ("MaxPool", [X], {"kernel_shape": [2], "auto_pad": "SAME_UPPER"}, {"shape": (6, 8)}),
    ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, {}),
    ("AveragePool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 0, 1, 1], "count_include_pad": 1}, {}),
    ("GlobalAveragePool", [X], {}, {}),
    ("GlobalAveragePool", [X], {}, {"shape": (6, 8)}),
    ("GlobalMaxPool", [X], {}, {}),
    ("Pad", [X, whole(0, 0, 1, 2, 0, 0, 0, 1), scalar(0.5)], {}, {}),
    ("Pad", [X, whole(1, 2), scalar(0), whole(3)], {}, {}),
    ("Pad", [X, whole(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "reflect"}, {}),
    ("Pad", [X, whole(0, 0, 1, 2, 0, 0, 0, 1)], {"mode": "edge"}, {}),
    ("Pad", [X], {"pads": [0, 1, 0, 0, 0, 1, 0, 0], "value": 0.3}, {"opset": 10}),
    ("Resize", [X, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest", **FLOORED}, {}),
    ("Resize", [X, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}, {}),
    ("Resize", [X, None, None, whole(2, 6, 12, 5)], {"mode": "linear", **CORNERS}, {"batch": 2}),
    ("Resize", [X, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic"}, {}),
    ("Resize", [X, None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}, {}),
    ("Upsample", [X, np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, {"opset": 9}),
    ("DepthToSpace", [X], {"blocksize": 2}, {"shape": (12, 4, 4)}),
    ("DepthToSpace", [X], {"blocksize": 2, "mode": "CRD"}, {"shape": (12, 4, 4)}),
    ("SpaceToDepth", [X], {"blocksize": 2}, {}),
    *[(f"Reduce{name}", [X, whole(2, 3)], {"keepdims": 0}, {"opset": 18}) for name in "Mean Sum Max Min L1 L2 SumSquare LogSumExp".split()],
    ("ReduceMean", [X], {"axes": [-1], "keepdims": 1}, {"opset": 13}),
    ("ReduceProd", [X, whole(1)], {}, {"opset": 18}),
    ("ReduceProd", [X, whole(1, 3)], {"keepdims": 0}, {"opset": 18}),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}, {}),
    ("Softmax", [X], {"axis": 1}, {}),
    ("Softmax", [X], {}, {"opset": 11}),
    ("LogSoftmax", [X], {}, {}),
    ("ArgMax", [X], {"axis": 1, "keepdims": 0}, {}),
    ("ArgMin", [X], {"axis": -1}, {}),
    ("TopK", [X, whole(3)], {}, {"outputs": 2}),
    ("CumSum", [X, np.array(2, np.int64)], {}, {}),
    ("Einsum", [X, drawn(6, 5)], {"equation": "bchw,ck->bkhw"}, {}),
    ("MeanVarianceNormalization", [X], {"axes": [1, 2, 3]}, {}),
    ("Reshape", [X, whole(0, -1)], {}, {}),
    ("Reshape", [X, whole(-1, 3, 2, 64)], {}, {}),
    ("Reshape", [X, whole(1, 384)], {}, {"batch": 1}),
    ("Flatten", [X], {}, {}),
    ("Flatten", [X], {"axis": 3}, {}),
    ("Flatten", [X], {"axis": 4}, {}),
    ("Squeeze", [X, whole(1)], {}, {"shape": (1, 8)}),
    ("Squeeze", [X], {"axes": [2]}, {"shape": (4, 1), "opset": 11}),
    ("Unsqueeze", [X, whole(-1, 1)], {}, {}),
    ("Transpose", [X], {"perm": [0, 2, 3, 1]}, {}),
    ("Concat", [X, X], {"axis": 1}, {}),
    ("Split", [X, whole(2, 4)], {"axis": 1}, {"outputs": 2}),
    ("Split", [X], {"axis": 1, "num_outputs": 3}, {"opset": 18, "outputs": 3}),
    ("Split", [X], {"axis": 2}, {"opset": 11, "outputs": 2}),
    ("Slice", [X, whole(1, 0), whole(9999999999, -1), whole(1, 3), whole(2, 1)], {}, {}),
    ("Slice", [X, whole(-1), whole(-9223372036854775807), whole(2), whole(-1)], {}, {}),
    ("Slice", [X], {"starts": [1], "ends": [4], "axes": [2]}, {"opset": 9}),
    ("Gather", [X, whole(0, -1, 3)], {"axis": 1}, {}),
    ("Gather", [X, np.array(2, np.int64)], {"axis": 1}, {}),
    ("Gather", [X, np.array([[0, 1], [2, -1]], np.int64)], {"axis": 2}, {}),
    ("Gather", [drawn(4, 5), X], {}, {"kind": np.int64}),
    ("GatherElements", [X, X], {"axis": 3}, {"kind": np.int64}),
    ("GatherND", [drawn(4, 5), np.array([[0, 1], [3, 2]], np.int64)], {}, {"plus": True}),
    ("ScatterND", [drawn(4, 5), np.array([[0], [2]], np.int64), drawn(2, 5)], {}, {"plus": True}),
    ("Expand", [X, whole(1, 6, 8, 8)], {}, {"shape": (6, 1, 8)}),
    ("Tile", [X, whole(1, 2, 1, 1)], {}, {}),
    ("ConstantOfShape", [whole(4, 5)], {"value": helper.make_tensor("v", onnx.TensorProto.FLOAT, [1], [2.5])}, {"plus": True}),
    ("Range", [scalar(0), scalar(5), scalar(1)], {}, {"plus": True}),
    ("Constant", [], {"value_floats": [1.0, 2.0]}, {"plus": True}),
    ("Trilu", [X], {"upper": 0}, {}),
]  # fmt: skip
THROUGH_OTHERS = {"Shape", "Size"}  # in test_sizes_follow_the_batch
RECURRENT = {"RNN", "GRU", "LSTM"}  # in test_onnx_recurrent.py
QUANTISED = {name for name in RULES if "Integer" in name or "Linear" in name}  # in test_onnx_quantised.py


def one_node(kind: str, inputs: list[Any], attributes: dict[str, Any], more: dict[str, Any]) -> onnx.ModelProto:
    """A file that casts its input as asked, applies the operator, and casts the results to float."""
    batch, shape = more.get("batch", "n"), more.get("shape", (6, 8, 8))
    nodes, constants, names = [], [], []
    source = X
    if (shift := more.get("shift")) is not None:
        constants.append(numpy_helper.from_array(scalar(shift), "shift"))
        nodes += [
            helper.make_node("Abs", [X], ["positive"]),
            helper.make_node("Add", ["positive", "shift"], ["shifted"]),
        ]
        source = "shifted"
    if (dtype := more.get("kind")) is not None:
        if dtype is np.int64:  # whole numbers from 0 to 3
            constants += [numpy_helper.from_array(scalar(3), "three")]
            nodes += [helper.make_node("Sigmoid", [X], ["s"]), helper.make_node("Mul", ["s", "three"], ["m"])]
            nodes += [helper.make_node("Cast", ["m"], ["cast"], to=onnx.TensorProto.INT64)]
        else:
            constants += [numpy_helper.from_array(scalar(0.2), "bound")]
            nodes += [helper.make_node("Greater", [X, "bound"], ["cast"])]
        source = "cast"
    for number, value in enumerate(inputs):
        if isinstance(value, str):
            names.append(source)
        elif value is None:
            names.append("")
        else:
            names.append(f"c{number}")
            constants.append(numpy_helper.from_array(value, f"c{number}"))
    count = more.get("outputs", 1)
    results = [f"r{number}" for number in range(count)]
    nodes.append(helper.make_node(kind, names, results, **attributes))
    nodes += [helper.make_node("Cast", [r], [f"f{r}"], to=onnx.TensorProto.FLOAT) for r in results]
    outputs = [f"f{r}" for r in results]
    if more.get("plus"):  # of constants alone; added to what follows from the input
        constants.append(numpy_helper.from_array(whole(1, 2, 3), "axes"))
        nodes.append(helper.make_node("ReduceSum", [X, "axes"], ["total"], keepdims=0))
        nodes.append(helper.make_node("ReduceSum", [outputs[0]], ["sum"], keepdims=0))
        nodes.append(helper.make_node("Add", ["total", "sum"], ["y"]))
        outputs = ["y"]
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info(X, onnx.TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", more.get("opset", 20))])
    model.ir_version = 10
    return model


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_an_operator_computes_what_onnxruntime_does(
    case: tuple[str, list[Any], dict[str, Any], dict[str, Any]],
) -> None:
    model = one_node(*case)
    inputs = inputs_of(model)
    assert compare(convert(model, inputs, "case.onnx"), model, inputs, "case.onnx") < 2e-6


def test_every_rule_has_a_case() -> None:
    assert set(RULES) - {case[0] for case in CASES} == THROUGH_OTHERS | RECURRENT | QUANTISED


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "Tanh", RULES["Sigmoid"].__globals__["identity"])
    model = one_node("Tanh", [X], {}, {})
    inputs = inputs_of(model)
    with pytest.raises(ConfigError, match=r"does not compute what onnxruntime does.*onnxruntime:case\.onnx"):
        compare(convert(model, inputs, "case.onnx"), model, inputs, "case.onnx")
