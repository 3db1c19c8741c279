"""Run an ONNX file with onnxruntime: its inputs, random ones like them, its outputs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from indistill_fx.batch import call_of
from indistill_fx.deploy.nested_inputs import Form
from indistill_fx.errors import ConfigError, ExportError, instead_of
from indistill_fx.graph.preprocess import Preprocess
from indistill_fx.system.files import require_regular
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import is_own_class, named
from indistill_fx.system.shortage import instead_of_any

if TYPE_CHECKING:
    import onnx
    import onnxruntime

KINDS = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
LARGEST_INPUT = 1 << 28
"""Elements of an input that is made up for a file: 1 GiB in float32."""
Array: TypeAlias = npt.NDArray[Any]
Given: TypeAlias = Tensor | Sequence[Any] | Mapping[str, Any]
"""Inputs of a model: one, several in order, or by name."""


def as_inputs(
    example_inputs: Tensor | Sequence[Tensor], *, where: str = "example_inputs", fixed: bool = False
) -> tuple[Tensor, ...]:
    """A tensor or a sequence of tensors as a tuple of tensors with a common batch dimension, unless their sizes stay fixed.

    Raises:
        ConfigError: something else, or batch sizes that differ.
    """
    single = isinstance(example_inputs, Tensor) or is_own_class(example_inputs)
    inputs = (example_inputs,) if single else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) and x.dim() for x in inputs):
        kinds = (type(x).__name__ if not isinstance(x, Tensor) or x.dim() else "a scalar" for x in inputs)
        got = ", ".join(kinds) or "nothing"
        raise ConfigError(
            f"`{where}` must be one or more tensors with a batch dimension; got {got}.",
            where=where,
            hint="Give tensors whose first axis is the batch: an ONNX file has no other inputs.",
        )
    if not fixed and len({len(x) for x in inputs}) > 1:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ConfigError(
            f"`{where}` must share their first (batch) dimension; got shapes {shapes}.",
            where=where,
            hint="Give as many samples in each. Where the batch is another axis, as of an LSTM's state (layers, batch, width), export with "
            "dynamic_batch=False, or wrap the model in a module that takes the batch first.",
        )
    return inputs


def inputs_of(
    module: nn.Module, given: Given, *, where: str = "example_inputs", fixed: bool = False
) -> tuple[Form, tuple[Tensor, ...]]:
    """The form of a module's arguments, and the tensors in it; `fixed`: their sizes need not share a batch dimension.

    Raises:
        ConfigError: as `as_inputs`; or, by name, one is missing.
    """
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}
    if not isinstance(given, Mapping):
        args = (given,) if isinstance(given, Tensor) or is_own_class(given) else tuple(given)
    elif all(isinstance(value, Tensor) for value in given.values()) or not set(given) <= set(Inputs.of(module).names):
        kwargs = call_of(given, Inputs.of(module), where=f"`{where}`").kwargs
    else:  # dicts and tuples of tensors, or None
        kwargs = given
    form, tensors = Form.of(module, args, kwargs)
    return form, as_inputs(tensors, where=where, fixed=fixed)


def random_inputs(
    example_inputs: Sequence[Tensor], batch: int, *, seed: int = 0, other_size: bool = False
) -> tuple[Tensor, ...]:
    """Inputs like the examples, of another batch size: same scale for floats, same span for integers, rows of the example for masks.

    Args:
        example_inputs: what to imitate.
        batch: rows. If it is that of the first example, every other one keeps its own, which need not be the batch.
        seed: of a generator of its own; the global random state is not touched.
        other_size: larger images, shorter texts.
    """
    generator = torch.Generator().manual_seed(seed)
    longest, alike = max(map(len, example_inputs), default=1), batch == len(example_inputs[0])
    rows = torch.randint(0, longest, (max(batch, longest) if alike else batch,), generator=generator)
    found = []
    for x in example_inputs:
        size = len(x) if alike else batch  # with a fixed batch, it need not be the first axis
        shape = other_shape(x) if other_size else tuple(x.shape[1:])
        if is_mask(x):
            found.append(x[(rows[:size] % len(x)).to(x.device), : shape[0]].clone())
        else:
            found.append(_random_like(x, (size, *shape), generator).to(x.device))
    return tuple(found)


def is_mask(x: Tensor) -> bool:
    """Whether an input says of every position of a text whether it counts: (N, positions) of 0 and 1, or of booleans."""
    return _is_text(x) and len(x) > 0 and bool(((x == 0) | (x == 1)).all())


def _is_text(x: Tensor) -> bool:
    return x.dim() == 2 and not x.is_floating_point() and x.dtype != torch.uint8


def open_axes(x: Tensor) -> tuple[int, ...]:
    """The axes whose size may be left open, apart from the batch: height and width of an image, the length of a text (N, positions)."""
    return sides_of(x) or ((1,) if _is_text(x) else ())


def other_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of a sample of another size: a larger image, not square and divisible as before by strides up to 32; a shorter text."""
    shape, sides = list(x.shape), sides_of(x)
    if sides is not None:
        shape[sides[0]], shape[sides[1]] = shape[sides[0]] + 32, shape[sides[1]] + 64
    elif _is_text(x):
        shape[1] = shape[1] // 2 + 1
    return tuple(shape[1:])


