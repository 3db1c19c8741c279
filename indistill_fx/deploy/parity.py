"""Does an ONNX file compute what a module computes? onnxruntime beside torch, output by output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from indistill_fx.deploy.onnx_session import Array, feed, named_outputs, open_axes, random_inputs
from indistill_fx.errors import ConfigError, ExportError, first_lines
from indistill_fx.graph.edit import batch_of
from indistill_fx.graph.main_output import MAIN_NAMES, as_key

if TYPE_CHECKING:
    import onnxruntime


_SMALLEST_SCALE = 1e-2  # the scale assumed for outputs that are nearly all zero
# an output → its integers (such as classes), or None if it has only real values
Decisions: TypeAlias = Callable[[Tensor], Tensor | None]
Values: TypeAlias = dict[str, tuple[Array, Array]]  # per output: torch's values, onnxruntime's values


class Parity(NamedTuple):
    """One output at one batch size: the largest difference, and that difference in units of the output's range."""

    batch_size: int
    output: str
    max_abs: float
    max_rel: float


@dataclass(frozen=True, slots=True)
class RealParity:
    """The comparison on real inputs.

    Attributes:
        rows: how many samples were compared.
        parity: the largest differences per output; `batch_size` is the number of rows.
        agreement: share of the decisions that are the same: classes of samples, of pixels, labels on or off; None where the values
            themselves are what counts.
        per_class: the same, for the rows torch gives to each class, where there is one a sample.
    """

    rows: int
    parity: tuple[Parity, ...]
    agreement: float | None
    per_class: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class Proof:
    """All comparisons made, and in words those that failed (none: the file is proven).

    Attributes:
        parity: on random inputs.
        real: on real inputs.
        failures: one sentence each.
        failed_on: the random inputs of the first comparison that failed.
        notes: what else should be known of the comparison.
    """

    parity: tuple[Parity, ...]
    real: RealParity | None
    failures: tuple[str, ...]
    failed_on: tuple[Tensor, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """The largest difference over all outputs."""
        return max((row.max_abs for row in self.parity + (self.real.parity if self.real else ())), default=0.0)


def prove(
    session: onnxruntime.InferenceSession,
    module: nn.Module,
    example_inputs: Sequence[Tensor],
    *,
    batch_sizes: Sequence[int],
    tolerance: float,
    other_size: bool = False,
    real_inputs: Sequence[Tensor] | None = None,
    decisions: Decisions | None = None,
    logits: str | None = None,
) -> Proof:
    """Run both on the same inputs and compare every output.

    Args:
        session: the file, opened.
        module: what it should compute; in eval mode, autograd off.
        example_inputs: random inputs imitate these.
        batch_sizes: each is tried.
        tolerance: the largest difference allowed, as a share of the output's range.
        other_size: try another size of images and texts as well, at the smallest batch size that is more than one.
        real_inputs: compared too, whole, in pieces of the largest batch size.
        decisions: what the main output says in the end (see `main_of`; else the first); by default the largest class of the
            logits (see `logits_of`).
        logits: name of the main output in the file.
    """
    rows: list[Parity] = []
    failures: list[str] = []
    failed_on, refusing = None, False
    trials = [(batch, False) for batch in batch_sizes]
    trials += [(min((b for b in batch_sizes if b > 1), default=1), True)] if other_size else []
    for seed, (batch, other) in enumerate(trials):
        inputs = random_inputs(example_inputs, batch, seed=seed, other_size=other)
        if not other and not _takes(module, inputs):  # texts of random tokens may have no end, say
            inputs = batch_of(tuple(example_inputs), batch, example_size=len(example_inputs[0]))
            refusing = True
        label = f"at batch size {batch}" + (f" and size {_size_of(inputs)}" if other else "")
        try:
            values = _run(session, module, inputs)
        except Exception as error:  # torch or onnxruntime may refuse the input, each with its own exceptions
            failures.append(f"{label}: {first_lines(error).rstrip('.')}")
        else:
            _compare(values, batch, tolerance, label, rows, failures)
        failed_on = inputs if failures and failed_on is None else failed_on
    real = None
    if real_inputs is not None:
        real = _on_real(session, module, real_inputs, max(batch_sizes), tolerance, failures, decisions, logits)
    return Proof(tuple(rows), real, tuple(failures), failed_on, (_ON_EXAMPLE,) if refusing else ())


_ON_EXAMPLE = "The model refuses random inputs (tokens, lengths): it was compared on rows of the example alone."


def _takes(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a module runs on these inputs; on floating-point ones nothing may fail but a look-up by them."""
    try:
        module(*inputs)
    except IndexError:
        return False
    except Exception:  # whatever its code raises
        return all(x.is_floating_point() for x in inputs)
    return True


def _size_of(inputs: Sequence[Tensor]) -> str:
    """The sizes that were left open, of the first input that has some: `96x128`."""
    return next("x".join(str(x.shape[axis]) for axis in axes) for x in inputs if (axes := open_axes(x)))


def allowed_difference(module: nn.Module, *tensors: Tensor) -> float:
    """The tolerance by default, for the coarsest precision among a module's weights and its inputs: 8 machine epsilons, at least 1e-4.

    Two runtimes round every intermediate result, by up to half an epsilon, and independent roundings add up by the root of their
    number: 8 epsilons are 256 of them in a row. That is 0.008 of the output's range in float16, and 0.06 in bfloat16. In float32 it
    would be 1e-6; 1e-4 leaves room for sums in another order.
    """
    every = (*module.parameters(), *module.buffers(), *tensors)
    return max([8 * torch.finfo(x.dtype).eps for x in every if x.is_floating_point()] + [1e-4])


def rounding(module: nn.Module, inputs: Sequence[Tensor]) -> float | None:
    """How far torch itself is off in the module's precision, as a share of the output's range; None if unknown.

    The reference is a copy in float64, so this distinguishes a faulty file from a module that amplifies rounding.
    """
    try:
        exact = copy.deepcopy(module).double()
        fine = named_outputs(exact(*(x.double() if x.is_floating_point() else x for x in inputs)))
        coarse = named_outputs(module(*inputs))
        pairs = [_difference(coarse[name].cpu().numpy(), fine[name].cpu().numpy()) for name in coarse]
    except Exception:  # some modules cannot be copied or cast to another precision
        return None
    return max(gap / scale if scale else gap for gap, scale in pairs)


def _run(session: onnxruntime.InferenceSession, module: nn.Module, inputs: Sequence[Tensor]) -> Values:
    """Torch's value and onnxruntime's value of each output."""
    expected = named_outputs(module(*inputs))
    names = [o.name for o in session.get_outputs()]
    if len(names) != len(expected):
        raise ExportError(
            f"the file has {len(names)} outputs ({', '.join(names)}), the module {len(expected)}",
            where="outputs",
            hint="Compare the file with the module that it was exported from.",
        )
    got = session.run(None, feed(session, inputs))
    reference = [x.detach().cpu().numpy() for x in expected.values()]
    return {name: (a, np.asarray(b)) for name, a, b in zip(names, reference, got, strict=True)}


def _run_piece(
    session: onnxruntime.InferenceSession,
    module: nn.Module,
    inputs: Sequence[Tensor],
    start: int,
    chunk: int,
    *,
    fixed: bool,
) -> Values:
    """Run the rows from `start`; for a file with a fixed batch, the last piece is padded with repeated rows."""
    rows = min(chunk, len(inputs[0]) - start)
    if not fixed or rows == chunk:
        return _run(session, module, [x[start : start + rows] for x in inputs])
    filled = _run(session, module, [x[start + torch.arange(chunk) % rows] for x in inputs])
    return {name: tuple(y[:rows] if y.shape[:1] == (chunk,) else y for y in pair) for name, pair in filled.items()}  # type: ignore[misc]


def _compare(values: Values, batch: int, tolerance: float, label: str, rows: list[Parity], failures: list[str]) -> None:
    for name, (reference, exported) in values.items():
        if reference.shape != exported.shape:
            failures.append(f"output `{name}` {label} has shape {exported.shape}, the module's {reference.shape}")
            continue
        largest, scale = _difference(reference, exported)
        rows.append(Parity(batch, name, largest, largest / scale if scale else largest))
        limit = tolerance * max(scale, _SMALLEST_SCALE)
        if not largest <= limit:
            failures.append(
                f"output `{name}` {label} differs by up to {largest:.3g}; allowed is {limit:.3g} "
                f"(tolerance {tolerance:g} of a range of {scale:.3g})"
            )


def _difference(reference: Array, exported: Array) -> tuple[float, float]:
    """The largest difference, and the range of the reference values (or their magnitude, if larger)."""
    if not reference.size:
        return 0.0, 0.0
    a, b = reference.astype(np.float64), exported.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0.0, np.abs(a - b))
    finite = a[np.isfinite(a)]
    scale = float(max(np.abs(finite).max(), np.ptp(finite))) if finite.size else 0.0
    return float(np.nan_to_num(gap, nan=np.inf, posinf=np.inf).max()), scale


def _on_real(
    session: onnxruntime.InferenceSession,
    module: nn.Module,
    inputs: Sequence[Tensor],
    chunk: int,
    tolerance: float,
    failures: list[str],
    decisions: Decisions | None,
    logits: str | None,
) -> RealParity:
    total, rows = len(inputs[0]), list[Parity]()
    fixed = isinstance(session.get_inputs()[0].shape[0], int)
    try:
        pieces = [_run_piece(session, module, inputs, i, chunk, fixed=fixed) for i in range(0, total, chunk)]
    except Exception as error:
        failures.append(f"on real inputs: {first_lines(error).rstrip('.')}")
        return RealParity(total, (), None, {})
    values: Values = {}
    for name in pieces[0] if pieces else ():
        reference, exported = (
            np.concatenate([np.atleast_1d(piece[name][side]) for piece in pieces]) for side in (0, 1)
        )
        values[name] = (reference, exported)
    _compare(values, total, tolerance, f"on {total} real inputs", rows, failures)
    references = {name: reference for name, (reference, _) in values.items()}
    judged = main_of(references, logits) or next(iter(values), None) if decisions else logits_of(references, logits)
    found = decided(*values[judged], decisions) if judged is not None else None
    if found is None:
        return RealParity(total, tuple(rows), None, {})
    classes, same = found[0], found[0] == found[1]
    labels = np.unique(classes) if classes.ndim == 1 else ()
    per_class = {int(c): float(same[classes == c].mean()) for c in labels}
    return RealParity(total, tuple(rows), float(same.mean()), per_class)


def main_of(names: Iterable[str], logits: str | int | None = None) -> str | None:
    """The output at `logits` (a name or an index); of several without it, the one called `logits` or `out`, if any.

    Raises:
        ConfigError: there is no output at `logits`.
    """
    names = list(names)
    if logits is None or len(names) == 1:
        return next((name for name in MAIN_NAMES if name in names), None)
    key = as_key(logits, dict.fromkeys(names))
    if key in names or key in range(len(names)):
        return key if isinstance(key, str) else names[key]
    raise ConfigError(
        f"There is no output {logits!r}: the outputs are {', '.join(names)}.",
        where="logits",
        got=logits,
        expected=names,
        hint="Name one of them, or give its index from 0: logits=… (--logits).",
    )


def main_in_file(own: Sequence[str], in_file: Sequence[str], logits: str | int | None) -> str | None:
    """The name in a file of a module's output at `logits`; see `main_of`. The file has the module's outputs in their order."""
    name = main_of(own, logits)
    return in_file[own.index(name)] if name is not None and len(own) == len(in_file) else None


def logits_of(outputs: Mapping[str, Array], logits: str | int | None = None) -> str | None:
    """The output whose largest class is the answer: see `main_of`; without a name, the only one of shape (N, classes)."""
    fitting = [name for name, y in outputs.items() if y.ndim == 2 and y.shape[1] > 1]
    named = main_of(fitting if logits is None else outputs, logits)
    if named is not None:
        return named if named in fitting else None
    return fitting[0] if len(fitting) == 1 else None


def decided(reference: Array, exported: Array, decisions: Decisions | None) -> tuple[Array, Array] | None:
    """What both sides say in the end; None where nothing is said, or their shapes differ. See `prove`."""
    if reference.shape != exported.shape:
        return None
    if decisions is None:
        return (reference.argmax(1), exported.argmax(1)) if reference.ndim == 2 and reference.shape[1] > 1 else None
    found = [decisions(torch.from_numpy(np.ascontiguousarray(side))) for side in (reference, exported)]
    return None if found[0] is None or found[1] is None else (found[0].numpy(), found[1].numpy())
