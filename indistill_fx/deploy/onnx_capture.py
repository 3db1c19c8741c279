"""A module to an ONNX graph through torch's exporter, quietly; what stopped it comes back as one sentence."""

from __future__ import annotations

import copy
import logging
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from indistill_fx.deploy.nested_inputs import Form
from indistill_fx.deploy.onnx_session import named_outputs, open_axes
from indistill_fx.deploy.onnx_substitutes import Substitutes
from indistill_fx.errors import ConfigError, ExportError, first_lines
from indistill_fx.graph.module_state import device_of
from indistill_fx.graph.preprocess import FromPixels, Preprocess

if TYPE_CHECKING:
    import onnx_ir
    from torch.onnx import ONNXProgram


_TALKERS = ("torch", "onnxscript", "onnx_ir")
_NOISE = re.compile(r"\x1b\[[0-9;]*m|<class '([\w.]+)'>: ?")
_EXPORTERS = ("/torch/", "/onnxscript/", "/onnx_ir/")
_CODE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)\n\s*(.+)')
_HINTS = (
    ("data-dependent", "Its forward decides by a tensor's value; write that with torch.where, or decide beforehand."),
    ("No ONNX function", "The exporter has no ONNX form of this operation; replace it, or try another opset."),
    (
        "Unsupported attribute type",
        "An ONNX file holds such numbers as constants, but in the model one follows from the input's size, as the groups of a convolution "
        "with filters for each sample do: export with dynamic_batch=False (--fixed-batch).",
    ),
    ("onstraint", "A size is fixed in its code; pass dynamic_batch=False to export for the example's sizes only."),
)


class Deployed(nn.Module):
    """The module as it is deployed: a flat tuple of tensors out, and pixels in if preprocessing is asked for.

    Args:
        module: the user's.
        preprocess: what turns pixels into its first input; None: it takes that itself.
        form: how the inputs become its arguments; None: in order.
    """

    def __init__(self, module: nn.Module, preprocess: Preprocess | None, form: Form | None = None):
        super().__init__()
        self.module, self.form = module, form
        self.from_pixels = FromPixels(preprocess).to(device_of(module)) if preprocess else None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the module; outputs that are not tensors are left out."""
        return tuple(named_outputs(self.outputs(*inputs)).values())

    def normalised(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The module's own inputs."""
        return tuple(inputs) if self.from_pixels is None else (self.from_pixels(inputs[0]), *inputs[1:])

    def with_module(self, module: nn.Module) -> Deployed:
        """Another module in the same place, in eval mode."""
        new = Deployed(module, None, self.form).train(False)
        new.from_pixels = self.from_pixels
        return new

    def outputs(self, *inputs: Tensor) -> Any:
        """The module's own structure of outputs."""
        args, kwargs = self.arguments(inputs)
        return self.module(*args, **kwargs)

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The module's own arguments, in order and by name."""
        own = self.normalised(inputs)
        return (own, {}) if self.form is None else self.form.filled(own)


