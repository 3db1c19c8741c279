"""`indistill-fx check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, pictures

if TYPE_CHECKING:
    from indistill_fx.data.dataset import Data
    from indistill_fx.loading.load import Source


@click.command(name="check")
@click.argument("file")
@click.option(
    "--against", required=True, metavar="MODEL", help="What the file should compute: a spec or a run directory."
)
@click.option(
    "--data", metavar="DATA", help="Also compare on this data's test set, and compare its class names with the file's."
)
@common.count_option("--samples", default=512, help="Number of samples of DATA, spread over the classes.")
@pictures.compared_options
def command(
    file: str,
    against: str,
    data: str | None,
    samples: int,
    as_json: bool,
    inputs: tuple[str, ...],
    trust: tuple[str, ...],
    **options: Any,
) -> int:
    """Check that a deployed ONNX FILE still matches the model: it can be read and has the same inputs, graph, weights and outputs.

    Exit code 2 if anything differs. Of an int8 file, the weights are compared up to rounding and, with --data, the predicted classes.

    \b
    Examples:
      indistill-fx check student.onnx --against runs/first
      indistill-fx check student.int8.onnx --against runs/first --data imagefolder:cifar10
    """
    from dataclasses import asdict

    from rich.text import Text

    from indistill_fx.deploy.check_onnx import check_onnx
    from indistill_fx.evaluation.compared_task import decisions_of

    source = common.open_model(against, trust)
    more: dict[str, Any] = {"batch_size": 256, "augment": False, "limit": samples}
    opened = pictures.open_pictures(data, options, source, **more) if data else None
    task = common.task_of_data(options, source, opened)
    report = check_onnx(
        file,
        source.module,
        common.example_for((source,), inputs, opened),
        real_inputs=common.first_inputs(opened.test, samples, source.module) if opened else None,
        metadata=_expected(source, opened),
        decisions=decisions_of(task),
        logits=common.logits_of(options["logits"], source),
    )
    if as_json:
        common.say_json(asdict(report) | {"agrees": report.agrees})
        return 0 if report.agrees else 2
    out = common.console()
    for line in report.differences:
        out.print(Text.assemble(("differs", "bold red"), f"  {line}"), soft_wrap=True)
    for line in report.notes:
        out.print(line, soft_wrap=True)
    if report.real is not None and report.real.agreement is not None:
        out.print(f"{common.agreement(report.real, task)}.")
    if report.agrees:
        share = max((row.max_rel for row in report.parity), default=0.0)
        differs = f"largest difference {report.max_abs:.1e}, which is {share:.1e} of the output's range"
        out.print(f"{file} computes what {against} computes: {differs}, opset {report.opset}.")
    return 0 if report.agrees else 2


def _expected(source: Source, data: Data | None) -> dict[str, str]:
    """The class names and normalisation that the file should have, if they are known."""
    facts = common.deployment_facts("", source, data)
    return {key: value for key, value in facts.items() if key in ("classes", "mean", "std")}
