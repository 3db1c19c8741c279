"""ONNX files as models: converted to a graph of PyTorch's layers, or run by onnxruntime as they are (`spec` has the forms)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.loading.file_kinds import recognise
from indistill_fx.loading.inputs import parse_input
from indistill_fx.loading.spec import LARGEST_IN_A_FILE, is_input_size


@dataclass(frozen=True, slots=True)
class OnnxModel:
    """What comes of an ONNX file.

    Args:
        module: a graph, in eval mode.
        input_size: the shape of one sample, where it has one input.
        fixed_size: height and width, where the file takes no others.
        example_inputs: where it has several inputs.
        notes: how it was made, and how near it comes to onnxruntime.
    """

    module: nn.Module
    input_size: tuple[int, ...] | None
    fixed_size: tuple[int, int] | None
    example_inputs: tuple[Tensor, ...] | None
    notes: tuple[str, ...]


def load_onnx(path: Path, arguments: Mapping[str, Any]) -> OnnxModel:
    """Convert an ONNX file, and compare the result with onnxruntime on two random batches.

    Raises:
        ConfigError: the file is damaged, has an operator without a rule (named), or the two differ.
    """
    from indistill_fx.loading.onnx.convert import convert
    from indistill_fx.loading.onnx.read import read_onnx
    from indistill_fx.loading.onnx.runtime import TOLERANCE, compare

    _require_arguments(path, arguments, "input")
    model = read_onnx(path)
    inputs = _inputs(model, arguments)
    module = convert(model, inputs, str(path))
    difference = compare(module, model, inputs, str(path))
    note = f"converted from ONNX; its outputs differ from onnxruntime's by {difference:.1g} of the largest (at most {TOLERANCE:.0e})"
    fixed = inputs[0].batch
    notes = (note,) if fixed is None else (note, f"the file is made for {_samples(fixed)}, the graph for any number")
    return _described(module, inputs, notes)


def load_black_box(path: Path, arguments: Mapping[str, Any]) -> OnnxModel:
    """An ONNX file that onnxruntime runs.

    Raises:
        ConfigError: the file is damaged, onnxruntime refuses it, or it has no tensor of a name in `taps`.
    """
    from indistill_fx.loading.onnx.black_box import black_box
    from indistill_fx.loading.onnx.read import read_onnx

    _require_arguments(path, arguments, "input", "taps")
    if (kind := recognise(path)) != "onnx":
        raise ConfigError(f"`{path}` is no ONNX file.", where=str(path), got=kind)
    model = read_onnx(path)
    inputs = _inputs(model, arguments)
    taps = [name for name in str(arguments.get("taps", "")).split(",") if name]
    module = black_box(model, inputs, taps, str(path))
    notes = ["run by onnxruntime on the CPU, without gradients; its work is not counted"]
    if not taps:
        names = [name for node in model.graph.node for name in node.output if name][:-1]
        some = ", ".join(names[:: max(len(names) // 3, 1)][:3])
        notes.append(
            f"nothing but its outputs can be learned; ?taps=NAME,NAME adds tensors of the file, such as {some}"
        )
    return _described(module, inputs, tuple(notes))


def _require_arguments(path: Path, arguments: Mapping[str, Any], *legal: str) -> None:
    unknown = next((name for name in arguments if name not in legal), None)
    if unknown is not None:
        raise ConfigError(
            f"An ONNX file takes no argument {unknown!r}.",
            where=str(path),
            got=unknown,
            expected=", ".join(legal),
            hint=f"Legal: {', '.join(legal)}.",
        )


def _inputs(model: Any, arguments: Mapping[str, Any]) -> Any:
    from indistill_fx.loading.onnx.convert import inputs_of

    asked = arguments.get("input")
    inputs = inputs_of(model, parse_input(str(asked)).shape if asked is not None else None)
    for own in inputs:
        if not all(is_input_size((own.batch or 1, *shape), most=LARGEST_IN_A_FILE) for shape in (own.shape, own.other)):
            size = "x".join(map(str, (own.batch or 1, *own.shape)))
            raise ConfigError(
                f"The input `{own.name}` of the ONNX file is too large: {size}.", where=own.name, got=size
            )
    return inputs


def _described(module: nn.Module, inputs: Any, notes: tuple[str, ...]) -> OnnxModel:
    from indistill_fx.loading.onnx.runtime import example_of

    own = inputs[0]
    single = len(inputs) == 1 and own.dtype.is_floating_point
    pictures = len(own.shape) == 3 and own.shape == own.other
    return OnnxModel(
        module,
        input_size=own.shape if single else None,
        fixed_size=(own.shape[1], own.shape[2]) if single and pictures else None,
        example_inputs=None if single else example_of(inputs, 1),
        notes=notes,
    )


def _samples(count: int) -> str:
    return "one sample at a time" if count == 1 else f"{count} samples at a time"
