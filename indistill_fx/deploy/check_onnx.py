"""Verify a deployed ONNX file, and report in what it differs from its module."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from indistill_fx.deploy.metadata import weights_digest
from indistill_fx.deploy.onnx_capture import Deployed, capture
from indistill_fx.deploy.onnx_session import (
    KINDS,
    LARGEST_INPUT,
    Given,
    as_inputs,
    file_size,
    graph_of,
    inputs_of,
    named_outputs,
    open_session,
)
from indistill_fx.deploy.onnx_weights import SHOWN, wrong_int8_weights, wrong_weights
from indistill_fx.deploy.parity import Decisions, Parity, Proof, RealParity, allowed_difference, main_in_file, prove
from indistill_fx.errors import ConfigError, IndistillError, first_lines
from indistill_fx.graph.module_state import evaluating
from indistill_fx.graph.preprocess import Preprocess
from indistill_fx.system.exact_arithmetic import exact_arithmetic

if TYPE_CHECKING:
    import onnx
    import onnxruntime


_SANE = 1e30  # int8 outputs have no tolerance, but they must be finite and of a sane size


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a file contains, and everything in which it differs from the module.

    Attributes:
        path: the file.
        differences: one sentence each.
        parity: on random inputs, as in `ExportReport`.
        real: on real inputs, if any were given.
        max_abs: the largest difference of all outputs.
        opset: of the file; None if it cannot be read.
        size: bytes, external weights included.
        notes: what was not compared, and why.
    """

    path: Path
    differences: tuple[str, ...]
    parity: tuple[Parity, ...] = ()
    real: RealParity | None = None
    max_abs: float = float("nan")
    opset: int | None = None
    size: int = 0
    notes: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Nothing differs."""
        return not self.differences


def check_onnx(
    path: str | PathLike[str],
    module: nn.Module,
    example_inputs: Given,
    *,
    opset: int | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    real_inputs: Given | None = None,
    tolerance: float | None = None,
    agreement: float = 0.95,
    batch_sizes: Sequence[int] = (1, 7, 64),
    decisions: Decisions | None = None,
    logits: str | int | None = None,
) -> CheckReport:
    """Compare a file with a module: is the file readable and valid, and are inputs, graph, weights and outputs the same?

    Graph and weights are compared with a fresh export of the module, because the exporter folds (batch norm into
    convolutions, for one). If the file says that preprocessing is built in, it is put before the module too. The weights of an
    int8 file must be the module's, rounded to the nearest step of their scale; its outputs are judged by the classes it
    gives to `real_inputs`. With a module that was itself read from an ONNX file, only outputs are compared; of int8 files, on
    real inputs.

    Args:
        path: the file.
        module: what it should compute.
        example_inputs: as for `export_onnx`; normalised float images even if the file takes pixels.
        opset: expected; None: the file's.
        input_names: expected; None: the file's.
        output_names: expected; None: the file's.
        metadata: entries the file must have; one that is missing or has another value is a difference.
        real_inputs: data to compare on as well.
        tolerance: the largest difference allowed, as a share of the output's range, by default as for `export_onnx`; not for int8 files.
        agreement: for int8 files, the least share of `real_inputs` that must get the class that the module gives.
        batch_sizes: sizes to compare at, if the file takes any batch size.
        decisions: as for `export_onnx`.
        logits: as for `export_onnx`.

    Returns:
        The report. A wrong file is a difference in it, not an exception.

    Raises:
        ConfigError: there is no such file, or the inputs are at fault.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent
        >>> x = torch.randn(2, 1, 8, 8)
        >>> mine, another = DigitsStudent(), DigitsStudent()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = ifx.export_onnx(mine, f"{folder}/student.onnx", x)
        ...     same = ifx.check_onnx(report.path, mine, x)
        ...     different = ifx.check_onnx(report.path, another, x)
        >>> same.agrees, different.agrees
        (True, False)
    """
    from indistill_fx.loading.onnx.runtime import is_quantised

    file = Path(path)
    if not os.path.exists(file):
        raise ConfigError(f"There is no file `{file}`.", where=str(file), hint="Give the path of an .onnx file.")
    form, inputs = inputs_of(module, example_inputs, fixed=True)
    real = inputs_of(module, real_inputs, where="real_inputs")[1] if real_inputs is not None else None
    try:
        model = _read(file)
        session = open_session(file)
        metadata_in_file = {entry.key: entry.value for entry in model.metadata_props}
        built_in = Preprocess.from_metadata(metadata_in_file)
        if built_in:
            inputs = (built_in.to_pixels(inputs[0]), *inputs[1:])
            real = (built_in.to_pixels(real[0]), *real[1:]) if real else None
    except IndistillError as error:
        return CheckReport(file, (error.message,), size=file.stat().st_size)
    terms = _wrong_terms(model, session, opset, input_names, output_names)
    differences = [*terms, *_wrong_metadata(metadata_in_file, metadata or {})]
    quantised, wrong_inputs = is_quantised(model), list(_wrong_inputs(session, inputs))
    proof, notes = Proof((), None, ()), list[str]()
    if wrong_inputs:
        notes.append("Outputs and weights were not compared, since the inputs differ.")
    else:
        inputs, batch_sizes = _as_fixed(session, inputs, batch_sizes, notes)
        with evaluating(module), exact_arithmetic():
            deployed = Deployed(module, built_in, form)
            deployed.training = False
            tolerance = allowed_difference(deployed, *inputs) if tolerance is None else tolerance
            proof = prove(
                session, deployed, inputs, batch_sizes=batch_sizes, tolerance=_SANE if quantised else tolerance,
                real_inputs=real, decisions=decisions, logits=_main(session, deployed, inputs, logits),
            )  # fmt: skip
            differences += [
                *proof.failures,
                *_wrong_content(model, session, deployed, inputs, proof, (agreement, tolerance), notes),
            ]
    return CheckReport(
        file, (*wrong_inputs, *differences), proof.parity, proof.real, proof.max_abs, _opset(model), file_size(file),
        tuple(notes),
    )  # fmt: skip


def _read(file: Path) -> onnx.ModelProto:
    """Read the file.

    Raises:
        ConfigError: the file is unreadable; the message goes into the `CheckReport`.
    """
    import onnx

    size = file.stat().st_size
    if not size:
        raise ConfigError(f"`{file}` is empty", where=str(file), hint="Export it again.")
    graph_of(file)
    try:
        model = onnx.load(str(file))
    except Exception as error:
        raise ConfigError(
            f"`{file}` ({size} bytes) cannot be read as ONNX: it is truncated, damaged or another kind of file, or its "
            f"weights file is missing ({first_lines(error)})",
            where=str(file),
            hint="Copy it again, with its .data file if it has one, or export it again.",
        ) from error
    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:
        raise ConfigError(
            f"`{file}` ({size} bytes) is not valid ONNX: {first_lines(error)}", where=str(file), hint="Export it again."
        ) from error
    return model


def _as_fixed(
    session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...], batch_sizes: Sequence[int], notes: list[str]
) -> tuple[tuple[Tensor, ...], Sequence[int]]:
    """The inputs and batch sizes for a file: where its batch is fixed, only that one; the first axis of a state need not be the batch."""
    fixed = session.get_inputs()[0].shape[0]
    if not isinstance(fixed, int):
        return as_inputs(inputs), batch_sizes
    notes.append(f"The file's batch size is fixed to {fixed}; it was compared at that size only.")
    sizes = [given.shape[0] for given in session.get_inputs()]
    return tuple(_resize(x, n) if isinstance(n, int) else x for x, n in zip(inputs, sizes, strict=True)), (fixed,)


def _main(
    session: onnxruntime.InferenceSession, deployed: Deployed, inputs: Sequence[Tensor], logits: str | int | None
) -> str | None:
    own, in_file = named_outputs(deployed.outputs(*inputs)), [output.name for output in session.get_outputs()]
    return main_in_file(list(own), in_file, logits)


def _opset(model: onnx.ModelProto) -> int:
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _wrong_terms(
    model: onnx.ModelProto,
    session: onnxruntime.InferenceSession,
    opset: int | None,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Iterator[str]:
    if opset is not None and _opset(model) != opset:
        yield f"the file's opset is {_opset(model)}, expected {opset}"
    for kind, expected, values in (
        ("input", input_names, session.get_inputs()),
        ("output", output_names, session.get_outputs()),
    ):
        got = [value.name for value in values]
        if expected is not None and got != list(expected):
            yield f"the file's {kind}s are named {', '.join(got)}, expected {', '.join(expected)}"


def _wrong_inputs(session: onnxruntime.InferenceSession, inputs: Sequence[Tensor]) -> Iterator[str]:
    values = session.get_inputs()
    if len(values) != len(inputs):
        names = ", ".join(value.name for value in values)
        yield f"the file has {len(values)} inputs ({names}), the module takes {len(inputs)}"
        return
    for value, x in zip(values, inputs, strict=True):
        if KINDS.get(value.type) != x.dtype:
            yield f"input `{value.name}` is a {value.type} in the file, {x.dtype} for the module"
        fits = len(value.shape) == x.dim() and all(
            not isinstance(a, int) or a == b for a, b in zip(value.shape[1:], x.shape[1:], strict=True)
        )
        if not fits:
            yield f"input `{value.name}` has shape {value.shape} in the file, {list(x.shape)} for the module"
        elif isinstance(value.shape[0], int) and value.shape[0] * x[0].numel() > LARGEST_INPUT:
            yield f"input `{value.name}` has a batch of {value.shape[0]:,} in the file, too large to compare"


def _wrong_metadata(found: Mapping[str, str], expected: Mapping[str, str]) -> Iterator[str]:
    for key, value in expected.items():
        if key not in found:
            yield f"the file's metadata has no `{key}`, expected {value}"
        elif found[key] != value:
            yield f"the file's metadata says `{key}` is {found[key]}, expected {value}"


def _wrong_content(
    model: onnx.ModelProto,
    session: onnxruntime.InferenceSession,
    deployed: Deployed,
    inputs: Sequence[Tensor],
    proof: Proof,
    limits: tuple[float, float],
    notes: list[str],
) -> Iterator[str]:
    """Compare graph, weights and, of an int8 file, classes; the limits are the least agreement and the largest difference of outputs."""
    from indistill_fx.loading.onnx.models import is_from_file
    from indistill_fx.loading.onnx.runtime import is_quantised

    module, quantised = deployed.module, is_quantised(model)
    stated = next((entry.value for entry in model.metadata_props if entry.key == "weights"), None)
    digest = weights_digest(module)
    from_file = is_from_file(module)
    foreign = stated != digest and from_file
    if foreign:
        notes.append(
            "Only outputs were compared: what was read from an ONNX file has another graph when it is exported again."
        )
    elif quantised or not from_file:
        yield from _wrong_graph(model, deployed, inputs, session, notes)
    if quantised:
        yield from _wrong_classes(proof, limits[0], notes, limits[1] if foreign else _SANE)
    if stated not in (None, digest) and not foreign:
        line = f"the file says that it was made from the weights {stated}, the module has {digest}"
        if quantised:
            yield line
        else:
            notes.append(line)


def _wrong_classes(proof: Proof, agreement: float, notes: list[str], tolerance: float) -> Iterator[str]:
    """Compare an int8 file with the float module: classes must agree; without any, a difference of outputs may have a tolerance."""
    worst = max((row.max_rel for row in proof.parity), default=0.0)
    notes.append(f"The file is quantised: on random inputs its outputs are off by up to {worst:.1%} of their range.")
    if proof.real is None:
        notes.append("Its classes were not compared, because that needs real inputs.")
        if worst > tolerance:
            yield "whether it is off by rounding alone cannot be said without real inputs"
    elif proof.real.agreement is None:
        notes.append(
            "Its classes were not compared: no output is called `logits`, nor is one alone of shape (N, classes)."
        )
    elif proof.real.agreement < agreement:
        rows = proof.real.rows
        yield f"the file gives {proof.real.agreement:.2%} of {rows} samples the module's class; {agreement:.2%} are required"


def _resize(x: Tensor, batch: int) -> Tensor:
    return x[torch.arange(batch, device=x.device) % len(x)]


def _wrong_graph(
    model: onnx.ModelProto,
    deployed: Deployed,
    inputs: Sequence[Tensor],
    session: onnxruntime.InferenceSession,
    notes: list[str],
) -> list[str]:
    """Compare nodes and weights with those of a new export that has the file's names, opset and dynamic sizes."""
    from indistill_fx.loading.onnx.runtime import is_quantised

    ins, outs = session.get_inputs(), session.get_outputs()
    if len(named_outputs(deployed(*inputs))) != len(outs):
        return []  # the comparison of outputs reports this already
    try:
        program = capture(
            deployed, inputs, opset=_opset(model), dynamic_batch=isinstance(ins[0].shape[0], str),
            dynamic_size=any(isinstance(size, str) for value in ins for size in value.shape[1:]),
            input_names=[value.name for value in ins], output_names=[value.name for value in outs],
        )  # fmt: skip
    except IndistillError as error:
        notes.append(f"Graph and weights were not compared: {error.message}")
        return []
    fresh = program.model_proto
    if is_quantised(model):
        found, compared, count = wrong_int8_weights(model, fresh)
        if compared < count:
            notes.append(f"{compared} of {count} weights were compared; the quantiser merged or renamed the others.")
        return found
    written = next((entry.value for entry in model.metadata_props if entry.key == "torch"), "?")
    if written == torch.__version__:
        return [*_wrong_nodes(model, fresh), *wrong_weights(model, fresh, strict=True)]
    notes.append(
        f"The file was written with torch {written} and checked with {torch.__version__}, so only weights of the same name were compared."
    )
    return wrong_weights(model, fresh, strict=False)


def _wrong_nodes(model: onnx.ModelProto, fresh: onnx.ModelProto) -> list[str]:
    got, expected = Counter(n.op_type for n in model.graph.node), Counter(n.op_type for n in fresh.graph.node)
    if got != expected:
        parts = [f"{n} {op} too many" for op, n in (got - expected).items()]
        parts += [f"{n} {op} too few" for op, n in (expected - got).items()]
        return [f"the file's graph has {', '.join(parts)}"]

    def content(node: onnx.NodeProto) -> tuple[object, ...]:
        attributes = sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute)
        return (node.op_type, *node.input, *node.output, *attributes)

    pairs = enumerate(zip(model.graph.node, fresh.graph.node, strict=True))
    changed = (
        f"node {i} ({got.op_type} `{got.name}`) has other inputs, outputs or attributes than the module's export"
        for i, (got, expected) in pairs
        if content(got) != content(expected)
    )
    return list(islice(changed, SHOWN))
