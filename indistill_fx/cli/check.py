"""`indistill-fx check`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="check")
@click.argument("file")
@click.option(
    "--against", required=True, metavar="MODEL", help="What the file should compute: a spec or a run directory."
)
@common.input_option
@common.trust_option
def command(file: str, against: str, input_size: str | None, trust: tuple[str, ...]) -> int:
    """Prove a deployed ONNX FILE again: readable, same inputs, graph, weights and outputs as the model.

    Exit code 2 if anything differs.

    \b
    Example:
      indistill-fx check student.onnx --against runs/first
    """
    from rich.text import Text

    from indistill_fx.onnx_check import check_onnx

    source = common.open_model(against, trust)
    report = check_onnx(file, source.module, common.example_for((source,), input_size))
    out = common.console()
    for line in report.differences:
        out.print(Text.assemble(("differs", "bold red"), f"  {line}"), soft_wrap=True)
    for line in report.notes:
        out.print(line, soft_wrap=True)
    if report.agrees:
        out.print(
            f"{file} computes what {against} computes: largest difference {report.max_abs:.1e}, opset {report.opset}."
        )
    return 0 if report.agrees else 2
