"""Export a trained student to ONNX, and verify the file before it gets its name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from indistill_fx.deploy.bench import measure
from indistill_fx.deploy.metadata import of_module
from indistill_fx.deploy.onnx_capture import Deployed, capture, quiet
from indistill_fx.deploy.onnx_session import (
    Given,
    feed,
    inputs_of,
    named_outputs,
    open_session,
)
from indistill_fx.deploy.parity import (
    Decisions,
    Parity,
    Proof,
    RealParity,
    allowed_difference,
    main_in_file,
    prove,
    rounding,
)
from indistill_fx.errors import ConfigError, ExportError, IndistillError, first_lines, instead_of
from indistill_fx.graph.edit import one_sample
from indistill_fx.graph.module_state import evaluating, real_dtype
from indistill_fx.graph.preprocess import Pair, Preprocess
from indistill_fx.passes.capture.trace import trace
from indistill_fx.system.exact_arithmetic import exact_arithmetic
from indistill_fx.system.files import staged
from indistill_fx.system.shortage import instead_of_any
from indistill_fx.version import __version__

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch.onnx import ONNXProgram


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how well it agrees with the module.

    Attributes:
        path: the file.
        parity: per batch size and output, on random inputs: (batch_size, output, max_abs, max_rel).
        real: the same on real inputs, with the agreement of the classes; None if none were given.
        max_abs: the largest difference of all.
        size: bytes on disk, including external weights.
        opset: of the file.
        latency_ms: median milliseconds of onnxruntime on one sample.
        parameters: of the module.
        input_names: in order.
        output_names: in order.
        logits: which of them holds the logits, if that is known.
        notes: what a reader should know besides.
    """

    path: Path
    parity: tuple[Parity, ...]
    real: RealParity | None
    max_abs: float
    size: int
    opset: int
    latency_ms: float
    parameters: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    logits: str | None
    notes: tuple[str, ...]


def export_onnx(
    module: nn.Module,
    path: str | PathLike[str],
    example_inputs: Given,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    preprocess: Pair | Preprocess | None = None,
    real_inputs: Given | None = None,
    tolerance: float | None = None,
    batch_sizes: Sequence[int] = (1, 7, 64),
    external_data: bool | None = None,
    decisions: Decisions | None = None,
    logits: str | int | None = None,
) -> ExportReport:
    """Export the module in eval mode; the file appears under its name only once it is verified.

    Rules, in order:

    1. Everything that can be known before the export (names, path, a forward that runs and repeats) is checked first.
    2. What was asked to be dynamic is dynamic in the file, or the export fails.
    3. onnx.checker and onnxruntime accept the file, and every output agrees with torch at every batch size.
    4. The caller's module and the random state are as before, whatever happens.

    Args:
        module: the trained module; a tensor, or any nesting of dicts and tuples of tensors, out.
        path: the file to write; an existing file is replaced only once the new one is verified.
        example_inputs: a tensor, several in order, or by name, of which the module gets those that its forward takes; their first
            dimension is the batch. An argument may be None, or a dict or tuple of tensors, which the file takes one by one.
        opset: the ONNX operator set; None: the exporter's own choice.
        dynamic_batch: the file takes any batch size; False: only that of the example.
        dynamic_size: the file takes images of any height and width (for fully convolutional models), and texts of any length.
        input_names: None: `input`, or the forward's parameter names if there are several; `obs.image`, `state.0` of dicts and tuples.
        output_names: None: the keys of dicts, else `output`, `output_0`, …; `out_sample` where an input is called `sample`.
        metadata: texts to store in the file besides the model's class, the digest of its weights and the versions; for
            example `metadata.of_source(classes=…, normalisation=…)`.
        preprocess: (mean, std) to build in; the file then takes uint8 pixels (N, H, W, C). `example_inputs` and
            `real_inputs` stay normalised float images.
        real_inputs: data to compare on as well, like `example_inputs`.
        tolerance: the largest difference allowed, as a share of the output's range; None: 1e-4, in float16 0.008, in bfloat16 0.06 (8
            machine epsilons).
        batch_sizes: sizes to verify at; with a fixed batch, only that one is used.
        external_data: write the weights to a second file, `<name>.data`; None: only above 1.5 GB (ONNX ends at 2 GB).
        decisions: function from the output called `logits` or `out`, else the first, to whole numbers (or None), which are
            compared on `real_inputs`; None: the largest class of the output called so, or the only one of shape (N, classes).
        logits: key or index of the logits, for modules that return several outputs: `decisions` reads these.

    Returns:
        The report: differences per batch size, size in bytes, latency in milliseconds.

    Raises:
        ConfigError: names, inputs or path are at fault.
        ExportError: the module cannot be exported, is random in eval mode, or the file disagrees; no file is left.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = ifx.export_onnx(DigitsStudent(), f"{folder}/student.onnx", torch.randn(2, 1, 8, 8))
        >>> report.input_names, report.output_names, report.max_abs < 1e-4
        (('input',), ('output',), True)
    """
    built_in, target = Preprocess.make(preprocess), Path(path)
    form, inputs = inputs_of(module, example_inputs, fixed=not dynamic_batch)
    real = inputs_of(module, real_inputs, where="real_inputs")[1] if real_inputs is not None else None
    if built_in:
        inputs, real = _as_pixels(built_in, inputs), _as_pixels(built_in, real) if real else None
    with staged(target) as draft, evaluating(module), exact_arithmetic():
        deployed = Deployed(module, built_in, form)
        deployed.training = False
        found = _repeatable_outputs(deployed, inputs)
        tolerance = allowed_difference(deployed, *inputs) if tolerance is None else tolerance
        input_names = input_names or form.names or _input_names(module, len(inputs))
        ins, outs = _names(input_names, output_names, len(inputs), found)
        main = main_in_file(found, outs, logits)
        known = {"logits": main} if main is not None and len(outs) > 1 else {}
        all_metadata = {**of_module(module), **(built_in.metadata() if built_in else {}), **known, **(metadata or {})}

        def attempt(source: Deployed) -> tuple[int, InferenceSession, Proof]:
            program = capture(
                source, inputs, opset=opset, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size,
                input_names=ins, output_names=outs,
            )  # fmt: skip
            _write(program, draft, all_metadata, external_data)
            _require_valid(draft, real_dtype(deployed) or torch.float32)
            session = open_session(draft)
            proof = prove(
                session, deployed, inputs, tolerance=tolerance, real_inputs=real, decisions=decisions, logits=main,
                batch_sizes=batch_sizes if dynamic_batch else (len(inputs[0]),), other_size=dynamic_size,
            )  # fmt: skip
            chosen = int(program.model.opset_imports[""])
            if proof.failures:
                raise _disagreement(proof, target, deployed, inputs, tolerance=tolerance, opset=chosen)
            return chosen, session, proof

        (chosen, session, proof), source = _as_module_or_graph(attempt, deployed, inputs)
        latency = _latency(session, one_sample(inputs) if dynamic_batch else inputs)
        size = sum(f.stat().st_size for f in draft.parent.iterdir())
    fixed = () if dynamic_batch else (f"The batch size is fixed to {len(inputs[0])}; latency is for that batch.",)
    return ExportReport(
        target, proof.parity, proof.real, proof.max_abs, size, chosen, latency,
        sum(p.numel() for p in module.parameters()), ins, outs, main, (*source, *fixed, *proof.notes)
    )  # fmt: skip