def capture(
    deployed: Deployed,
    inputs: Sequence[Tensor],
    *,
    opset: int | None,
    dynamic_batch: bool,
    dynamic_size: bool,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> ONNXProgram:
    """Export, name inputs and outputs, and see that every size asked to be dynamic is.

    Args:
        deployed: the module; in eval mode, autograd off.
        inputs: example tensors.
        opset: the ONNX operator set, or None for the exporter's own.
        dynamic_batch: leave the first dimension of every input open.
        dynamic_size: leave height and width of images open, and the length of texts.
        input_names: one per input.
        output_names: one per tensor put out.

    Returns:
        The exporter's program, not yet written.

    Raises:
        ConfigError: an opset this version of onnx does not know.
        ExportError: the exporter's reason, in one paragraph.
    """
    import onnx

    if opset is not None and not 7 <= opset <= onnx.defs.onnx_opset_version():
        newest = onnx.defs.onnx_opset_version()
        raise ConfigError(f"onnx {onnx.__version__} knows no opset {opset}.", where="opset", hint=f"Use 18..{newest}.")
    if dynamic_batch and len(inputs[0]) < 2:
        inputs = [torch.cat([x, x]) for x in inputs]  # torch.export would take a size of 1 for a constant
    inputs = [x.clone() for x in inputs]  # one tensor given twice would be one input
    shapes = _dynamic_shapes(inputs, batch=dynamic_batch, size=dynamic_size)
    try:
        with quiet(), _attention_as_exported(), Substitutes(), _EvenParts(), _functions_kept():
            program = torch.onnx.export(
                deployed, tuple(inputs), dynamo=True, opset_version=opset, dynamic_shapes=(shapes,), verbose=False
            )
    except Exception as error:
        reason, hint = explain(error)
        raise ExportError(
            f"torch cannot export `{type(deployed.module).__name__}` to ONNX: {reason}", hint=hint, where="export"
        ) from error
    if program is None:
        raise ExportError(
            f"torch returned no ONNX program for `{type(deployed.module).__name__}`.",
            where="export",
            hint="Try another --opset, or another version of torch.",
        )
    _keep_constants(program.model)
    _squeeze_ones_only(program.model)
    _require_opset(program.model, opset)
    _require_open(program.model, shapes, inputs)
    _tidy(program.model, input_names, output_names)
    return program


def _dynamic_shapes(inputs: Sequence[Tensor], *, batch: bool, size: bool) -> tuple[dict[int, Any], ...]:
    if size and not any(map(open_axes, inputs)):
        raise ConfigError(
            "`dynamic_size` needs an image (N, C, H, W) or a text (N, positions) as input; there is none.",
            where="dynamic_size",
            hint="Leave dynamic_size (--dynamic-size) out.",
        )
    dims = {name: torch.export.Dim(name) for name in ("batch", "height", "width")}
    texts = dict.fromkeys(x.shape[axes[0]] for x in inputs if len(axes := open_axes(x)) == 1)
    lengths = {n: torch.export.Dim("length" if k == 1 else f"length_{k}") for k, n in enumerate(texts, 1)}
    shapes = []
    for x in inputs:
        open_dims: dict[int, Any] = {0: dims["batch"]} if batch else {}
        axes = open_axes(x) if size else ()
        if len(axes) == 2:
            open_dims |= {axes[0]: dims["height"], axes[1]: dims["width"]}
        elif axes:
            open_dims |= {axes[0]: lengths[x.shape[axes[0]]]}
        shapes.append(open_dims)
    return tuple(shapes)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress what the exporter and the tracer print, log and warn; the module's own warnings were shown when it ran."""
    loggers = [logging.getLogger(name) for name in [*logging.root.manager.loggerDict] if name.startswith(_TALKERS)]
    levels = [(logger, logger.level) for logger in loggers]
    with open(os.devnull, "w") as sink, redirect_stdout(sink), redirect_stderr(sink), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in levels:
                logger.setLevel(level)


_FUNCTIONS: dict[Any, Any] = {}
"""The exporter's tables of ONNX functions, by opset."""


@contextmanager
def _functions_kept() -> Iterator[None]:
    """Within the block, the exporter's table of ONNX functions is built once a process, from the source of 500 functions.

    Left alone, it builds it anew for each file, which takes half of a small network's export. A torch that has no such table is left alone.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        build, _ = ONNXRegistry.from_torchlib, ONNXRegistry().functions
    except (ImportError, AttributeError):
        yield
        return

    def kept(*opset: Any, **named: Any) -> Any:
        key = (opset, *sorted(named.items()))
        if key not in _FUNCTIONS:
            _FUNCTIONS[key] = build(*opset, **named)
        new = copy.copy(_FUNCTIONS[key])
        new.functions = {name: list(forms) for name, forms in new.functions.items()}  # an export may add to them
        return new

    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(kept)):
        yield


@contextmanager
def _attention_as_exported() -> Iterator[None]:
    """Within the block, fused attention is written as the exporter needs it.

    Its tensors are reshaped to four axes, the only form that the exporter supports. A query whose mask leaves it nothing to look at
    gets 0, as in torch (padding on the left makes such queries); the exporter's softmax would give it the mean of all values.
    """
    fused: Callable[..., Tensor] = functional.scaled_dot_product_attention

    def original(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **more: Any
    ) -> Tensor:
        result = fused(query, key, value, attn_mask, *rest, **more)
        if attn_mask is None or attn_mask.dtype != torch.bool:
            return result
        return result.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        if query.ndim == 4 or not query.ndim == key.ndim == value.ndim:
            return original(query, key, value, attn_mask, *rest, **more)
        folded = [_four_axes(x) for x in (query, key, value)]
        if attn_mask is not None and attn_mask.ndim > 2:
            attn_mask = _four_axes(attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:]))
        result = original(*folded, attn_mask, *rest, **more)
        return result.reshape(*query.shape[:-1], value.shape[-1])

    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


def _four_axes(x: Tensor) -> Tensor:
    return x.flatten(0, -4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


class _EvenParts(TorchFunctionMode):
    """Within the block, an axis of open size is taken apart by `tensor_split` if its parts are equal, as in `torch.cat([a, b]).chunk(2)`.

    The number of parts that `chunk` and `split` make depends on the size, so torch.export would fix that.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or `tensor_split` in its place."""
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name in ("chunk", "split"):
            given = dict(zip(("input", name, "dim"), args, strict=False)) | {
                _ALIASES.get(k, k): named[k] for k in named
            }
            if (count := _equal_parts(**given)) is not None:
                return torch.tensor_split(given["input"], count, given.get("dim", 0))
        return func(*args, **named)


_ALIASES = {"tensor": "input", "chunks": "chunk", "split_size": "split", "split_size_or_sections": "split"}


def _equal_parts(input: Tensor, chunk: Any = None, split: Any = None, dim: int = 0) -> int | None:
    """Into how many equal parts an axis of open size is taken, if that is so for whatever size; else None."""
    size: Any = input.shape[dim]
    if not isinstance(size, torch.SymInt) or not isinstance(split, (torch.SymInt, type(None))):
        return None
    count = chunk if split is None else _at(size, 2) // max(_at(split, 2), 1)
    numbers = range(1, 9)
    even = all(_at(size, n) == count * (_at(size, n) // count if split is None else _at(split, n)) for n in numbers)
    return count if even else None


def _at(size: torch.SymInt, number: int) -> int:
    """What a size comes to if all open sizes that it is computed from are this number."""
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, number)))


def explain(error: BaseException) -> tuple[str, str]:
    """The exporter's reason in one sentence with the line of code it came from, and a hint."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _NOISE.sub("", str(error))
    code = [m for m in _CODE.finditer(text) if not any(part in m[1] for part in _EXPORTERS)]
    if code:
        place = f"{os.path.basename(code[-1][1])}:{code[-1][2]} in {code[-1][3]}: `{code[-1][4].strip()}`"
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(p in f.filename for p in _EXPORTERS)]
        frames = [f for f in frames if os.path.dirname(f.filename) != os.path.dirname(__file__)]
        place = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    reason = first_lines(RuntimeError(text.strip().split("\n\n")[0] or type(error).__name__), limit=400)
    hint = next((hint for sign, hint in _HINTS if sign in text), "")
    return f"{type(error).__name__}: {reason}" + (f" It comes from {place}." if place else ""), hint