def sides_of(x: Tensor) -> tuple[int, int] | None:
    """The axes of height and width; None if it is no image.

    Images are (N, C, H, W); those of uint8 are pixels (N, H, W, C) if the last axis can be colours (1, 3 or 4), and the second cannot.
    """
    if x.dim() != 4:
        return None
    colours = (1, 3, 4)
    return (1, 2) if x.dtype == torch.uint8 and x.shape[3] in colours and x.shape[1] not in colours else (2, 3)


def _random_like(x: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if x.dtype == torch.uint8:
        return torch.randint(0, 256, shape, generator=generator, dtype=x.dtype)
    if x.is_floating_point():
        spread = float(x.float().std()) if x.numel() > 1 else 0.0
        middle = float(x.float().mean()) if x.numel() else 0.0
        return (torch.randn(shape, generator=generator) * (spread or 1.0) + middle).to(x.dtype)
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    return torch.randint(low, high + 1, shape, generator=generator).to(x.dtype)


def named_outputs(result: Any) -> dict[str, Tensor]:
    """The tensors of a module's result by name: dict keys where there are any, else `output`, `output_0`, ….

    >>> list(named_outputs(({"layer1": torch.zeros(1)}, torch.zeros(1), None)))
    ['layer1', 'output']
    """
    opened = _as_plain(result)
    leaves = [(p, leaf) for p, leaf in pytree.tree_flatten_with_path(opened)[0] if isinstance(leaf, Tensor)]
    keyed = [".".join(str(k.key) for k in path if isinstance(k, pytree.MappingKey)) for path, _ in leaves]
    plain = keyed.count("")
    counter = iter(range(plain))
    names = [key or ("output" if plain == 1 else f"output_{next(counter)}") for key in keyed]
    free: dict[str, Tensor] = {}
    for name, (_, leaf) in zip(names, leaves, strict=True):
        choices = (name, *(f"{name}_{i}" for i in range(1, len(leaves) + 1)))
        free[next(choice for choice in choices if choice not in free)] = leaf
    return free


def _as_plain(value: Any) -> Any:
    """A result whose dataclasses and mappings are dicts: torch has no paths into those that libraries made for themselves."""
    return pytree.tree_map(
        _leaf_as_plain, value, is_leaf=lambda part: isinstance(part, Mapping) and type(part) is not dict
    )


def _leaf_as_plain(leaf: Any) -> Any:
    entries = None if isinstance(leaf, Tensor) else named(leaf)
    return leaf if entries is None else {key: _as_plain(value) for key, value in entries.items()}


def graph_of(path: str | PathLike[str]) -> onnx.ModelProto:
    """What an ONNX file holds, without the weights in files beside it.

    Raises:
        ConfigError: it is not a regular file, it is damaged, or its weights are not in files beside it.
    """
    import onnx

    from indistill_fx.loading.onnx.read import check_nodes, check_texts, weights_beside

    hint = "Give the path of an .onnx file; copy it again, or export it again."
    with instead_of_any(ConfigError(f"`{path}` cannot be read as ONNX", where=str(path), hint=hint)):
        require_regular(path)
        model = onnx.load(str(path), load_external_data=False)
    check_texts(model, Path(path))
    check_nodes(model, Path(path))
    weights_beside(model, Path(path))
    return model


def open_session(path: str | PathLike[str], *, threads: int | None = None) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Raises:
        ConfigError: see `graph_of`.
        ExportError: onnxruntime refuses the file.
    """
    import onnx
    import onnxruntime

    from indistill_fx.loading.onnx.runtime import session_options

    weights = graph_of(path).graph.initializer
    hint = "Export the file again, or update onnxruntime."
    rare = {onnx.TensorProto.DOUBLE: "float64", onnx.TensorProto.BFLOAT16: "bfloat16"}
    if kind := next((rare[weight.data_type] for weight in weights if weight.data_type in rare and weight.dims), None):
        hint = f"The file's weights are {kind}, in which onnxruntime has few operators: export the model in float32 (`model.float()`)."
    with instead_of_any(ExportError(f"onnxruntime cannot load `{path}`", where=str(path), hint=hint)):
        return onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])


def feed(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> dict[str, Array]:
    """The tensors by the names of the session's inputs, in order; as pixels if preprocessing is built in."""
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(inputs):
        raise ConfigError(
            f"The file has {len(names)} inputs ({', '.join(names)}); {len(inputs)} were given.",
            where="inputs",
            hint="Give one tensor for each of the file's inputs, in that order.",
        )
    if built_in := Preprocess.from_metadata(_metadata_of(session)):
        inputs = [built_in.to_pixels(inputs[0]), *inputs[1:]]
    return {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}


def _metadata_of(session: onnxruntime.InferenceSession) -> Mapping[str, str]:
    hint = "Copy it again, or export it again."
    with instead_of(
        UnicodeDecodeError, ConfigError("The ONNX file's metadata are not text", where="metadata", hint=hint)
    ):
        found: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    return found


def file_size(path: str | PathLike[str]) -> int:
    """Bytes of an ONNX file and of the weights it keeps beside it; errors as of `graph_of`."""
    from indistill_fx.loading.onnx.read import weights_beside

    beside = {file for _, file, _, _ in weights_beside(graph_of(path), Path(path))}
    return sum(part.stat().st_size for part in (Path(path), *beside))
