"""Quantise an exported file to int8, and keep it only if it stays as good."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from indistill_fx.deploy.judge import Batch, Judgement, judge, pieces
from indistill_fx.deploy.onnx_session import Array, file_size, graph_of, open_session
from indistill_fx.errors import ConfigError, ExportError, nearest
from indistill_fx.losses.task import Task
from indistill_fx.system.files import staged
from indistill_fx.system.shortage import instead_of_any
from indistill_fx.version import __version__

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Method: TypeAlias = Literal["static", "dynamic", "auto"]
_METHODS = ("static", "dynamic", "auto")
_CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
_CALIBRATION_ROWS = 16
_BESIDE = 1_500_000_000  # from this many bytes on, weights go to a second file; one protobuf file ends at 2 GB


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """The int8 file compared with the float one.

    Attributes:
        path: the int8 file.
        method: static (weights and activations, by calibration) or dynamic (activations scaled at run time).
        calibration: how activation ranges were chosen; None if dynamic.
        calibration_rows: samples seen by the calibration.
        evaluation_rows: samples the metric is measured on.
        metric: name of the task's metric that decides: `accuracy`, `mean_iou`, `perplexity`, …
        share: whether it is a share, written in per cent.
        metric_fp32: of the float file.
        metric_int8: of the int8 file.
        drop: what int8 loses, below 0 if it is better: of a share such as accuracy the difference, of other metrics the change as a
            share of the float file's.
        agreement: share of decisions (classes of samples or pixels, words, labels) that are the same; None if outputs are values.
        per_class: of a classifier, per class of the labels, the accuracies of the float file and of the int8 file.
        size_fp32: bytes.
        size_int8: bytes.
        in_float: recurrent layers that the int8 file computes in float, by kind, with their number.
    """

    path: Path
    method: str
    calibration: str | None
    calibration_rows: int
    evaluation_rows: int
    metric: str
    share: bool
    metric_fp32: float
    metric_int8: float
    drop: float
    agreement: float | None
    per_class: Mapping[int, tuple[float, float]]
    size_fp32: int
    size_int8: int
    in_float: Mapping[str, int]


def quantize_onnx(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    evaluation: Iterable[Batch],
    calibration: Iterable[Batch] | None = None,
    method: Method = "static",
    calibrate: Literal["minmax", "entropy", "percentile"] = "minmax",
    per_channel: bool = True,
    reduce_range: bool = True,
    max_drop: float = 0.01,
    logits: str | int | None = None,
    task: str | Task | None = None,
) -> QuantizeReport:
    """Write an int8 version of a float ONNX file if by its task's metric it loses no more than `max_drop`.

    Static quantisation puts QuantizeLinear/DequantizeLinear pairs around the operations (QDQ) and needs real data to
    choose the ranges; use it for convolutional networks. Dynamic quantisation needs none; use it for transformers.

    Args:
        path: the float file.
        out: the file to write; an existing one is kept if the new one is not good enough.
        evaluation: batches (inputs…, labels) to measure on; read once per file, so an iterator is not enough.
        calibration: batches of inputs, perhaps with labels; needed for `static`.
        method: `static`, `dynamic`, or `auto`: dynamic if the file has attention, else static.
        calibrate: how the range of an activation is chosen from the calibration data.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights use 7 of their 8 bits. x86 processors without VNNI add up products of 8 bits in 16 bits, which can
            overflow; a file made this way gives the same classes on all of them.
        max_drop: the largest loss accepted: 0.01 is one point of accuracy, or 1% more perplexity (see `QuantizeReport.drop`).
        logits: name or index of the output that holds the logits; None: the one called `logits` or `out`, or the only one of shape
            (N, classes), or the only one.
        task: what labels mean, as in `evaluate`; None: inferred from the first batch.

    Returns:
        The metric's values and the sizes (bytes) of both files.

    Raises:
        ConfigError: an option is at fault, data are missing or do not fit the task, or the file is unreadable or already quantised.
        ExportError: onnxruntime cannot quantise it, or the metric gets too much worse; no file is left.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent
        >>> data = ifx.open_data("digits", limit=100)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = ifx.export_onnx(DigitsStudent(), f"{folder}/student.onnx", torch.randn(2, 1, 8, 8))
        ...     both = dict(calibration=data.train_plain, evaluation=data.test, max_drop=1.0)
        ...     report = ifx.quantize_onnx(f"{folder}/student.onnx", f"{folder}/int8.onnx", **both)
        >>> report.method, report.size_int8 < report.size_fp32
        ('static', True)
    """
    source, target = Path(path), Path(out)
    for option, value, legal in (("method", method, _METHODS), ("calibrate", calibrate, _CALIBRATIONS)):
        _require(value in legal, f"`{option}` is {value!r}. {nearest(value, legal)}", option)
    session, attention = _open_float(source)
    if method == "auto":
        method = "dynamic" if attention else "static"
    beside = file_size(source) > _BESIDE
    weights = {"per_channel": per_channel, "reduce_range": reduce_range, "use_external_data_format": beside}
    before = judge(session, evaluation, task=task, logits=logits)
    rows = 0
    with staged(target) as draft, _quiet():
        prepared = draft.with_name("prepared.onnx")
        hint = "Try the other method: --dynamic or --static."
        refused = ExportError(f"onnxruntime cannot quantise `{source}`", where=str(source), hint=hint)
        with instead_of_any(refused, filled=draft.parent):
            _prepare(source, prepared, beside=beside)
            if method == "static":
                reader = _Reader(session, calibration, held=calibrate != "minmax")
                _quantize_static(prepared, draft, reader, calibrate, **weights)
                rows = reader.rows
            else:
                _quantize_dynamic(prepared, draft, **weights)
        for part in draft.parent.glob("prepared*"):
            part.unlink()
        in_float = _left_in_float(draft, target, method)
        after = judge(open_session(draft), evaluation, task=before.task, logits=logits)
        report = QuantizeReport(
            target, method, calibrate if method == "static" else None, rows, before.count,
            before.metric.name, before.metric.share, before.value, after.value, before.loss(after.value), before.agreement(after),
            before.per_class(after), file_size(source), 0, in_float,
        )  # fmt: skip
        if not report.drop <= max_drop:  # also where it is not a number
            raise _too_bad(before, after, report, max_drop)
        _write_down(draft, report)
        report = replace(report, size_int8=file_size(draft))
    return report


def _too_bad(before: Judgement, after: Judgement, report: QuantizeReport, max_drop: float) -> ExportError:
    text, name = before.metric.text, before.metric.title
    change = "the drop" if before.metric.higher_is_better else "the rise"
    return ExportError(
        f"`{report.path}` was not written: int8 has {text(after.value)} {name} on {before.count} samples, "
        f"fp32 {text(before.value)}; {change} of {report.drop:.2%} is more than {max_drop:.2%}.",
        where=str(report.path), got=report.drop, expected=max_drop,
        hint="Try more calibration data, another `calibrate` (entropy, percentile), or train for int8: `distill … --qat 3`.",
    )  # fmt: skip


def _require(condition: bool, message: str, where: str, hint: str = "") -> None:
    if not condition:
        raise ConfigError(message, where=where, hint=hint)


def _open_float(source: Path) -> tuple[onnxruntime.InferenceSession, bool]:
    """Open the file; also returns whether it contains attention."""
    from indistill_fx.loading.onnx.runtime import is_quantised

    _require(os.path.exists(source), f"There is no file `{source}`.", str(source))
    model = graph_of(source)
    _require(not is_quantised(model), f"`{source}` is quantised already; give the float file.", str(source))
    return open_session(source), _has_attention(model)


def _has_attention(model: onnx.ModelProto) -> bool:
    """Whether there is a matrix product with a softmax, perhaps masked on the way, or a fused attention operation."""
    shares: set[str] = set()
    for node in model.graph.node:
        reads = not shares.isdisjoint(node.input)
        if node.op_type == "Attention" or (node.op_type == "MatMul" and reads):
            return True
        if node.op_type == "Softmax" or (node.op_type in ("Where", "Cast", "Mul", "Dropout", "Identity") and reads):
            shares.update(node.output)
    return False


class _Reader:
    """Calibration data in the form that onnxruntime requires: one dict at a time, then None; optionally a range of them.

    Args:
        session: the float file.
        batches: batches of inputs, labels may follow.
        held: keep all inputs, so that ranges can be read.
    """

    def __init__(self, session: onnxruntime.InferenceSession, batches: Iterable[Batch] | None, *, held: bool):
        self.rows = 0
        given = pieces(session, batches or (), most=_CALIBRATION_ROWS)
        first = next(given, None)
        _require(first is not None, "Static quantisation needs calibration data (real inputs).", "calibration")
        assert first is not None
        stream = itertools.chain([first], given)
        self._all = list(stream) if held else []
        self._given = iter(self._all) if held else stream

    def __len__(self) -> int:
        return len(self._all)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Continue with the pieces of a range."""
        self._given = iter(self._all[start_index:end_index])

    def get_next(self) -> dict[str, Array] | None:
        """The next piece."""
        piece = next(self._given, None)
        if piece is None:
            return None
        self.rows += piece.rows
        return piece.arrays


