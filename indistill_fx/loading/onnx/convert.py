"""From an ONNX model to a torch.fx graph over layers of torch.nn.

Rules, in order:
  1. The first axis of every input is the batch, and may be of any length; where the file fixes it, the comparison with onnxruntime
     shows whether other lengths compute the same.
  2. Every operator is put into the graph by the rule that `table` has for it; one without a rule ends it, and is named.
  3. What follows from constants and fixed sizes alone is computed at once; sizes of free axes are numbers in the graph.
  4. A product with a constant matrix and the bias added to it are one linear layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import Tensor, fx

from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.builder import Builder, Op, plain_name, settled
from indistill_fx.loading.onnx.read import attributes_of, dtype_of, tensor_of
from indistill_fx.loading.onnx.table import RULES, SIZE_RULES
from indistill_fx.loading.onnx.values import Traced, Undecided, Value

# Two batch sizes with many divisors, so that no quotient is the same for both.
_COUNTS = (5040, 7560)
_LARGEST = 1 << 28
"""Entries of one tensor of two samples: 1 GiB in float32."""


@dataclass(frozen=True, slots=True)
class OnnxInput:
    """An input of the file.

    Args:
        name: in the file.
        dtype: torch's.
        batch: how many samples the file is fixed to; None: any.
        shape: of one sample.
        other: another shape that it may have; the same where nothing is free.
    """

    name: str
    dtype: torch.dtype
    batch: int | None
    shape: tuple[int, ...]
    other: tuple[int, ...]


def inputs_of(model: onnx.ModelProto, shape: tuple[int, ...] | None = None) -> tuple[OnnxInput, ...]:
    """The inputs that a model is fed with.

    Args:
        model: the file's.
        shape: of a sample of its first input, where the file leaves it open; by default 224 for sides of images, 16,000 for
            sounds, 16 for anything else.

    Raises:
        ConfigError: one has no batch axis, or another type than a tensor of numbers; or the shape does not fit.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    lengths: dict[str, tuple[int, int]] = {}
    found: list[OnnxInput] = []
    for value in model.graph.input:
        if value.name in held:
            continue
        tensor = value.type.tensor_type
        dims = list(tensor.shape.dim)
        if not value.type.HasField("tensor_type") or not tensor.HasField("shape") or not dims:
            raise _unfit(f"its input `{value.name}` has no batch axis")
        dtype = dtype_of(tensor.elem_type, value.name)
        given = shape if not found else None
        if given is not None and not _fits(dims[1:], given):
            raise ConfigError(
                f"The input `{value.name}` of the ONNX file is not {'x'.join(map(str, given))}.",
                where=value.name,
                expected=_written(dims[1:]),
            )
        pairs = [_length(dim, place, dims, dtype, given, lengths) for place, dim in enumerate(dims[1:])]
        batch = dims[0].dim_value if dims[0].dim_value > 0 else None
        found.append(
            OnnxInput(
                value.name, dtype, batch, tuple(length for length, _ in pairs), tuple(other for _, other in pairs)
            )
        )
    if not found:
        raise _unfit("it has no inputs")
    if len({plain_name(pairs.name) for pairs in found}) < len(found):
        raise _unfit(f"two of its inputs have the same name ({', '.join(entry.name for entry in found)})")
    if len({output.name for output in model.graph.output}) < len(model.graph.output):
        raise _unfit("two of its outputs have the same name")
    if len({entry.batch for entry in found}) > 1:
        batch_texts = ", ".join(f"`{entry.name}` {entry.batch or 'any'}" for entry in found)
        raise _unfit(f"its inputs begin with different lengths ({batch_texts})")
    return tuple(found)


def _unfit(why: str) -> ConfigError:
    return ConfigError(
        f"The ONNX file is not a teacher: {why}.",
        where="inputs",
        expected="inputs whose first axis is the batch",
        hint="A model with a state or a switch beside its data (a recurrent state, a sampling rate) needs a wrapper in PyTorch.",
    )


