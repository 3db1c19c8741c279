"""`indistill-fx export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, pictures

if TYPE_CHECKING:
    from indistill_fx.data.dataset import Data
    from indistill_fx.deploy.export_onnx import ExportReport
    from indistill_fx.deploy.quantize import QuantizeReport
    from indistill_fx.loading.load import Source
    from indistill_fx.losses.task import Task


@click.command(name="export")
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .onnx file to write.")
@click.option(
    "--data",
    metavar="DATA",
    help="Also compare on this data's test set, and take class names from it; needed by --int8.",
)
@common.count_option(
    "--samples",
    default=512,
    help="Number of samples of DATA, spread over the classes, to compare on and to calibrate on.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Also write an int8 file (.int8.onnx), calibrated on the training set of DATA.",
)
@click.option(
    "--dynamic/--static",
    default=None,
    help="With --int8: scale activations at run time (for transformers), or by calibration. [default: dynamic if the "
    "model has attention]",
)
@common.choice_option(
    "--calibrate",
    ["minmax", "entropy", "percentile"],
    help="With --int8: how ranges of activations are chosen.",
)
@click.option(
    "--max-drop",
    default=1.0,
    show_default=True,
    type=float,
    help="With --int8: largest loss of accuracy allowed, or of another share such as mIoU, in points; of other metrics, such as "
    "perplexity, the largest change for the worse, in percent. If it is larger, no int8 file is written.",
)
@click.option(
    "--preprocess",
    is_flag=True,
    help="Build normalisation in: the file takes uint8 pixels (batch, height, width, channels).",
)
@click.option("--opset", type=int, help="ONNX operator set. [default: the exporter's]")
@click.option("--fixed-batch", is_flag=True, help="Fix the batch size to 1 instead of leaving it open.")
@click.option(
    "--dynamic-size",
    is_flag=True,
    help="Leave height and width open (fully convolutional models), or the length of texts.",
)
@click.option("--input-names", metavar="A,B", help="Names of the file's inputs.")
@click.option("--output-names", metavar="A,B", help="Names of the file's outputs.")
@click.option(
    "--tolerance",
    type=float,
    help="Largest difference allowed, as a share of the output's range. [default: 1e-4; for weights in float16 0.008, in bfloat16 0.06]",
)
@pictures.compared_options
def command(
    model: str,
    output: str,
    data: str | None,
    samples: int,
    int8: bool,
    inputs: tuple[str, ...],
    trust: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Export MODEL (a spec or a run directory of `distill` or `train`) to ONNX.

    The file is compared with the module at batch sizes 1, 7 and 64; if they disagree, no file is written.

    \b
    Examples:
      indistill-fx export runs/first -o student.onnx
      indistill-fx export runs/first -o student.onnx --int8 --data imagefolder:cifar10
    """
    from indistill_fx.deploy.export_onnx import export_onnx
    from indistill_fx.errors import ConfigError
    from indistill_fx.evaluation.compared_task import decisions_of, facts_to_keep
    from indistill_fx.runs.load import is_run, keep_export

    _require_possible(output, data, int8, options["task"])
    source = common.open_model(model, trust)
    more: dict[str, Any] = {"batch_size": 256, "augment": False}
    opened = pictures.open_pictures(data, options, source, limit=samples, **more) if data else None
    task = common.task_of_data(options, source, opened)
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
        common.example_for((source,), inputs, opened),
        opset=options["opset"],
        dynamic_batch=not options["fixed_batch"],
        dynamic_size=options["dynamic_size"],
        input_names=_names(options["input_names"]),
        output_names=_names(options["output_names"]),
        preprocess=normalisation if options["preprocess"] else None,
        real_inputs=common.first_inputs(opened.test, samples, source.module) if opened else None,
        metadata=common.deployment_facts(model, source, opened, facts_to_keep(options["task"], task, source)),
        tolerance=options["tolerance"],
        decisions=decisions_of(task),
        logits=common.logits_of(options["logits"], source),
    )
    classes, kept = (opened.classes if opened else ()) or source.classes, is_run(model)
    failed = keep_export(model, path=str(report.path), size=report.size, latency_ms=report.latency_ms) if kept else None
    if not as_json:
        _tell(report, classes, _names_of_outputs(task, source), task, with_data=opened is not None)
    quantized = None
    if int8 and opened is not None and data is not None:
        full_data = pictures.open_pictures(data, options, source, told=False, **more)
        quantized = _quantize(Path(output), opened, full_data, samples, options, report.logits, task)
        if kept:
            failed = keep_export(model, int8_size=quantized.size_int8, int8_value=quantized.metric_int8)
    if as_json:
        _print_json(report, quantized)
    elif quantized is not None:
        _tell_int8(quantized, classes, task)
    if failed:
        common.say(failed)