_Exported = TypeVar("_Exported")
_FROM_GRAPH = (
    "Exported from the traced graph, because torch.export fails on the module itself or is wrong for other batch sizes."
)


def _as_module_or_graph(
    attempt: Callable[[Deployed], _Exported], deployed: Deployed, inputs: Sequence[Tensor]
) -> tuple[_Exported, tuple[str, ...]]:
    """What the module is exported to; if torch cannot do that, what its traced graph is, with a note for the report.

    For `int(x.shape[0] / n)` torch.export takes the example's number, and what it makes of that is wrong for other batches. In the graph
    it is a floor division.
    """
    try:
        return attempt(deployed), ()
    except ExportError as error:
        if isinstance(deployed.module, fx.GraphModule):
            raise
        args, kwargs = deployed.arguments(inputs)
        try:
            with quiet():
                graph = trace(deployed.module, kwargs or args)
            return attempt(deployed.with_module(graph.graph_module)), (_FROM_GRAPH,)
        except IndistillError:
            raise error from None


def _latency(session: InferenceSession, inputs: Sequence[Tensor]) -> float:
    """Median milliseconds of a run."""
    sample = feed(session, inputs)
    return measure({"onnx": lambda: session.run(None, sample)}, seconds=0.1)["onnx"].median_ms