def convert(model: onnx.ModelProto, inputs: Sequence[OnnxInput], where: str) -> fx.GraphModule:
    """The model as a graph, in eval mode.

    Args:
        model: from `read_onnx`.
        inputs: of `inputs_of`.
        where: the file's name, for messages.

    Returns:
        A module whose result is a tensor, or a dict of tensors by the names of the file's outputs where it has several. Layers are
        named by their weights.

    Raises:
        ConfigError: an operator has no rule, or its rule does not cover what the file asks of it; names operator and node.
    """
    build = Builder(_COUNTS, batch=inputs[0].batch)
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    scope: dict[str, Value] = {}
    with torch.device("meta"):
        for onnx_input in inputs:
            shapes = zip(_COUNTS, (onnx_input.shape, onnx_input.other), strict=True)
            samples = [torch.empty((count, *shape), dtype=onnx_input.dtype) for count, shape in shapes]
            scope[onnx_input.name] = build.placeholder(onnx_input.name, samples)
    _Conversion(build, opset, where).run(model.graph, scope)
    results: dict[str, Any] = {}
    for output in model.graph.output:
        value = scope.get(output.name)
        if not isinstance(value, Traced):
            raise ConfigError(
                f"The output `{output.name}` of `{where}` does not follow from its input.",
                where=where,
                hint="Export the model again with all that it computes from its inputs.",
            )
        results[output.name] = value.node
    build.graph.output(results if len(results) > 1 else next(iter(results.values())))
    made = fx.GraphModule(build.root, build.graph, class_name="FromOnnx")
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.recompile()
    return made.eval()


@dataclass(frozen=True, slots=True)
class _Conversion:
    build: Builder
    opset: int
    where: str

    def run(self, graph: onnx.GraphProto, scope: dict[str, Value]) -> None:
        """Convert all nodes of a graph in order; their results are then in the scope."""
        for tensor in graph.initializer:
            value = tensor_of(tensor, tensor.name)
            scope[tensor.name] = value
            self.build.names[id(value)] = tensor.name
        used = Counter(name for node in graph.node for name in _names_read(node))
        used.update(output.name for output in graph.output)
        readers = {name: node for node in graph.node for name in node.input}
        done: set[str] = set()
        for node in graph.node:
            if node.output and node.output[0] in done:
                continue
            op = self._op(node, scope)
            bias = readers.get(node.output[0]) if node.op_type == "MatMul" and used[node.output[0]] == 1 else None
            if bias is not None and (op_with_bias := _with_bias(op, node, bias, scope)) is not None:
                scope[bias.output[0]] = self._apply(op_with_bias, node)
                done.add(bias.output[0])
                continue
            if node.op_type == "If":
                self._branch(op, node, scope)
                continue
            result = self._apply(op, node)
            results = dict(zip(node.output, result if isinstance(result, tuple) else (result,), strict=False))
            scope.update(results)
            self.build.names.update(
                {
                    id(value): name
                    for name, value in results.items()
                    if isinstance(value, Tensor) and id(value) not in self.build.names
                }
            )

    def _op(self, node: onnx.NodeProto, scope: Mapping[str, Value]) -> Op:
        missing = next((name for name in node.input if name and name not in scope), None)
        if missing is not None:
            raise ConfigError(
                f"`{self.where}` is damaged: its node {_named(node)} reads `{missing}`, which nothing before it makes.",
                where=self.where,
                hint="Export the file again.",
            )
        inputs = tuple(scope[name] if name else None for name in node.input)
        outputs = sum(bool(name) for name in node.output)
        return Op(node.op_type, _named(node), inputs, tuple(node.input), attributes_of(node), self.opset, outputs)

    def _apply(self, op: Op, node: onnx.NodeProto) -> Any:
        known = node.domain in ("", "ai.onnx") and (op.kind in RULES or op.kind in SIZE_RULES)
        if not known:
            domain = f"{node.domain}." if node.domain else ""
            raise self._refused(f"there is no rule for the operator `{domain}{op.kind}` (node `{op.name}`)")
        plain = [value for value in op.inputs if value is not None]
        of_sizes = any(not isinstance(value, (Tensor, Traced)) for value in plain)
        try:
            if of_sizes and op.kind in SIZE_RULES and not any(isinstance(value, Traced) for value in plain):
                return settled(SIZE_RULES[op.kind](op))
            result = settled(RULES[op.kind](op, self.build))
        except Undecided as reason:
            raise self._refused(f"the operator `{op.kind}` (node `{op.name}`) {reason}") from reason
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, OverflowError) as error:
            text = " ".join(str(error).split())[:200].rstrip(".")
            raise self._refused(
                f"the operator `{op.kind}` (node `{op.name}`) does not fit its inputs: {text}"
            ) from error
        self._bound(result, op)
        return result

    def _branch(self, op: Op, node: onnx.NodeProto, scope: dict[str, Value]) -> None:
        """Convert an If whose condition is known: only the branch that is taken."""
        condition = op.inputs[0]
        if not isinstance(condition, Tensor):
            raise self._refused(f"the operator `If` (node `{op.name}`) decides by the data")
        branch = op.attributes["then_branch" if bool(condition) else "else_branch"]
        inner = dict(scope)
        self.run(branch, inner)
        scope.update(zip(node.output, (inner[output.name] for output in branch.output), strict=True))

    def _bound(self, result: Any, op: Op) -> None:
        for value in result if isinstance(result, tuple) else (result,):
            if isinstance(value, Traced) and value.samples[0].numel() // self.build.counts[0] * 2 > _LARGEST:
                raise self._refused(f"the operator `{op.kind}` (node `{op.name}`) makes a tensor too large to compare")

    def _refused(self, why: str) -> ConfigError:
        fixed = f" The file is made for a batch of {self.build.batch}." if self.build.batch is not None else ""
        return ConfigError(
            f"`{self.where}` cannot be converted: {why}.{fixed}",
            where=self.where,
            hint=f"Let onnxruntime run it as it is: onnxruntime:{self.where}, with ?taps=NAME,NAME for tensors inside"
            " (a teacher only).",
        )