def _prepare(source: Path, prepared: Path, *, beside: bool) -> None:
    """Infer shapes and fuse the graph, as the quantiser requires."""
    search_path = list(sys.path)
    from onnxruntime.quantization.shape_inference import quant_pre_process

    sys.path[:] = search_path  # the import adds a folder with a `models` and a `metrics`, which would hide the user's

    # Symbolic shape inference needs sympy rules for every operator, and adds nothing to the shapes from the exporter.
    quant_pre_process(
        str(source), str(prepared), skip_symbolic_shape=True, save_as_external_data=beside,
        all_tensors_to_one_file=True, external_data_location=f"{prepared.name}.data",
    )  # fmt: skip


def _quantize_static(prepared: Path, draft: Path, reader: _Reader, calibrate: str, **options: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(prepared), str(draft), reader, quant_format=QuantFormat.QDQ, **options,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, _CALIBRATIONS[calibrate]),
        # Histograms of all activations would not fit into memory: the calibration data are read one piece at a time.
        extra_options={"CalibStridedMinMax": 1} if len(reader) else {},
    )  # fmt: skip


def _quantize_dynamic(prepared: Path, draft: Path, **options: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(prepared), load_external_data=False)
    del model.graph.value_info[:]  # the quantiser transposes Gemm weights, and fails on their old shapes
    onnx.save(model, str(prepared))
    quantize_dynamic(str(prepared), str(draft), **options, weight_type=QuantType.QInt8)


