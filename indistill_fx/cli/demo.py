"""`indistill-fx demo`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="demo")
@click.option("-o", "--output", metavar="DIR", help="Where everything goes. [default: a new folder runs/demo-N]")
@common.count_option(
    "--seed",
    default=0,
    least=0,
    help="Seed of the weights, the order of the samples and the choice of the hundred images.",
)
def command(output: str | None, seed: int) -> None:
    """Run every step on data that ships with scikit-learn: a teacher, a student made from it, distillation, ONNX, a comparison.

    The student has 3% of the teacher's multiply-accumulates and a hundred labelled images. It is trained in six ways, for the
    same number of epochs: on labels, with knowledge distillation (KD), and with the InDistill warm-up followed by KD; each from new
    weights and from weights that `compress` took from the teacher. The demo needs no network connection and takes about a minute
    on two cores.

    \b
    Example:
      indistill-fx demo -o runs/demo
    """
    from itertools import count
    from pathlib import Path

    from indistill_fx.cli.tables import count as short
    from indistill_fx.cli.tables import plain_table
    from indistill_fx.demo.run import run_demo

    out = Path(output) if output else next(path for n in count(1) if not (path := Path(f"runs/demo-{n}")).exists())
    rows = run_demo(out, seed=seed, say=click.echo)
    numbers = ("accuracy", "parameters", "MACs", "ONNX KiB", "ONNX differs", "ms a sample", "training")
    table = plain_table("model", *numbers, numbers=numbers)
    for row in rows:
        table.add_row(
            row.name,
            f"{100 * row.accuracy:.2f}%",
            short(row.parameters),
            short(row.macs),
            f"{row.export.size / 1024:.0f}",
            f"{row.export.max_abs:.0e}",
            f"{row.export.latency_ms:.3f}",
            f"{row.seconds:.0f} s",
        )
    screen = common.console()
    screen.print(table)
    screen.print(
        "ONNX differs: largest difference to the module at batch sizes 1, 7, 64. ms a sample: onnxruntime, batch 1, median.",
        style="dim",
    )
    screen.print(
        f"In {out}: student/student.py (the small network as source code), plan.json, student.onnx (warm-up + KD) and the other models'"
        " .onnx files, and a folder per training run with its checkpoints and metrics.jsonl.",
        soft_wrap=True,
    )
    steps = {
        "Next: look at the runs     ": f"report {out} -o report.html",
        "      compress your own    ": "compress your.pt --data imagefolder:DIR --macs 0.5 -o runs/half",
        "      distil your own pair ": "distill teacher.pt models.py:make_student --data imagefolder:DIR -o runs/first",
    }
    screen.print()
    for title, command_line in steps.items():
        screen.print(f"{title} indistill-fx {command_line}", soft_wrap=True, highlight=False)