def _with_bias(op: Op, node: onnx.NodeProto, add: onnx.NodeProto, scope: Mapping[str, Value]) -> Op | None:
    """Rule 4: a matrix product together with the bias that the next node adds."""
    weight = op.inputs[1]
    other = next((name for name in add.input if name != node.output[0]), "")
    bias = scope.get(other)
    fits = (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and isinstance(bias, Tensor)
        and isinstance(op.inputs[0], Traced)
    )
    if add.op_type != "Add" or not fits or tuple(bias.shape) != (weight.shape[1],):  # type: ignore[union-attr]
        return None
    return Op(op.kind, op.name, (*op.inputs, bias), (*op.names, other), op.attributes, op.opset)


def _names_read(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, inside its branches too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _names_read(inner)
        yield from (output.name for output in attribute.g.output)


def _named(node: onnx.NodeProto) -> str:
    return node.name or next(iter(node.output), "") or node.op_type


def _length(
    dim: Any, place: int, dims: Sequence[Any], dtype: torch.dtype, given: Any, lengths: dict[str, tuple[int, int]]
) -> tuple[int, int]:
    """Two possible lengths of an axis."""
    if dim.dim_value > 0:
        return dim.dim_value, dim.dim_value
    if dim.dim_param and dim.dim_param in lengths:
        return lengths[dim.dim_param]
    if len(dims) == 4 and place > 0:
        length, more = 224, 32
    else:
        length = 16_000 if dtype.is_floating_point and len(dims) == 2 else 16
        more = length // 2
    length = given[place] if given is not None else length
    if dim.dim_param:
        lengths[dim.dim_param] = length, length + more
    return length, length + more


def _fits(dims: Sequence[Any], shape: tuple[int, ...]) -> bool:
    return len(dims) == len(shape) and all(d.dim_value in (0, n) for d, n in zip(dims, shape, strict=True))


def _written(dims: Sequence[Any]) -> str:
    return "x".join(str(dim.dim_value) if dim.dim_value > 0 else dim.dim_param or "?" for dim in dims)
