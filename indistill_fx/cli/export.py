"""`indistill-fx export`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="export")
@click.argument("model")
@click.option(
    "-o", "--output", required=True, metavar="FILE", type=click.Path(dir_okay=False), help="The .onnx file to write."
)
@click.option("--opset", type=int, help="ONNX opset. [default: the exporter's]")
@common.input_option
@common.trust_option
def command(model: str, output: str, opset: int | None, input_size: str | None, trust: tuple[str, ...]) -> None:
    r"""Export MODEL (a spec or a run directory of `distill` or `train`) to ONNX.

    The file is compared with the module at batch sizes 1, 7 and 64; if they disagree no file is left.

    \b
    Example:
      indistill-fx export runs/first -o student.onnx
      indistill-fx export torchvision:resnet18@weights.safetensors -o resnet18.onnx
    """
    from indistill_fx.export import export_onnx

    source = common.open_model(model, trust)
    report = export_onnx(source.module, output, common.example_for((source,), input_size), opset=opset)
    out = common.console()
    out.print(
        f"[bold]{report.path}[/]: opset {report.opset}, {report.size / 2**20:.2f} MiB, {report.parameters:,} parameters"
    )
    for check in report.parity:
        out.print(f"  batch {check.batch_size:>3}: output `{check.output}` differs by at most {check.max_abs:.1e}")
    out.print(f"  onnxruntime: {report.latency_ms:.2f} ms at batch 1 (median)")