def _as_pixels(preprocess: Preprocess, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if inputs[0].dim() != 4:
        shape = tuple(inputs[0].shape)
        raise ConfigError(
            f"Preprocessing can be built in only for images (N, C, H, W); the input's shape is {shape}.",
            where="preprocess", hint="Leave `preprocess` out for this model.",
        )  # fmt: skip
    return (preprocess.to_pixels(inputs[0]), *inputs[1:])


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    if count == 1:
        return ("input",)
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    return tuple(names[:count]) if len(names) >= count else tuple(f"input_{i}" for i in range(count))


def _names(
    ins: Sequence[str], outs: Sequence[str] | None, inputs: int, found: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of inputs and outputs in the file; without names for the outputs, those that were found."""
    outs = outs or [f"out_{name}" if name in ins else name for name in found]
    for kind, names, count in (("input", ins, inputs), ("output", outs, len(found))):
        if len(names) != count:
            detail = f": {', '.join(found)}" if kind == "output" else ""
            raise ConfigError(
                f"{kind}_names gives {len(names)} ({', '.join(names)}), but the module has {count} {kind}s{detail}.",
                where=f"{kind}_names", got=len(names), expected=count,
            )  # fmt: skip
    twice = sorted({name for name in (*ins, *outs) if (*ins, *outs).count(name) > 1})
    if twice:
        raise ConfigError(
            f"Inputs and outputs of an ONNX file need different names; used twice: {', '.join(twice)}.",
            where="output_names", hint="Pass input_names or output_names.",
        )  # fmt: skip
    return tuple(ins), tuple(outs)


def _repeatable_outputs(deployed: Deployed, inputs: Sequence[Tensor]) -> tuple[str, ...]:
    """The outputs' names, if two runs of the module agree."""
    try:
        first = named_outputs(deployed.outputs(*inputs))
        second = named_outputs(deployed.outputs(*inputs))
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise ConfigError(
            f"`{type(deployed.module).__name__}` does not run on the example inputs (shapes {shapes}): "
            f"{type(error).__name__}: {first_lines(error)}",
            where="example_inputs", hint="Check their number, shapes and types.",
        ) from error  # fmt: skip
    if not first:
        raise ExportError(
            f"`{type(deployed.module).__name__}` returns no tensor, so there is nothing to export.",
            where="output",
            hint="Let its forward return a tensor, or a dict or tuple with tensors.",
        )
    for name, value in first.items():
        if value.is_complex():
            raise ExportError(
                f"Output `{name}` of `{type(deployed.module).__name__}` is complex; ONNX has no complex numbers.",
                where=name, hint="Return torch.view_as_real(…) of it.",
            )  # fmt: skip
        gap = (value.double() - second[name].double()).abs().max().item() if value.numel() else 0.0
        if gap > 1e-5 * max(1.0, value.double().abs().max().item()):
            sources = _random_operations(deployed, inputs)
            raise ExportError(
                f"`{type(deployed.module).__name__}` is random in eval mode: two runs on the same input differ by "
                f"{gap:.3g} in output `{name}`; {sources}.",
                where=name, got=gap, expected=0.0,
                hint="Tie the randomness to `self.training` (F.dropout needs training=self.training).",
            )  # fmt: skip
    return tuple(first)


def _random_operations(deployed: Deployed, inputs: Sequence[Tensor]) -> str:
    found: dict[str, None] = {}
    tracker = ModuleTracker()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if torch.Tag.nondeterministic_seeded in func.tags:
                place = max(tracker.parents - {"Global"}, key=len, default="")
                found[f"{func.overloadpacket} in `{place}`"] = None
            return func(*args, **(kwargs or {}))

    with tracker, Watch():  # type: ignore[no-untyped-call]
        deployed.outputs(*inputs)
    return "drawn by " + ", ".join(found) if found else "no random operation of torch was seen, so it keeps a state"


def _write(program: ONNXProgram, draft: Path, metadata: Mapping[str, str], external_data: bool | None) -> None:
    program.model.producer_name, program.model.producer_version = "indistill-fx", __version__
    program.model.metadata_props.update({k: str(v) for k, v in metadata.items()})
    target, hint = draft.parent.parent / draft.name, "Free some space, or name another place."
    with instead_of(OSError, ExportError(f"Cannot write `{target}`", where=str(target), hint=hint)):
        program.save(draft, external_data=external_data)


def _require_valid(draft: Path, dtype: torch.dtype) -> None:
    import onnx

    hint = "Try another opset (--opset) or another version of torch, and please report it."
    if dtype == torch.bfloat16:
        hint = "ONNX has few operators in bfloat16: export the model in float32 (`model.float()`)."
    with instead_of_any(ExportError("The exported graph is not valid ONNX", where="export", hint=hint)):
        onnx.checker.check_model(str(draft), full_check=True)


def _disagreement(
    proof: Proof, target: Path, deployed: Deployed, inputs: Sequence[Tensor], *, tolerance: float, opset: int
) -> ExportError:
    rest = f" ({len(proof.failures) - 1} more comparisons failed)" if len(proof.failures) > 1 else ""
    hint = "Try another opset; if the difference is harmless for your use, raise the tolerance."
    rounding_error = rounding(deployed, proof.failed_on or inputs)
    if " and size " in proof.failures[0]:
        hint = "Not every model takes images of any size, or texts of any length; export a fixed one with dynamic_size=False."
    elif rounding_error is not None and rounding_error > tolerance / 10:
        off = f"torch in its own precision is {rounding_error:.1g} of the range off from float64."
        hint = f"The model amplifies rounding: {off}"
        if (dtype := real_dtype(deployed) or torch.float32).itemsize < 4:
            hint = f"The weights are {dtype}: {off} Raise the tolerance (--tolerance), or export the model in float32 (`model.float()`)."
    return ExportError(
        f"`{target}` was not written: onnxruntime and torch disagree (opset {opset}): {proof.failures[0]}{rest}.",
        where=str(target), got=proof.max_abs, expected=tolerance, hint=hint,
    )  # fmt: skip
