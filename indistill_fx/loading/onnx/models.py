"""ONNX files as models: converted to a graph of PyTorch's layers, or run by onnxruntime as they are (`loading.spec` has the forms).

A file that takes pixels and normalises them itself (`export --preprocess`) becomes a model that takes normalised images, as every other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import ConfigError
from indistill_fx.graph.preprocess import Preprocess, ToPixels
from indistill_fx.loading.onnx.black_box import black_box, free_path
from indistill_fx.loading.onnx.builder import LARGEST_CONSTANT
from indistill_fx.loading.onnx.convert import OnnxInput, convert, inputs_of
from indistill_fx.loading.onnx.read import read_onnx
from indistill_fx.loading.onnx.runtime import compare, example_of, is_quantised, tolerance_of
from indistill_fx.loading.onnx.stated import Stated, preprocess_in, stated_in

_FROM_FILE = "ONNX file"
"""Entry of a graph's `meta`."""


def is_from_file(module: nn.Module) -> bool:
    """Whether the module was read from an ONNX file."""
    return isinstance(module, fx.GraphModule) and _FROM_FILE in module.meta


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """What comes of an ONNX file.

    Args:
        module: a graph, in eval mode.
        input_size: the shape of one sample, where it has one input.
        fixed_size: height and width, where the file takes no others.
        example_inputs: where it has several inputs.
        notes: how it was made, and how near it comes to onnxruntime.
        stated: what the file states of itself.
    """

    module: nn.Module
    input_size: tuple[int, ...] | None
    fixed_size: tuple[int, int] | None
    example_inputs: tuple[Tensor, ...] | None
    notes: tuple[str, ...]
    stated: Stated


def convert_file(path: Path, shape: tuple[int, ...] | None = None) -> OnnxModel:
    """Convert an ONNX file, and compare the result with onnxruntime on two random batches.

    Args:
        path: the file.
        shape: of one sample of its first input, where it leaves that open.

    Raises:
        ConfigError: the file is damaged, has an operator without a rule (named), or the two differ.
    """
    model, inputs = _read(path, shape)
    module = convert(model, inputs, str(path))
    difference = compare(module, model, inputs, str(path))
    most = "the file is quantised: roundings add up" if is_quantised(model) else f"at most {tolerance_of(model):.0e}"
    note = f"converted from ONNX; its outputs differ from onnxruntime's by {difference:.1g} of the largest ({most})"
    fixed = inputs[0].batch
    notes = (note,) if fixed is None else (note, f"the file is made for {_samples(fixed)}, the graph for any number")
    return _described(module, model, inputs, notes, str(path), whole=False)


def run_file(path: Path, taps: Sequence[str], shape: tuple[int, ...] | None = None) -> OnnxModel:
    """An ONNX file that onnxruntime runs.

    Args:
        path: the file.
        taps: names of tensors in it that can be learned.
        shape: see `convert_file`.

    Raises:
        ConfigError: the file is damaged, onnxruntime refuses it, or it has no tensor of a name in `taps`.
    """
    model, inputs = _read(path, shape)
    module = black_box(model, inputs, taps, str(path))
    notes = ["run by onnxruntime on the CPU, without gradients; its work is not counted"]
    if not taps:
        names = [name for node in model.graph.node for name in node.output if name][:-1]
        sample_names = ", ".join(names[:: max(len(names) // 3, 1)][:3])
        notes.append(
            f"nothing but its outputs can be learned; ?taps=NAME,NAME adds tensors of the file, such as {sample_names}"
        )
    return _described(module, model, inputs, tuple(notes), str(path), whole=True)


def _read(path: Path, shape: tuple[int, ...] | None) -> tuple[onnx.ModelProto, Sequence[OnnxInput]]:
    """The file's model, and its inputs as the file takes them; the shape is that of images (channels, height, width) in every case."""
    model = read_onnx(path)
    if shape is not None and preprocess_in(model):
        shape = (*shape[1:], *shape[:1])
    return model, _bounded(inputs_of(model, shape))


def _bounded(inputs: Sequence[OnnxInput]) -> Sequence[OnnxInput]:
    for onnx_input in inputs:
        shape = (onnx_input.batch or 1, *onnx_input.shape)
        if (
            0 in shape
            or max(math.prod(shape), math.prod((onnx_input.batch or 1, *onnx_input.other))) > LARGEST_CONSTANT
        ):
            size = "x".join(map(str, shape))
            raise ConfigError(
                f"The input `{onnx_input.name}` of the ONNX file is too large: {size}.",
                where=onnx_input.name,
                got=size,
                hint="Give a smaller input: --input 3x224x224.",
            )
    return inputs


def _described(
    module: fx.GraphModule,
    model: onnx.ModelProto,
    inputs: Sequence[OnnxInput],
    notes: tuple[str, ...],
    where: str,
    *,
    whole: bool,
) -> OnnxModel:
    if built_in := preprocess_in(model):
        inputs = [_as_images(module, built_in, inputs[0], where, whole=whole), *inputs[1:]]
    module.meta[_FROM_FILE] = True
    first = inputs[0]
    single = len(inputs) == 1 and first.dtype.is_floating_point
    pictures = len(first.shape) == 3 and first.shape == first.other
    return OnnxModel(
        module,
        input_size=first.shape if single else None,
        fixed_size=(first.shape[1], first.shape[2]) if single and pictures else None,
        example_inputs=None if single else example_of(inputs, 1),
        notes=notes,
        stated=stated_in(model, first.shape[0] if len(first.shape) == 3 else None, where),
    )


def _as_images(
    module: fx.GraphModule, built_in: Preprocess, pixels: OnnxInput, where: str, *, whole: bool
) -> OnnxInput:
    """Let a graph take normalised images instead of the pixels that its first input is; what the input is then."""
    if pixels.dtype != torch.uint8 or len(pixels.shape) != 3 or len(built_in.mean) not in (1, pixels.shape[2]):
        raise ConfigError(
            f"`{where}` states that it normalises pixels, and its input `{pixels.name}` is not pixels (height, width, channels).",
            where=where,
            got=[str(pixels.dtype), *pixels.shape],
            hint="Export it again.",
        )
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    path = free_path("to_pixels", module)
    module.add_submodule(path, ToPixels(built_in, whole=whole))
    with module.graph.inserting_after(placeholders[-1]):
        made = module.graph.call_module(path)
    placeholders[0].replace_all_uses_with(made)
    made.args = (placeholders[0],)
    module.recompile()
    (height, width, channels), (more_height, more_width, _) = pixels.shape, pixels.other
    return replace(
        pixels, dtype=torch.float32, shape=(channels, height, width), other=(channels, more_height, more_width)
    )


def _samples(count: int) -> str:
    return "one sample at a time" if count == 1 else f"{count} samples at a time"