def _left_in_float(draft: Path, target: Path, method: str) -> dict[str, int]:
    """The recurrent layers that a quantised file computes in float, by kind.

    Raises:
        ExportError: nothing in it is quantised.
    """
    from indistill_fx.loading.onnx.read import nodes_of
    from indistill_fx.loading.onnx.runtime import is_quantised

    model = graph_of(draft)
    kinds = [node.op_type for node in nodes_of(model.graph) if node.op_type in ("LSTM", "GRU", "RNN")]
    found = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    if not is_quantised(model):
        dynamic = "LSTM" in found and method == "static"
        raise ExportError(
            f"`{target}` was not written: none of the model's operators can be computed in int8 ({method}).",
            where=str(target),
            hint="LSTM layers can be with the other method: --dynamic (method='dynamic')." if dynamic else _FLOAT_ALONE,
        )
    return found


_FLOAT_ALONE = "Use the float file: leave int8 out (--int8)."


def _write_down(draft: Path, report: QuantizeReport) -> None:
    """Write the report into the file's metadata, and remove the quantiser's own entries."""
    import onnx

    model = onnx.load(str(draft), load_external_data=False)
    metadata = {entry.key: entry.value for entry in model.metadata_props if not entry.key.startswith("onnx.")}
    facts = ("method", "calibration", "calibration_rows", "evaluation_rows", "metric", "metric_fp32", "metric_int8")
    metadata["int8"] = json.dumps({name: getattr(report, name) for name in facts})
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.producer_version = "indistill-fx", __version__
    onnx.save(model, str(draft))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what the quantiser prints and logs on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)  # it logs errors with their tracebacks, and goes on to fail for another reason
    try:
        with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"onnxruntime(\.|$)")
            yield
    finally:
        root.setLevel(level)