def _require_opset(model: onnx_ir.Model, opset: int | None) -> None:
    got = model.opset_imports[""]
    if opset is not None and got != opset:
        raise ExportError(
            f"The model cannot be expressed in opset {opset}; torch's exporter kept opset {got}.",
            where="opset", got=got, expected=opset, hint=f"Leave the opset open, or ask for {got} or more.",
        )  # fmt: skip


def _require_open(model: onnx_ir.Model, shapes: Sequence[dict[int, Any]], inputs: Sequence[Tensor]) -> None:
    """Refuse a file whose batch or size became fixed: the exporter fixes a size silently if the code does."""
    for value, dims, x in zip(model.graph.inputs, shapes, inputs, strict=True):
        for axis, dim in dims.items():
            if value.shape is not None and isinstance(value.shape[axis], int):
                option = "dynamic_batch=False" if axis == 0 else "dynamic_size=False"
                raise ExportError(
                    f"The model's code fixes the {dim.__name__} of its input to {value.shape[axis]} (input shape "
                    f"{tuple(x.shape)}), for example by a reshape to a number or a loop over it.",
                    where=str(dim.__name__), got=value.shape[axis], expected="any size",
                    hint=f"Take the size from x.shape in the model's code, or export a fixed size with {option}.",
                )  # fmt: skip


def _keep_constants(model: onnx_ir.Model) -> None:
    """Add constants that the graph reads but lacks: the exporter loses them if clamps of one tensor have equal bounds."""
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None or value.is_graph_input():
                continue
            if not value.is_initializer():
                model.graph.register_initializer(value)


def _squeeze_ones_only(model: onnx_ir.Model) -> None:
    """Leave axes that are longer than 1 out of every Squeeze: in torch they stay, the exporter names them, and ONNX refuses that."""
    for node in model.graph.all_nodes():
        source, places = node.inputs if node.op_type == "Squeeze" and len(node.inputs) == 2 else (None, None)
        given = places.const_value if places is not None else None
        if given is None or source is None or source.shape is None:
            continue
        sizes, axes = list(source.shape), given.numpy().reshape(-1)
        ones = [int(axis) for axis in axes if sizes[axis] == 1]
        if not ones:
            node.op_type = "Identity"
            node.resize_inputs(1)
        elif len(ones) < len(axes):
            node.replace_input_with(1, _constant(model, f"{node.outputs[0].name}_axes", ones))
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _constant(model: onnx_ir.Model, name: str, values: Sequence[int]) -> onnx_ir.Value:
    import onnx_ir

    value = onnx_ir.val(name, const_value=onnx_ir.tensor(values, dtype=onnx_ir.DataType.INT64, name=name))
    model.graph.register_initializer(value)
    return value


def _tidy(model: onnx_ir.Model, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    """Set the requested names, name weights as in the user's module, and remove paths of this machine from the file."""
    graph = model.graph
    ends = [*graph.inputs, *graph.outputs]
    names = [*input_names, *output_names]
    outside = {id(v) for v in ends}
    inner = [v for node in graph.all_nodes() for v in node.outputs if id(v) not in outside]
    for value in [*inner, *graph.initializers.values()]:
        if value.name and value.name.startswith("module."):
            value.name = value.name.removeprefix("module.")
        if value.name in names:
            value.name = f"{value.name}__inner"
    for i, value in enumerate(ends):
        value.name = f"{i}__end"
    for value, name in zip(ends, names, strict=True):
        value.name = name
    for node in graph.all_nodes():
        node.metadata_props.clear()
    for value in [*ends, *inner]:
        value.metadata_props.clear()
