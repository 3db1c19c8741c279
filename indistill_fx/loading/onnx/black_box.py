"""An ONNX model that onnxruntime runs: a graph of the parts between the tensors that are asked for, without gradients.

Every tensor asked for ends a part; a part begins with the inputs and the tensors asked for before it. So a stage that needs a tensor
in the middle runs the file up to it, and no further.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from indistill_fx.errors import ConfigError, nearest
from indistill_fx.graph.opaque import Opaque
from indistill_fx.loading.onnx.builder import plain_name
from indistill_fx.loading.onnx.convert import OnnxInput
from indistill_fx.loading.onnx.read import dtype_of, nodes_of
from indistill_fx.loading.onnx.runtime import open_session, run_session
from indistill_fx.system.shortage import instead_of_any


class OnnxPart(Opaque):
    """A part of an ONNX file, from some of its tensors to one.

    Args:
        model: the part.
        dtypes: of its inputs, in order.
        batch: how many samples it is fixed to; None: any.
        where: the file's name, for messages.
    """

    digest: Tensor

    def __init__(self, model: onnx.ModelProto, dtypes: Sequence[torch.dtype], batch: int | None, where: str):
        super().__init__()
        self._session = _Shared(open_session(model, where))
        self._dtypes, self._batch = tuple(dtypes), batch
        # Cache keys and fingerprints are computed from a module's tensors; the digest makes them depend on the file.
        code = hashlib.sha256(model.SerializeToString(deterministic=True)).digest()
        self.register_buffer("digest", torch.tensor(list(code), dtype=torch.uint8), persistent=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The part's tensor, on the device of its first input."""
        given = [value.to(dtype) for value, dtype in zip(inputs, self._dtypes, strict=True)]
        shapes = " and ".join("x".join(map(str, value.shape)) for value in given)
        hint = "If it was made for other images, convert these (--size, --channels), or use another data set."
        failed = ConfigError(f"onnxruntime fails on inputs of {shapes}", where="inputs", got=shapes, hint=hint)
        with instead_of_any(failed):
            return run_session(self._session.value, given, self._batch)[0].to(inputs[0].device)


@dataclass(frozen=True, slots=True)
class _Shared:
    """A container whose content all copies of a module share."""

    value: Any

    def __deepcopy__(self, memo: object) -> _Shared:
        return self


def black_box(model: onnx.ModelProto, inputs: Sequence[OnnxInput], taps: Sequence[str], where: str) -> fx.GraphModule:
    """The model as a chain of parts.

    Args:
        model: from `read_onnx`.
        inputs: of `inputs_of`.
        taps: names of tensors in the file that can be learned, beside its outputs.
        where: the file's name, for messages.

    Returns:
        A module whose result is a tensor, or a dict of tensors by the names of the file's outputs where it has several. Every tap is the
        output of a module of its name; signs that a path cannot have are low lines.

    Raises:
        ConfigError: a tap is none of the file's tensors, or onnxruntime refuses the file.
    """
    made = {name: place for place, node in enumerate(model.graph.node) for name in node.output if name}
    outputs = [output.name for output in model.graph.output]
    unknown = next((tap for tap in taps if tap not in made), None)
    if unknown is not None:
        hint = nearest(unknown, made)
        raise ConfigError(f"`{where}` computes no tensor `{unknown}`.", where=unknown, got=unknown, hint=hint)
    missing = next((name for name in outputs if name not in made), None)
    if missing is not None:
        raise ConfigError(
            f"No operator of `{where}` computes its output `{missing}`.",
            where=where,
            hint="Export the file again.",
        )
    wanted = sorted(dict.fromkeys((*taps, *outputs)), key=made.__getitem__)
    kinds = _kinds(model)
    graph, root = fx.Graph(), torch.nn.Module()
    known: dict[str, fx.Node] = {
        onnx_input.name: graph.placeholder(plain_name(onnx_input.name)) for onnx_input in inputs
    }
    dtypes = {onnx_input.name: onnx_input.dtype for onnx_input in inputs}
    for name in wanted:
        part, begins = _part(model, name, known, made, kinds)
        if not begins:
            raise ConfigError(
                f"The tensor `{name}` of `{where}` does not follow from its input.",
                where=name,
                hint="Name a tensor that does, as Netron shows it.",
            )
        path = free_path(name, root)
        root.add_module(path, OnnxPart(part, [dtypes[tensor] for tensor in begins], inputs[0].batch, where))
        known[name] = graph.call_module(path, tuple(known[tensor] for tensor in begins))
        dtypes[name] = _torch_kind(kinds.get(name, onnx.TensorProto.FLOAT))
    results = {name: known[name] for name in outputs}
    graph.output(results if len(results) > 1 else known[outputs[0]])
    return fx.GraphModule(root, graph, class_name="OnnxBlackBox").eval()


def _part(
    model: onnx.ModelProto, target: str, known: Iterable[str], made: Mapping[str, int], kinds: Mapping[str, int]
) -> tuple[onnx.ModelProto, list[str]]:
    """The nodes that compute a tensor from known ones, and which of the known ones they read."""
    constants = {tensor.name for tensor in model.graph.initializer}
    ready, begins, places, read = set(known), dict[str, None](), set[int](), set[str]()
    todo = [target]
    while todo:
        name = todo.pop()
        if name in read:
            continue
        read.add(name)
        if name in ready:
            begins[name] = None
        elif name in made and made[name] not in places:
            places.add(made[name])
            todo += _reads(model.graph.node[made[name]])
    graph = onnx.helper.make_graph(
        [model.graph.node[place] for place in sorted(places)],
        "part",
        [onnx.helper.make_tensor_value_info(name, kinds.get(name, onnx.TensorProto.FLOAT), None) for name in begins],
        [onnx.helper.make_tensor_value_info(target, kinds.get(target, onnx.TensorProto.FLOAT), None)],
        [tensor for tensor in model.graph.initializer if tensor.name in read & constants],
    )
    made_of = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return made_of, list(begins)


def _reads(node: onnx.NodeProto) -> list[str]:
    """The tensors that a node reads, including those read by its inner graphs."""
    inner = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
    deeper = [name for graph in inner for inner_node in nodes_of(graph) for name in inner_node.input]
    ends = [output.name for graph in inner for output in graph.output]
    return [name for name in (*node.input, *deeper, *ends) if name]


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every tensor that onnx can infer."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # shape inference failed; all tensors are assumed to be real numbers
        graph = model.graph
    return {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}


def _torch_kind(kind: int) -> torch.dtype:
    return dtype_of(kind or onnx.TensorProto.FLOAT, "tensor")


def free_path(name: str, root: torch.nn.Module) -> str:
    """A module name from a tensor's name, with underscores for characters that a path cannot contain."""
    path, number = plain_name(name), 1
    while hasattr(root, path):
        number += 1
        path = f"{plain_name(name)}_{number}"
    return path
