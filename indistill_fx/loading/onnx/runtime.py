"""onnxruntime on a model that was read and checked: sessions, runs, and whether a converted graph computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx
import torch
from torch import Tensor, fx

from indistill_fx.errors import ConfigError, first_lines
from indistill_fx.loading.onnx.convert import OnnxInput

if TYPE_CHECKING:
    import onnxruntime

_TOLERANCE = 1e-4
"""Largest difference of an output to onnxruntime's, relative to the output's largest value."""
_TOLERANCE_OF_HALF = 4 * torch.finfo(torch.float16).eps
_ROUNDING = frozenset(
    "QuantizeLinear DynamicQuantizeLinear QLinearConv QLinearMatMul QGemm QAttention DynamicQuantizeLSTM DynamicQuantizeMatMul".split()
)
QUANTISED_TIMES = 4
"""As many times as onnxruntime differs from itself, a quantised file's conversion may differ from it (see `compare`)."""
_NUDGES, _NUDGE = 8, 2 * torch.finfo(torch.float32).eps


def is_quantised(model: onnx.ModelProto) -> bool:
    """Whether the file rounds what it computes to whole numbers on the way."""
    return any(node.op_type in _ROUNDING for node in model.graph.node)


def tolerance_of(model: onnx.ModelProto) -> float:
    """Largest difference allowed, relative to an output's largest value: more where the file computes in half precision."""
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    return _TOLERANCE_OF_HALF if types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16} else _TOLERANCE


def session_options(threads: int | None = None) -> onnxruntime.SessionOptions:
    """Options of every session: it logs nothing, since its errors are exceptions, and has as many threads as torch if none are given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Threads that keep spinning after a run would slow down the next measurement.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


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

    options = session_options()
    if not rewrites:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
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


def example_of(
    inputs: Sequence[OnnxInput], count: int, shapes: Sequence[tuple[int, ...]] | None = None
) -> tuple[Tensor, ...]:
    """Random inputs, the same ones every time: normally distributed numbers, whole ones 0 or 1.

    Args:
        inputs: of the file.
        count: the number of samples.
        shapes: of a sample of each input; by default the inputs' own.
    """
    generator = torch.Generator().manual_seed(0)
    found = []
    for onnx_input, own in zip(inputs, shapes or [onnx_input.shape for onnx_input in inputs], strict=True):
        shape = (count, *own)
        if onnx_input.dtype.is_floating_point:
            found.append(torch.randn(shape, generator=generator).to(onnx_input.dtype))
        else:
            found.append(torch.randint(0, 2, shape, generator=generator).to(onnx_input.dtype))
    return tuple(found)


def compare(module: fx.GraphModule, model: onnx.ModelProto, inputs: Sequence[OnnxInput], where: str) -> float:
    """Run both on batches of random numbers: of two sizes of the free axes, and of a small odd one if onnxruntime takes it.

    The conversion knows the two sizes; the third shows what holds for these alone.

    A quantised file rounds sums that lie between two whole numbers by their last bit, and so differs with the order of summation; how
    much, onnxruntime's own two ways of running it show, and what it gives for inputs that differ in their last bits.

    Returns:
        The largest difference, relative to the largest value of its output.

    Raises:
        ConfigError: it is above the tolerance, or shapes differ.
    """
    session = open_session(model, where)
    plain = open_session(model, where, rewrites=False) if is_quantised(model) else None
    worst, tolerance = 0.0, tolerance_of(model)
    trials = [(2, [entry.shape for entry in inputs]), (3, [entry.other for entry in inputs])]
    known = len(trials)
    if any(entry.shape != entry.other for entry in inputs):
        trials.append((2, [_odd(entry) for entry in inputs]))
    for number, (count, shapes) in enumerate(trials):
        given = example_of(inputs, count, shapes)
        told = f"inputs of {', '.join('x'.join(map(str, value.shape)) for value in given)}"
        try:
            wanted = run_session(session, given, inputs[0].batch)
            others = [run_session(plain, nearby, inputs[0].batch) for nearby in _nearby(given)] if plain else []
        except ConfigError:
            raise
        except Exception as error:
            if number >= known:
                break
            raise _failure("fails to run", where, error, "Check that the inputs are what the file takes.") from error
        try:
            with torch.no_grad():
                result: Any = module(*given)
        except Exception as error:
            raise ConfigError(
                f"`{where}`, converted, fails on {told}, which onnxruntime takes: {first_lines(error)}",
                where=where,
                hint=_hint(where),
            ) from error
        results = list(result.values()) if isinstance(result, dict) else [result]
        for place, (output, computed, expected) in enumerate(zip(session.get_outputs(), results, wanted, strict=True)):
            itself = max((_relative(other[place], expected) for other in others), default=0.0)
            allowed = max(tolerance, QUANTISED_TIMES * itself)
            worst = max(worst, _difference(computed, expected, f"`{output.name}` for {told}", where, allowed))
    return worst


def _nearby(given: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The inputs, and such as differ from them in the last bits of their numbers."""
    yield tuple(given)
    if not any(value.is_floating_point() for value in given):
        return
    for seed in range(_NUDGES):
        generator = torch.Generator().manual_seed(seed)
        yield tuple(
            value + (value.abs().max() * _NUDGE * torch.randn(value.shape, generator=generator)).to(value.dtype)
            if value.is_floating_point()
            else value
            for value in given
        )


def _odd(onnx_input: OnnxInput) -> tuple[int, ...]:
    """A small shape, whose free axes are odd."""
    return tuple(n if n == other else n // 3 | 1 for n, other in zip(onnx_input.shape, onnx_input.other, strict=True))


def _hint(where: str) -> str:
    return f"Let onnxruntime run it as it is: onnxruntime:{where}, with ?taps=NAME,NAME for tensors inside (a teacher only)."


def _relative(computed: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    wanted = expected.double()
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    return float((computed.double() - wanted).abs().max()) / max(largest, 1e-12) if wanted.numel() else 0.0


def _difference(computed: Tensor, expected: Tensor, output: str, where: str, allowed: float) -> float:
    for what, ours, theirs in (
        ("shape", tuple(computed.shape), tuple(expected.shape)),
        ("type", computed.dtype, expected.dtype),
    ):
        if ours != theirs:
            raise ConfigError(
                f"`{where}`, converted, gives its output {output} the {what} {ours}, and onnxruntime {theirs}.",
                where=where,
                hint=_hint(where),
            )
    difference = _relative(computed, expected)
    if not difference <= allowed:
        raise ConfigError(
            f"`{where}`, converted, does not compute what onnxruntime does: its output {output} differs by {difference:.2g} of its"
            f" largest value (tolerance {allowed:.0e}).",
            where=where,
            got=difference,
            expected=allowed,
            hint=_hint(where),
        )
    return difference