def _require_possible(output: str, data: str | None, int8: bool, task: str | None) -> None:
    from indistill_fx.errors import ConfigError

    path = Path(output)
    if path.suffix != ".onnx":
        hint = f"Write -o {path.with_suffix('.onnx')}."
        raise ConfigError(f"{output} does not end in .onnx.", where="-o", got=output, hint=hint)
    hint = "Give the data: --data DATA."
    if int8 and data is None:
        raise ConfigError("--int8 has no data to calibrate and measure on.", where="--int8", hint=hint)
    if task and data is None:
        raise ConfigError("--task says what labels mean, but there are no labels.", where="--task", hint=hint)


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text else None


def _quantize(
    source: Path,
    opened: Data,
    full_data: Data,
    samples: int,
    options: dict[str, Any],
    logits: str | int | None,
    task: Task | None,
) -> QuantizeReport:
    from indistill_fx.deploy.quantize import quantize_onnx

    dynamic = options["dynamic"]
    return quantize_onnx(
        source,
        source.with_suffix(".int8.onnx"),
        evaluation=full_data.test,
        calibration=common.first_batches(opened.train_plain, samples),
        method="auto" if dynamic is None else "dynamic" if dynamic else "static",
        calibrate=options["calibrate"],
        max_drop=options["max_drop"] / 100,
        logits=logits,
        task=task,
    )


def _print_json(report: ExportReport, small: QuantizeReport | None) -> None:
    from dataclasses import asdict

    fields = asdict(report) | {"parity": [row._asdict() for row in report.parity]}
    if report.real is not None:
        fields["real"]["parity"] = [row._asdict() for row in report.real.parity]
    common.say_json(fields | {"int8": asdict(small) if small else None})


_NAMED = {"classification": "class names", "segmentation": "class names", "multilabel": "label names"}
"""What the outputs of a task's models can have; those of others are values, features, or words of a vocabulary."""


def _names_of_outputs(task: Task | None, source: Source) -> str:
    """What a file should hold of its outputs; empty where they have no names."""
    kept = source.task.get("name") if source.task is not None else None
    name = task.name if task is not None else kept
    return _NAMED.get(str(name), "") if name is not None else "class names"


def _class_name(classes: tuple[str, ...], label: int) -> str:
    """The class's name, or its number."""
    return classes[label] if label < len(classes) else str(label)


def _tell(report: ExportReport, classes: tuple[str, ...], names: str, task: Task | None, *, with_data: bool) -> None:
    from indistill_fx.report.numbers import size

    out, told = common.console(), set[tuple[int, str]]()
    out.print(f"{report.path}: opset {report.opset}, {size(report.size)}, {report.parameters:,} parameters")
    for check in report.parity:
        again = " of another size" if (check.batch_size, check.output) in told else ""
        told.add((check.batch_size, check.output))
        out.print(
            f"  batch {check.batch_size:>2}{again}: `{check.output}` differs by at most {check.max_abs:.1e} "
            f"({check.max_rel:.1e} of its range)"
        )
    if report.real is not None and report.real.agreement is not None:
        out.print(f"  real data: {common.agreement(report.real, task)}")
        below = sorted((share, label) for label, share in report.real.per_class.items() if share < 1)
        for share, label in below[:5]:
            out.print(f"    {_class_name(classes, label)}: {100 * share:.2f}%")
    out.print(f"  onnxruntime: {report.latency_ms:.2f} ms a sample at batch 1 (median)")
    if names and not classes:
        how = "let make_loaders return a dict with `classes`" if with_data else "give the data: --data DATA"
        out.print(f"  The file holds no {names}, because they are not known; {how}.")
    for note in report.notes:
        out.print(f"  {note}")


def _tell_int8(report: QuantizeReport, classes: tuple[str, ...], task: Task | None) -> None:
    from indistill_fx.deploy.parity import RealParity
    from indistill_fx.report.numbers import measured, size

    times = report.size_fp32 / report.size_int8
    change = f"{times:.1f}x smaller" if times >= 1 else f"{1 / times:.1f}x larger"
    before, after = (measured(value, share=report.share) for value in (report.metric_fp32, report.metric_int8))
    ranges = (
        f"{report.calibration} over {report.calibration_rows} samples" if report.calibration else "scaled at run time"
    )
    out = common.console()
    out.print(f"{report.path}: int8, {report.method} ({ranges}), {size(report.size_int8)} ({change})")
    name = report.metric.replace("_", " ")
    out.print(f"  {name} {before} in fp32, {after} in int8 on {report.evaluation_rows:,} samples")
    if report.agreement is not None and not report.per_class:
        out.print(f"  {common.agreement(RealParity(report.evaluation_rows, (), report.agreement, {}), task)}")
    for kind, count in report.in_float.items():
        other = "; with --dynamic, in int8" if kind == "LSTM" and report.method == "static" else ""
        out.print(f"  {count} {kind} layer{'s' * (count != 1)}: computed in float{other}")
    drop, label = max(((one - other, label) for label, (one, other) in report.per_class.items()), default=(0.0, 0))
    if drop > 0:
        out.print(f"  most lost: {100 * drop:.2f} points of class {_class_name(classes, label)}")
