"""`indistill-fx export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common

if TYPE_CHECKING:
    from indistill_fx.data import Data
    from indistill_fx.quantize import QuantizeReport


@click.command(name="export")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .onnx file to write.")
@click.option(
    "--data",
    metavar="DATA",
    help="Also compare on this data's test set, and take class names from it; needed by --int8.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Also write FILE with .int8.onnx: static quantisation, calibrated on the training set of DATA.",
)
@click.option("--dynamic", is_flag=True, help="With --int8: quantise dynamically instead (for transformers).")
@click.option(
    "--max-drop", default=1.0, show_default=True, type=float, help="With --int8: accuracy points that may be lost."
)
@click.option(
    "--preprocess",
    is_flag=True,
    help="Build normalisation in: the file takes uint8 pixels (batch, height, width, channels).",
)
@click.option("--opset", type=int, help="ONNX operator set. [default: the exporter's]")
@click.option("--fixed-batch", is_flag=True, help="Fix the batch size to 1 instead of leaving it open.")
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open (fully convolutional models).")
@common.input_option
@common.trust_option
def command(
    model: str,
    output: str,
    data: str | None,
    int8: bool,
    input_size: str | None,
    trust: tuple[str, ...],
    **options: Any,
) -> None:
    """Export MODEL (a spec or a run directory of `distill` or `train`) to ONNX.

    The file is compared with the module at batch sizes 1, 7 and 64; if they disagree no file is left.

    \b
    Examples:
      indistill-fx export runs/first -o student.onnx
      indistill-fx export runs/first -o student.onnx --int8 --data imagefolder:cifar10
    """
    from indistill_fx.data import open_data
    from indistill_fx.errors import ConfigError
    from indistill_fx.export import export_onnx
    from indistill_fx.runs import is_run, keep_export

    if int8 and data is None:
        raise ConfigError(
            "--int8 has no data to calibrate and measure on.", where="--int8", hint="Give it: --data DATA."
        )
    source = common.open_model(model, trust)
    opened = open_data(data, batch_size=256, augment=False) if data else None
    normalisation = (opened.normalisation if opened else None) or source.normalisation
    if options["preprocess"] and normalisation is None:
        raise ConfigError(
            f"The normalisation of {model}'s inputs is not known.",
            where="--preprocess",
            hint="Give the data it was trained on: --data DATA.",
        )
    report = export_onnx(
        source.module,
        output,
        common.example_for((source,), input_size, opened.input_size if opened else None),
        opset=options["opset"],
        dynamic_batch=not options["fixed_batch"],
        dynamic_size=options["dynamic_size"],
        preprocess=normalisation if options["preprocess"] else None,
        real_inputs=next(iter(opened.test))[0] if opened else None,
        metadata=_metadata(model, opened),
    )
    out = common.console()
    out.print(f"{report.path}: opset {report.opset}, {report.size / 2**20:.2f} MiB, {report.parameters:,} parameters")
    for check in report.parity:
        out.print(f"  batch {check.batch_size:>2}: `{check.output}` differs by at most {check.max_abs:.1e}")
    if report.real is not None and report.real.agreement is not None:
        out.print(f"  real data: {100 * report.real.agreement:.2f}% of {report.real.rows} samples get the same class")
    out.print(f"  onnxruntime: {report.latency_ms:.2f} ms a sample at batch 1 (median)")
    for note in report.notes:
        out.print(f"  {note}")
    kept = is_run(model)
    lost = keep_export(model, path=str(report.path), size=report.size, latency_ms=report.latency_ms) if kept else None
    if int8 and opened is not None:
        small = _quantize(Path(output), opened, dynamic=options["dynamic"], max_drop=options["max_drop"])
        if kept:
            lost = keep_export(model, int8_size=small.size_int8, int8_accuracy=small.accuracy_int8)
    if lost:
        out.print(lost)


def _metadata(model: str, data: Data | None) -> dict[str, str]:
    import json

    from indistill_fx import __version__

    told = {"model": model, "indistill_fx": __version__}
    return told | ({"classes": json.dumps(data.classes)} if data and data.classes else {})


def _quantize(source: Path, data: Data, *, dynamic: bool, max_drop: float) -> QuantizeReport:
    from indistill_fx.quantize import quantize_onnx

    report = quantize_onnx(
        source,
        source.with_suffix(".int8.onnx"),
        evaluation=data.test,
        calibration=data.train_plain,
        method="dynamic" if dynamic else "static",
        max_drop=max_drop / 100,
    )
    smaller = report.size_fp32 / report.size_int8
    accuracies = f"{100 * report.accuracy_fp32:.2f}% in fp32, {100 * report.accuracy_int8:.2f}% in int8"
    out = common.console()
    out.print(f"{report.path}: int8, {report.method}, {report.size_int8 / 2**20:.2f} MiB ({smaller:.1f}x smaller)")
    out.print(f"  accuracy {accuracies} on {report.evaluation_rows:,} samples")
    return report
