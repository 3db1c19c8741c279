"""`indistill-fx align`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="align")
@click.argument("teacher")
@click.argument("student")
@common.input_option
@common.trust_option
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the plan to this JSON file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of the table.")
@click.option("--pairs", type=click.IntRange(min=1), help="How many pairs. [default: one per common stage]")
@click.option("--every-block", is_flag=True, help="Pair the blocks within stages too (12 → 6 blocks pair uniformly).")
@click.option(
    "--taps",
    type=click.Choice(["block", "pre-activation", "last-conv"]),
    default="block",
    show_default=True,
    help="Where in a block the tap sits.",
)
@click.option("--criterion", default="l1", show_default=True, help="How the teacher's channels are ranked.")
@click.option(
    "--explain",
    type=click.IntRange(min=1),
    metavar="PAIR",
    help="Show the runner-up candidates of pair number PAIR, and why they lost.",
)
def command(
    teacher: str,
    student: str,
    input_size: str | None,
    trust: tuple[str, ...],
    output: str | None,
    as_json: bool,
    pairs: int | None,
    every_block: bool,
    taps: str,
    criterion: str,
    explain: int | None,
) -> None:
    r"""Pair the layers of TEACHER and STUDENT by the structure of their graphs.

    The plan (-o) is a file to read, edit and review; `distill --plan` takes it.

    \b
    Examples:
      indistill-fx align torchvision:resnet50 torchvision:resnet18
      indistill-fx align teacher.pt models.py:make_student --input 3x32x32 -o plan.json
    """
    from indistill_fx.cli.tables import alignment_table
    from indistill_fx.passes.pipeline import align_traced

    sources = common.open_model(teacher, trust), common.open_model(student, trust)
    example = common.example_for(sources, input_size)
    traced = common.trace_model(sources[0], example, "teacher"), common.trace_model(sources[1], example, "student")
    alignment = align_traced(*traced, criterion=criterion, pairs=pairs, every_block=every_block, taps=taps)
    if output:
        alignment.value.save(output)
    if as_json:
        click.echo(alignment.value.model_dump_json(indent=2))
        return
    out = common.console()
    out.print(alignment_table(alignment.value, alignment.report, explain=explain))
    if output:
        out.print(
            f"Plan written to {output}; `indistill-fx distill {teacher} {student} --plan {output} …` takes it.",
            soft_wrap=True,
        )
