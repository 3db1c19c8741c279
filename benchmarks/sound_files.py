"""Sound files of every kind, small, for `file_readers.py`: what fuzzing starts from."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def model() -> Any:
    """A small one; written whole its file has the kinds of records that larger ones have."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)).eval()


def saved(write: Callable[[Any], None]) -> bytes:
    """What a function writes."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def in_a_file(write: Callable[[Path], object]) -> bytes:
    """What a function writes into a file of any name."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "file"))
        return Path(folder, "file").read_bytes()


def onnx_models() -> list[bytes]:
    """By hand and small: a convolution with its weights inside and beside, a function of its own, loops, whole numbers."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def made(nodes: list[Any], weights: dict[str, Any], **more: Any) -> bytes:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
        held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
        graph = helper.make_graph(nodes, "g", inputs, outputs, held)
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        whole = helper.make_model(graph, opset_imports=opsets, ir_version=9, **more)
        helper.set_model_props(whole, {"preprocess": json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3})})
        return bytes(whole.SerializeToString())

    node, weight = helper.make_node, np.ones((2, 3, 3, 3), np.float32)
    tail = [node("Relu", ["t"], ["r"]), node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["y"])]
    plain = made([node("Conv", ["x", "w"], ["t"], kernel_shape=[3, 3], pads=[1] * 4), *tail], {"w": weight})
    outside = onnx.load_model_from_string(plain)
    held = outside.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", "216")):
        held.external_data.add(key=key, value=value)
    shapes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "i"], ["b"], axis=0)]
    shapes += [node("Concat", ["b", "m"], ["v"], axis=0), node("Reshape", ["x", "v"], ["t"])]
    shapes += [node("MatMul", ["t", "w"], ["q"]), node("Softmax", ["q"], ["y"], axis=1)]
    numbers = {"i": np.array([0]), "m": np.array([-1]), "w": np.ones((192, 2), np.float32)}
    body = helper.make_function(
        "own", "twice", ["a"], ["c"], [node("Add", ["a", "a"], ["c"])], [helper.make_opsetid("", 18)]
    )
    function = made([node("twice", ["x"], ["t"], domain="own"), *tail], {}, functions=[body])
    return [plain, outside.SerializeToString(), made(shapes, numbers), function]


def exported() -> list[bytes]:
    from indistill_fx.deploy.export_onnx import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "a.onnx")
        export_onnx(model(), file, torch.randn(2, 3, 8, 8), preprocess=((0.5,) * 3, (0.5,) * 3))
        return [file.read_bytes()]


def stories() -> list[bytes]:
    step = {"name": "teacher", "macs": 10, "parameters": 5, "divergence": 0.5, "accuracy": 0.5, "latency_ms": None}
    step |= {"metric": "accuracy", "shown": "50.0%"}
    told = {"identity": {"request": {}, "teacher": "a"}, "seal": None, "made": 2, "steps": [step, step]}
    return [json.dumps({**told, "widths": {"a": [4, 2]}, "sensitivity": [], "repaired": None}).encode()]


def pictures() -> list[bytes]:
    from PIL import Image

    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
    return [saved(lambda file, kind=kind: Image.new("RGB", (4, 4)).save(file, kind)) for kind in kinds]


def picture_caches() -> list[bytes]:
    from safetensors.torch import save as to_bytes

    from indistill_fx.system.tensor_files import save_tensors

    held = {"images": torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "resized": torch.tensor(0)}
    told = {"format": "pictures 3"}
    return [in_a_file(lambda file: save_tensors(file, held, told)), to_bytes(held, told)]


def feature_indices() -> list[bytes]:
    from indistill_fx.system.tensor_files import text_digest

    digest = hashlib.sha256(bytes(96)).hexdigest()
    taps = {"layer1": {"file": "0.bin", "shape": [2, 3, 2, 2], "dtype": "float32", "digest": digest}}
    whole = json.dumps({"taps": taps, "digest": text_digest(taps)}).encode()
    return [whole, whole + b" "]
