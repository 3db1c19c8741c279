"""Read an ONNX file safely: no code, no paths out of its folder, and no size believed before it is checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import inliner, numpy_helper
from torch import Tensor

from indistill_fx.errors import ConfigError

LARGEST_FILE = (1 << 31) - 1
"""Bytes of a file and the weights beside it together: what one message of protobuf can hold."""
MOST_NODES = 50_000

_DTYPES: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model of a file, whole: weights kept beside it are in it, functions of its own are written out.

    Raises:
        ConfigError: it is damaged, too large, or its weights are not in files beside it.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise _refused(path, f"has {path.stat().st_size:,} bytes; at most {LARGEST_FILE:,} are read")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf raises its own exceptions
        raise _refused(path, f"is damaged, or not an ONNX file ({type(error).__name__})") from error
    check_texts(model, path)
    if not model.graph.node or not model.graph.output:
        raise _refused(path, "holds no network")
    if any(_has_sparse(graph) for graph in _graphs(model)):
        raise _refused(path, "has sparse weights, which are not read here")
    del model.training_info[:]
    _bring_in_weights(model, path)
    check_nodes(model, path)
    if model.functions:
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:  # the inliner raises exceptions of its own
            raise _refused(path, "has functions of its own that are called wrongly") from error
    if any(attribute.ref_attr_name for node in nodes_of(model.graph) for attribute in node.attribute):
        raise _refused(path, "refers to attributes of a function outside of one")
    return model


def check_texts(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model with names that are no text; protobuf gives them as bytes.

    Raises:
        ConfigError: it is one.
    """
    if not all(isinstance(text, str) for text in _texts(model)):
        raise _refused(path, "is damaged: a name in it is not text")


def _texts(message: Any) -> Iterator[object]:
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for part in value if hasattr(value, "add") else [value]:
                yield from _texts(part)
        elif field.type == field.TYPE_STRING:
            yield from value if hasattr(value, "append") else [value]


def check_nodes(model: onnx.ModelProto, path: Path) -> None:
    """Refuse a model that would end the process: of too many operators, or with one that onnxruntime does not survive.

    A model's own functions are counted written out: a few that call each other can stand for any number. A `Split` that leaves one
    of its outputs out is a segmentation fault in onnxruntime (1.27).

    Raises:
        ConfigError: it is one.
    """
    for graph in _graphs(model):
        for node in graph.node:
            if node.op_type == "Split" and "" in node.output:
                raise _refused(path, f"leaves out an output of its operator `Split` ({node.name or node.output[0]})")
    if _written_out(model) > MOST_NODES:
        raise _refused(path, f"has more than {MOST_NODES:,} operators once its functions are expanded")


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes of a graph, those of its inner graphs too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from nodes_of(inner)


def dtype_of(number: int, where: str) -> torch.dtype:
    """Torch's dtype for ONNX's.

    Raises:
        ConfigError: torch has none that this package uses.
    """
    if number not in _DTYPES:
        name = onnx.TensorProto.DataType.Name(number) if number in onnx.TensorProto.DataType.values() else str(number)
        raise ConfigError(
            f"`{where}` is of the type {name}, which is not read here.",
            where=where,
            got=name,
            hint="Convert these weights to float32, or run the file as a black box: onnxruntime:FILE.",
        )
    return _DTYPES[number]


def tensor_of(proto: onnx.TensorProto, where: str) -> Tensor:
    """A constant of the file as a tensor of its own memory.

    Raises:
        ConfigError: its numbers are fewer or more than its shape says, or of an unknown type.
    """
    dtype_of(proto.data_type, where)
    try:
        array = numpy_helper.to_array(proto)
        return torch.from_numpy(array.copy()).reshape(tuple(proto.dims))
    except (ValueError, TypeError, RuntimeError) as error:
        shape = "x".join(map(str, proto.dims))
        raise ConfigError(
            f"The constant `{where}` of the ONNX file is damaged: its numbers do not fill {shape}.",
            where=where,
            hint="Copy or download the file again.",
        ) from error


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes: numbers, texts, lists, tensors; inner graphs as they are."""
    found = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        elif isinstance(value, list) and value and isinstance(value[0], bytes):
            value = [text.decode("utf-8", "replace") for text in value]
        elif isinstance(value, onnx.TensorProto):
            value = tensor_of(value, f"{node.op_type} {node.name}")
        found[attribute.name] = value
    return found


def weights_beside(model: onnx.ModelProto, path: Path) -> list[tuple[onnx.TensorProto, Path, int, int]]:
    """The weights that a model keeps in files beside its own: tensor, file, first byte and number of bytes.

    Raises:
        ConfigError: one is not in a regular file of the same folder, or not within its bounds.
    """
    folder, found = path.parent.resolve(), []
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        external = {entry.key: entry.value for entry in tensor.external_data}
        name = external.get("location", "")
        if not name or not _lies_beside(folder, name):
            raise _refused(
                path, f"lacks its weights: {name[:200]!r} is not a file beside it, and only such files are read"
            )
        size = (folder / name).stat().st_size
        start, length = (_number(external.get(key)) for key in ("offset", "length"))
        start = start or 0
        length = size - start if length is None else length
        if start < 0 or length < 0 or start + length > size:
            raise _refused(path, f"has weights in {name!r} that end after that file's {size:,} bytes")
        found.append((tensor, folder / name, start, length))
    return found


def _lies_beside(folder: Path, name: str) -> bool:
    try:
        beside = (folder / name).resolve()
        return not Path(name).is_absolute() and beside.parent == folder and beside.is_file()
    except (OSError, ValueError, RuntimeError):  # the name is too long, holds a zero byte, or its links form a circle
        return False


def _bring_in_weights(model: onnx.ModelProto, path: Path) -> None:
    """Read external weights into the model; each must lie within the bounds of its file."""
    total = path.stat().st_size
    for tensor, file, start, length in weights_beside(model, path):
        total += length
        if total > LARGEST_FILE:
            raise _refused(path, f"has more than {LARGEST_FILE:,} bytes with the weights stored beside it")
        with file.open("rb") as content:
            content.seek(start)
            tensor.raw_data = content.read(length)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The main graph, the file's own functions, and the graphs inside their nodes."""
    todo: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while todo:
        graph = todo.pop()
        yield graph
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        todo += [inner for attribute in attributes for inner in (attribute.g, *attribute.graphs) if inner.ByteSize()]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in _graphs(model):
        yield from getattr(graph, "initializer", ())
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            yield from (tensor for tensor in (attribute.t, *attribute.tensors) if tensor.ByteSize())


def _has_sparse(graph: onnx.GraphProto | onnx.FunctionProto) -> bool:
    sparse = (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS)
    return bool(getattr(graph, "sparse_initializer", ())) or any(
        attribute.type in sparse for node in graph.node for attribute in node.attribute
    )


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else -1


def _written_out(model: onnx.ModelProto) -> int:
    """How many nodes there are after inlining the file's own functions; counting stops at the limit."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], depth: int) -> int:
        if depth > 100:
            return MOST_NODES + 1
        if key not in sizes:
            calls = Counter((node.domain, node.op_type) for node in bodies[key].node)
            sizes[key] = sum(n * (size(call, depth + 1) if call in bodies else 1) for call, n in calls.items())
        return min(sizes[key], MOST_NODES + 1)

    calls = Counter((node.domain, node.op_type) for node in nodes_of(model.graph))
    return sum(n * (size(call, 0) if call in bodies else 1) for call, n in calls.items())


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"`{path}` {why}.", where=str(path), expected="an ONNX model", hint="Copy, download or export it again."
    )
