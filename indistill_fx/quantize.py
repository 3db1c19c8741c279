"""Quantise an exported file to int8, and keep it only if its accuracy holds."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from indistill_fx.errors import ConfigError, ExportError, nearest
from indistill_fx.parity import Array, feed, file_size, first_lines, is_quantised, open_session
from indistill_fx.staged import staged

if TYPE_CHECKING:
    import onnxruntime

Batch: TypeAlias = Tensor | Sequence[Any]
Method: TypeAlias = Literal["static", "dynamic"]
_METHODS = ("static", "dynamic")
_CALIBRATIONS = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """The int8 file beside the float one.

    Attributes:
        path: the int8 file.
        method: static (weights and activations, by calibration) or dynamic (activations scaled at run time).
        calibration: how activation ranges were chosen; None if dynamic.
        calibration_rows: samples seen by the calibration.
        evaluation_rows: samples the accuracies are measured on.
        accuracy_fp32: share of right classes of the float file.
        accuracy_int8: share of right classes of the int8 file.
        agreement: share of samples both files give the same class.
        size_fp32: bytes.
        size_int8: bytes.
    """

    path: Path
    method: str
    calibration: str | None
    calibration_rows: int
    evaluation_rows: int
    accuracy_fp32: float
    accuracy_int8: float
    agreement: float
    size_fp32: int
    size_int8: int

    @property
    def drop(self) -> float:
        """Accuracy lost; negative if int8 is better."""
        return self.accuracy_fp32 - self.accuracy_int8


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
) -> QuantizeReport:
    """Write an int8 version of a float ONNX classifier if it loses no more than `max_drop` of accuracy.

    Static quantisation puts QuantizeLinear/DequantizeLinear pairs around the operations (QDQ) and needs real data to
    choose the ranges; it is the one for convolutional networks. Dynamic needs none; it is the one for transformers.

    Args:
        path: the float file.
        out: the file to write; an older one stays if the new one is not good enough.
        evaluation: batches (inputs…, labels), for the accuracies; passed over once per file, so no iterator.
        calibration: batches of inputs, labels may follow; needed for `static`.
        method: static or dynamic.
        calibrate: how the range of an activation is chosen from the calibration data.
        per_channel: one scale per output channel of a weight.
        reduce_range: weights use 7 of their 8 bits. x86 processors without VNNI add products of 8 bits up in 16, which
            overflows without a sign; a file made this way gives the same classes on all of them.
        max_drop: the largest loss of accuracy accepted, 0.01 is one point.

    Returns:
        Accuracies and sizes of both.

    Raises:
        ConfigError: an option, missing data, or a file that is none or is quantised already.
        ExportError: onnxruntime cannot quantise it, or the accuracy falls too far; nothing is left.
    """
    source, target = Path(path), Path(out)
    for option, value, legal in (("method", method, _METHODS), ("calibrate", calibrate, _CALIBRATIONS)):
        _require(value in legal, f"`{option}` is {value!r}. {nearest(value, legal)}", option)
    session = _open_float(source)
    labels, before = _classify(session, evaluation)
    rows = 0
    with staged(target) as draft, _quiet():
        prepared = draft.with_name("prepared.onnx")
        try:
            _prepare(source, prepared)
            if method == "static":
                reader = _Reader(session, calibration)
                _quantize_static(prepared, draft, reader, calibrate, per_channel=per_channel, reduce_range=reduce_range)
                rows = reader.rows
            else:
                _quantize_dynamic(prepared, draft, per_channel=per_channel, reduce_range=reduce_range)
        except (ConfigError, ExportError):
            raise
        except Exception as error:
            raise ExportError(f"onnxruntime cannot quantise `{source}`: {first_lines(error)}") from error
        for part in draft.parent.glob("prepared*"):
            part.unlink()
        _, after = _classify(open_session(draft), evaluation)
        report = QuantizeReport(
            target, method, calibrate if method == "static" else None, rows, len(labels),
            float((before == labels).mean()), float((after == labels).mean()), float((before == after).mean()),
            file_size(source), file_size(draft),
        )  # fmt: skip
        if report.drop > max_drop:
            raise ExportError(
                f"`{target}` was not written: int8 has {report.accuracy_int8:.2%} accuracy on {len(labels)} samples, "
                f"fp32 {report.accuracy_fp32:.2%}; the drop of {report.drop:.2%} is more than {max_drop:.2%}.",
                where=str(target), got=report.drop, expected=max_drop,
                hint="Try more calibration data, another `calibrate` (entropy, percentile), or a larger max_drop.",
            )  # fmt: skip
    return report


def _require(condition: bool, message: str, where: str) -> None:
    if not condition:
        raise ConfigError(message, where=where)


def _open_float(source: Path) -> onnxruntime.InferenceSession:
    import onnx

    _require(source.is_file(), f"There is no file `{source}`.", str(source))
    try:
        quantised = is_quantised(onnx.load(str(source), load_external_data=False))
    except Exception as error:
        raise ConfigError(f"`{source}` cannot be read as ONNX: {first_lines(error)}", where=str(source)) from error
    _require(not quantised, f"`{source}` is quantised already; give the float file.", str(source))
    return open_session(source)


def _feeds(
    session: onnxruntime.InferenceSession, batches: Iterable[Batch]
) -> Iterator[tuple[dict[str, Array], Sequence[Any]]]:
    """What the file takes, and what is left of the batch: the labels, if there are any."""
    count = len(session.get_inputs())
    for batch in batches:
        parts = [batch] if isinstance(batch, Tensor) else list(batch)
        yield feed(session, parts[:count]), parts[count:]


def _classify(session: onnxruntime.InferenceSession, batches: Iterable[Batch]) -> tuple[Array, Array]:
    """Labels, and the classes the file gives; by its first output of shape (N, classes)."""
    labels, classes = [], []
    for arrays, rest in _feeds(session, batches):
        _require(bool(rest), "Evaluation batches need labels: (inputs, labels).", "evaluation")
        scores = next((y for y in session.run(None, arrays) if y.ndim == 2 and y.shape[1] > 1), None)
        _require(scores is not None, "No output of the file has shape (N, classes), so it has no accuracy.", "path")
        labels.append(np.asarray(rest[0]))
        classes.append(np.asarray(scores).argmax(1))
    _require(bool(labels), "The evaluation data is empty, so the loss of accuracy cannot be measured.", "evaluation")
    return np.concatenate(labels), np.concatenate(classes)


class _Reader:
    """Calibration batches in the form onnxruntime asks for: one dict at a time, then None."""

    def __init__(self, session: onnxruntime.InferenceSession, batches: Iterable[Batch] | None):
        self.rows = 0
        self._feeds = _feeds(session, batches or ())
        self._first = next(self._feeds, None)
        _require(self._first is not None, "Static quantisation needs calibration data (real inputs).", "calibration")

    def get_next(self) -> dict[str, Array] | None:
        current, self._first = self._first or next(self._feeds, None), None
        if current is None:
            return None
        self.rows += len(next(iter(current[0].values())))
        return current[0]


def _prepare(source: Path, prepared: Path) -> None:
    """Shapes inferred and the graph fused, as the quantiser wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    # The symbolic pass needs sympy rules for every operator and adds nothing to what the exporter wrote down.
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)


def _quantize_static(prepared: Path, draft: Path, reader: _Reader, calibrate: str, **weights: bool) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    quantize_static(
        str(prepared), str(draft), reader, quant_format=QuantFormat.QDQ, **weights,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=getattr(CalibrationMethod, _CALIBRATIONS[calibrate]),
    )  # fmt: skip


def _quantize_dynamic(prepared: Path, draft: Path, **weights: bool) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(str(prepared), load_external_data=False)
    del model.graph.value_info[:]  # the quantiser transposes Gemm weights, then trips over their old shapes
    onnx.save(model, str(prepared))
    quantize_dynamic(str(prepared), str(draft), **weights, weight_type=QuantType.QInt8)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the quantiser prints, and the advice it logs on the root logger."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with open(os.devnull, "w") as sink, redirect_stdout(sink), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"onnxruntime(\.|$)")
            yield
    finally:
        root.setLevel(level)
