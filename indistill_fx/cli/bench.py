"""`indistill-fx bench`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="bench")
@click.argument("models", nargs=-1, required=True)
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(min=1),
    default=(1, 32),
    show_default=True,
    help="Samples in one call; repeatable.",
)
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(min=1),
    help="CPU threads; repeatable. [default: one, and all]",
)
@click.option("--compile", "compiled", is_flag=True, help="Also time torch.compile, which takes a while.")
@common.json_option
@common.input_option
@common.trust_option
def command(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    compiled: bool,
    as_json: bool,
    inputs: tuple[str, ...],
    trust: tuple[str, ...],
) -> None:
    """Time MODELS (specs, run directories, .onnx files) side by side on this CPU; `speed` is relative to the first.

    Each row takes about a second, and at least ten calls; of slow models at least three, and about 10 seconds.

    \b
    Example:
      indistill-fx bench runs/teacher runs/first student.onnx student.int8.onnx
    """
    from indistill_fx.cli.tables import plain_table
    from indistill_fx.deploy.bench import bench, example_of
    from indistill_fx.report.numbers import size
    from indistill_fx.system.terminal import tell

    sources = {spec: common.open_model(spec, trust) for spec in models if not spec.endswith(".onnx")}
    known = sources or inputs
    example = common.example_for(tuple(sources.values()), inputs) if known else example_of(models[0])
    report = bench(
        {spec: sources[spec].module if spec in sources else spec for spec in models},
        example,
        batches=batches,
        threads=threads or None,
        compile=compiled,
        say=tell,
    )
    if as_json:
        common.say_json(report.to_json())
        return
    numbers = ("batch", "threads", "median ms", "p95 ms", "calls", "speed", "size")
    table = plain_table("model", "runtime", *numbers, numbers=numbers)
    for row in report.rows:
        cells = [
            str(row.batch),
            str(row.threads),
            f"{row.median_ms:.3f}",
            f"{row.p95_ms:.3f}",
            f"{row.calls:,}",
            f"{row.speed:.2f}x",
            size(row.size),
        ]
        table.add_row(row.name, row.runtime, *cells)
    common.console().print(table, *filter(None, (*report.notes, report.busy)))
