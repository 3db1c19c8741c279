"""`indistill-fx align`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from indistill_fx.cli import common

if TYPE_CHECKING:
    from indistill_fx.passes.match import MatchReport
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.result import PassResult
    from indistill_fx.traced import TracedModel


@click.command(name="align")
@click.argument("teacher")
@click.argument("student")
@common.input_option
@common.trust_option
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the plan to this JSON file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of the table.")
@click.option(
    "--html", metavar="FILE", type=click.Path(dir_okay=False), help="Write a page to look at, in one HTML file."
)
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Write the picture as SVG.")
@click.option("--png", metavar="FILE", type=click.Path(dir_okay=False), help="Write the picture as PNG.")
@click.option("--mermaid", is_flag=True, help="Print the pairs as a Mermaid chart for Markdown, instead of the table.")
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
    html: str | None,
    svg: str | None,
    png: str | None,
    mermaid: bool,
    pairs: int | None,
    every_block: bool,
    taps: str,
    criterion: str,
    explain: int | None,
) -> None:
    """Pair the layers of TEACHER and STUDENT by the structure of their graphs.

    The plan (-o) is a file to read, edit and review; `distill --plan` takes it.

    \b
    Examples:
      indistill-fx align torchvision:resnet50 torchvision:resnet18
      indistill-fx align teacher.pt models.py:make_student --input 3x32x32 -o plan.json
      indistill-fx align timm:vit_large_patch16_224 timm:vit_tiny_patch16_224 --html plan.html
    """
    from indistill_fx.cli.tables import alignment_table
    from indistill_fx.passes.pipeline import align_traced
    from indistill_fx.printable import printable

    sources = common.open_model(teacher, trust), common.open_model(student, trust)
    example = common.example_for(sources, input_size)
    traced = common.trace_model(sources[0], example, "teacher"), common.trace_model(sources[1], example, "student")
    alignment = align_traced(*traced, criterion=criterion, pairs=pairs, every_block=every_block, taps=taps)
    if output:
        alignment.value.save(output)
    if html or svg or png:
        _draw(alignment, traced, (teacher, student), html=html, svg=svg, png=png)
    if as_json:
        click.echo(printable(alignment.value.model_dump_json(indent=2)))
        return
    if mermaid:
        from indistill_fx.report import alignment_mermaid, see

        click.echo(printable(alignment_mermaid(see(alignment.value, *traced, names=(teacher, student)))), nl=False)
        return
    out = common.console()
    out.print(alignment_table(alignment.value, alignment.report, explain=explain))
    if output:
        out.print(
            f"Plan written to {output}; `indistill-fx distill {teacher} {student} --plan {output} …` takes it.",
            soft_wrap=True,
        )


def _draw(
    alignment: PassResult[AlignmentPlan, MatchReport],
    traced: tuple[TracedModel, TracedModel],
    names: tuple[str, str],
    *,
    html: str | None,
    svg: str | None,
    png: str | None,
) -> None:
    """Write the page and the pictures that were asked for."""
    from indistill_fx.report import alignment_page, alignment_svg, see, to_png, write

    if html:
        write(html, alignment_page(alignment.value, *traced, alignment.report, names=names))
    if svg or png:
        picture = alignment_svg(see(alignment.value, *traced, alignment.report, names=names))
        if svg:
            write(svg, picture)
        if png:
            write(png, to_png(picture))
