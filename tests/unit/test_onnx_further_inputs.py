"""Converted files on inputs that the conversion did not see: other sizes of free axes, ties, infinities, overflow, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from indistill_fx.deploy.onnx_session import graph_of
from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.models import convert_file

DRAW = np.random.default_rng(0)
Node = onnx.NodeProto


def drawn(*shape: int) -> np.ndarray:
    return DRAW.normal(size=shape).astype(np.float32)


def whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> Node:
    return helper.make_node(kind, inputs.split(), outputs.split(), **attributes)


def graph(
    nodes: list[Node],
    inputs: dict[str, list[Any]],
    outputs: dict[str, int],
    constants: dict[str, np.ndarray],
    kind: int,
) -> Any:
    return helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, one, None) for name, one in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip


def saved(
    folder: Path,
    nodes: list[Node],
    shape: list[Any],
    outputs: dict[str, int] | None = None,
    *,
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
    **constants: Any,
) -> Path:
    main = graph(
        nodes,
        {"x": shape},
        outputs or {"y": kind},
        {name: np.asarray(value) for name, value in constants.items()},
        kind,
    )
    path = folder / "model.onnx"
    path.write_bytes(
        helper.make_model(main, opset_imports=[helper.make_opsetid("", opset)], ir_version=9).SerializeToString()
    )
    return path  # fmt: skip


def same(path: Path, *feeds: np.ndarray) -> None:
    """The converted file and onnxruntime: the same numbers, shapes and types."""
    module = convert_file(path).module
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for x in feeds:
        with torch.no_grad():
            found = module(torch.from_numpy(x))
        values = list(found.values()) if isinstance(found, dict) else [found]
        for got, expected in zip(values, session.run(None, {"x": x}), strict=True):
            torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


HEIGHT = [node("Shape", "x", "shape"), node("Gather", "shape two", "height")]
IMAGES = ["N", 3, "H", "W"]


@pytest.mark.parametrize("place", ["SAME_UPPER", "SAME_LOWER"])
def test_same_padding_of_free_sizes(tmp_path: Path, place: str) -> None:
    window = {"auto_pad": place, "strides": [2, 3]}
    odd = drawn(1, 3, 33, 33), drawn(2, 3, 32, 35), drawn(1, 3, 7, 4)
    same(saved(tmp_path, [node("Conv", "x w", "y", **window)], IMAGES, w=drawn(2, 3, 3, 5)), *odd)
    same(saved(tmp_path, [node("MaxPool", "x", "y", kernel_shape=[3, 3], **window)], IMAGES), *odd)
    sound = [node("MaxPool", "x", "y", kernel_shape=[9], auto_pad=place, strides=[4])]
    same(saved(tmp_path, sound, ["N", 3, "T"]), drawn(1, 3, 16_001), drawn(2, 3, 32))


def test_the_smaller_of_a_size_and_a_number(tmp_path: Path) -> None:
    nodes = [*HEIGHT, node("Min", "height cap", "end"), node("Slice", "x zero end two", "y")]
    same(
        saved(tmp_path, nodes, ["N", 1, "H", 4], two=whole(2), cap=whole(300), zero=whole(0)),
        drawn(1, 1, 400, 4),
        drawn(1, 1, 40, 4),
    )


def branch(kind: str, name: str) -> Any:
    return graph([node(kind, "x", name)], {}, {name: TensorProto.FLOAT}, {}, TensorProto.FLOAT)


DECISIONS = {
    "if": [
        node("Mod", "height two", "rest"), node("Equal", "rest zero", "both"), node("Squeeze", "both", "even"),
        node("If", "even", "y", then_branch=branch("Identity", "a"), else_branch=branch("Neg", "b")),
    ],
    "where": [
        node("Mod", "height nine", "rest"), node("Cast", "rest", "some", to=TensorProto.BOOL),
        node("Where", "some two nine", "end"), node("Slice", "x zero end two", "y"),
    ],
    "sign": [
        node("Neg", "height", "below"), node("Div", "below two", "half"), node("Neg", "half", "end"), node("Slice", "x zero end two", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DECISIONS)
def test_what_the_size_decides_is_refused(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path, [*HEIGHT, *DECISIONS[name]], ["N", 1, "H", 4], two=whole(2), nine=whole(9), zero=whole(0))
    with pytest.raises(ConfigError, match=r"compares a size of the input|divides sizes with a sign"):
        convert_file(path)


def test_a_size_that_the_first_two_hide_is_compared_at_a_third(tmp_path: Path) -> None:
    length = [node("Slice", "x zero ten one", "part"), node("Shape", "part", "shape"), node("Gather", "shape one", "n")]
    nodes = [*length, node("Cast", "n", "real", to=TensorProto.FLOAT), node("Div", "part real", "y")]
    with pytest.raises(ConfigError, match="inputs of 2x5"):
        convert_file(saved(tmp_path, nodes, ["N", "T", 4, 2, 2], zero=whole(0), ten=whole(10), one=whole(1)))


def test_scales_are_those_that_people_wrote(tmp_path: Path) -> None:
    scales = np.array([1, 1, 1.4, 1.4], np.float32)
    same(
        saved(tmp_path, [helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear")], IMAGES, s=scales),
        drawn(1, 3, 5, 10),
        drawn(1, 3, 15, 35),
    )


def test_whole_numbers_keep_their_type(tmp_path: Path) -> None:
    power = saved(tmp_path, [node("Pow", "x e", "y")], ["N", 3], kind=TensorProto.INT64, e=np.float32(0.5))
    same(power, np.array([[2, 3, 9]]))
    for nodes in (
        [node("ReduceSum", "x one", "y")],
        [node("CumSum", "x first", "y")],
        [node("ReduceL1", "x", "y", axes=[1])],
    ):
        path = saved(tmp_path, nodes, ["N", 3], kind=TensorProto.INT32, one=whole(1), first=np.int32(1))
        same(path, np.array([[5, -1, 0]], np.int32))


def test_signs_of_infinity(tmp_path: Path) -> None:
    for wanted in ({}, {"detect_negative": 0}, {"detect_positive": 0}):
        nodes = [node("IsInf", "x", "found", **wanted), node("Cast", "found", "y", to=TensorProto.FLOAT)]
        same(saved(tmp_path, nodes, ["N", 3]), np.array([[-np.inf, np.inf, 1]], np.float32))


def test_of_equal_entries_the_first(tmp_path: Path) -> None:
    ties = np.zeros((1, 40), np.float32), drawn(2, 40).round()
    for largest in (0, 1):
        same(
            saved(
                tmp_path,
                [node("TopK", "x k", "v y", largest=largest)],
                ["N", 40],
                {"y": TensorProto.INT64, "v": TensorProto.FLOAT},
                k=whole(5),
            ),
            *ties,
        )
    same(
        saved(
            tmp_path,
            [node("TopK", "x", "v y", k=5)],
            ["N", 40],
            {"y": TensorProto.INT64, "v": TensorProto.FLOAT},
            opset=9,
        ),
        *ties,
    )


def test_negative_places_count_from_the_end(tmp_path: Path) -> None:
    nodes = [
        node("Greater", "x zero", "above"), node("Cast", "above", "number", to=TensorProto.INT64),
        node("Sub", "number one", "place"), node("GatherElements", "x place", "y", axis=1),
    ]  # fmt: skip
    same(saved(tmp_path, nodes, ["N", 3], zero=np.float32(0), one=np.int64(1)), drawn(4, 3))


def test_half_precision_is_compared_as_such(tmp_path: Path) -> None:
    nodes = [node("Gemm", "x w", "a"), node("Relu", "a", "b"), node("Gemm", "b v", "y")]
    weights = {"w": drawn(64, 64).astype(np.float16), "v": drawn(64, 8).astype(np.float16)}
    convert_file(saved(tmp_path, nodes, ["N", 64], kind=TensorProto.FLOAT16, **weights))


def test_a_product_that_a_branch_reads_too_stays(tmp_path: Path) -> None:
    inner = [
        graph([node(kind, "m", name)], {}, {name: TensorProto.FLOAT}, {}, TensorProto.FLOAT)
        for kind, name in (("Neg", "a"), ("Abs", "b"))
    ]
    nodes = [
        node("MatMul", "x w", "m"), node("Add", "m b0", "sum"),
        node("If", "flag", "i", then_branch=inner[0], else_branch=inner[1]), node("Add", "sum i", "y"),
    ]  # fmt: skip
    same(saved(tmp_path, nodes, ["N", 6], w=drawn(6, 4), b0=drawn(4), flag=np.bool_(False)), drawn(2, 6))


def test_the_mask_of_a_dropout_keeps_all(tmp_path: Path) -> None:
    nodes = [node("Dropout", "x", "a mask"), node("Cast", "mask", "m", to=TensorProto.FLOAT), node("Add", "a m", "y")]
    same(saved(tmp_path, nodes, ["N", 6]), drawn(2, 6))


def test_padding_of_whole_numbers(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        [node("MaxPool", "x", "y", kernel_shape=[2, 2], pads=[0, 0, 1, 1])],
        ["N", 3, 6, 6],
        kind=TensorProto.UINT8,
    )
    same(path, DRAW.integers(0, 9, (1, 3, 6, 6)).astype(np.uint8))


def test_a_split_that_leaves_an_output_out_is_refused_before_it_ends_the_process(tmp_path: Path) -> None:
    nodes = [helper.make_node("Split", ["x"], ["a", "", "c"], axis=1), node("Add", "a c", "y")]
    path = saved(tmp_path, nodes, ["N", 6], opset=13)
    for read in (convert_file, graph_of):
        with pytest.raises(ConfigError, match="leaves out an output of its operator `Split`"):
            read(path)
