"""onnxruntime on a model that was read and checked: sessions, runs, and whether a converted graph computes the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, fx

from indistill_fx.errors import ConfigError
from indistill_fx.loading.onnx.convert import OnnxInput

if TYPE_CHECKING:
    import onnxruntime

TOLERANCE = 1e-4
"""Largest difference of an output to onnxruntime's, relative to the output's largest value."""
QUANTISED_TIMES = 4
"""As many times as onnxruntime differs from itself, with and without its rewrites, a quantised file's conversion may differ from it."""


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether the file rounds what it computes to whole numbers on the way."""
    return any(node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul") for node in model.graph.node)


def open_session(model: onnx.ModelProto, where: str, *, rewrites: bool = True) -> onnxruntime.InferenceSession:
    """A session on the CPU, from memory: what was checked is what runs.

    Args:
        model: the file's.
        where: its name, for messages.
        rewrites: whether onnxruntime may rewrite the graph for speed.

    Raises:
        ConfigError: onnxruntime refuses the model.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if not rewrites:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises its own exceptions
        raise _failure("refuses", where, error, "Export the file again, or update onnxruntime.") from error


def _failure(verb: str, where: str, error: Exception, hint: str) -> ConfigError:
    """The error for a file that onnxruntime rejects, with its message on one line."""
    text = " ".join(str(error).split())[:300].rstrip(".")
    return ConfigError(f"onnxruntime {verb} `{where}`: {text}.", where=where, got=text, hint=hint)


def run_session(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor], batch: int | None) -> list[Tensor]:
    """The outputs of a batch, in the file's order; a file fixed to a number of samples runs so many at a time.

    Args:
        session: of `open_session`.
        inputs: in the file's order, batch first.
        batch: how many samples the file is fixed to; None: any.
    """
    arrays = [value.detach().cpu().contiguous() for value in inputs]
    count = len(arrays[0])
    if batch is None:
        return _run(session, arrays)
    parts: list[list[Tensor]] = []
    for start in range(0, count, batch):
        rows = [_filled(array[start : start + batch], batch) for array in arrays]
        results = _run(session, rows)
        if (
            wrong_shape := next((value for value in results if not value.dim() or len(value) != batch), None)
        ) is not None:
            raise ConfigError(
                f"The ONNX file is made for a batch of {batch}, and a tensor asked of it has the shape {tuple(wrong_shape.shape)}.",
                where="batch",
                hint="Export it for any number of samples (dynamic axes).",
            )
        parts.append([value[: count - start] for value in results])
    return [torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]


def _run(session: onnxruntime.InferenceSession, rows: Sequence[Tensor]) -> list[Tensor]:
    given = {entry.name: row.numpy() for entry, row in zip(session.get_inputs(), rows, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, given)]


def _filled(rows: Tensor, count: int) -> Tensor:
    """The rows, padded to `batch` by repeating the last one."""
    return torch.cat([rows, rows[-1:].expand(count - len(rows), *rows.shape[1:])]) if len(rows) < count else rows


def example_of(inputs: Sequence[OnnxInput], count: int, *, other: bool = False) -> tuple[Tensor, ...]:
    """Random inputs, the same ones every time: normally distributed numbers, whole ones 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for onnx_input in inputs:
        shape = (count, *(onnx_input.other if other else onnx_input.shape))
        if onnx_input.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(onnx_input.dtype))
        else:
            found.append(torch.randint(0, 2, shape, generator=generator).to(onnx_input.dtype))
    return tuple(found)


def compare(module: fx.GraphModule, model: onnx.ModelProto, inputs: Sequence[OnnxInput], where: str) -> float:
    """Run both on two batches of random numbers, of another size of the free axes the second time.

    A quantised file rounds sums that lie between two whole numbers by their last bit, and so differs with the order of summation; how
    much, onnxruntime's own two ways of running it show.

    Returns:
        The largest difference, relative to the largest value of its output.

    Raises:
        ConfigError: it is above the tolerance, or shapes differ.
    """
    session = open_session(model, where)
    plain = open_session(model, where, rewrites=False) if is_quantised(model) else None
    worst = 0.0
    for count, other in ((2, False), (3, True)):
        given = example_of(inputs, count, other=other)
        try:
            wanted = run_session(session, given, inputs[0].batch)
            again = run_session(plain, given, inputs[0].batch) if plain is not None else wanted
        except ConfigError:
            raise
        except Exception as error:
            raise _failure("fails to run", where, error, "Check that the inputs are what the file takes.") from error
        with torch.no_grad():
            result: Any = module(*given)
        results = list(result.values()) if isinstance(result, dict) else [result]
        for output, computed, expected, repeated in zip(session.get_outputs(), results, wanted, again, strict=True):
            allowed = (
                max(TOLERANCE, QUANTISED_TIMES * _relative(repeated, expected)) if plain is not None else TOLERANCE
            )
            worst = max(worst, _difference(computed, expected, output.name, where, allowed))
    return worst


def _relative(computed: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    wanted = expected.double()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    return float((computed.double() - wanted).abs().max()) / max(largest, 1e-12) if wanted.numel() else 0.0


def _difference(computed: Tensor, expected: Tensor, name: str, where: str, allowed: float) -> float:
    hint = f"Let onnxruntime run it as it is: onnxruntime:{where}, with ?taps=NAME,NAME for tensors inside (a teacher only)."
    if computed.shape != expected.shape:
        raise ConfigError(
            f"`{where}`, converted, gives its output `{name}` the shape {tuple(computed.shape)}, and onnxruntime {tuple(expected.shape)}.",
            where=where,
            hint=hint,
        )
    difference = _relative(computed, expected)
    if not difference <= allowed:
        raise ConfigError(
            f"`{where}`, converted, does not compute what onnxruntime does: its output `{name}` differs by {difference:.2g} of its"
            f" largest value (tolerance {allowed:.0e}).",
            where=where,
            got=difference,
            expected=allowed,
            hint=hint,
        )
    return difference
