"""`indistill-fx align`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, pictures

if TYPE_CHECKING:
    from indistill_fx.data.dataset import Data
    from indistill_fx.loading.load import Source
    from indistill_fx.passes.contract import PassResult
    from indistill_fx.passes.pairing.match import MatchReport
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.traced import TracedModel


@click.command(name="align")
@click.argument("teacher")
@click.argument("student")
@common.input_option
@common.logits_option
@common.trust_option
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the plan to this JSON file."
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of the table.")
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False), help="Write the alignment as one HTML page.")
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Write the picture as SVG.")
@click.option("--png", metavar="FILE", type=click.Path(dir_okay=False), help="Write the picture as PNG.")
@click.option("--mermaid", is_flag=True, help="Print the pairs as a Mermaid chart for Markdown, instead of the table.")
@common.count_option("--pairs", help="Number of pairs. [default: one per common stage]")
@click.option(
    "--every-block",
    is_flag=True,
    help="Also pair the blocks inside the stages, evenly spaced (of 12 and 6 blocks, every second one of the 12).",
)
@common.choice_option(
    "--taps",
    ["block", "pre-activation", "last-conv"],
    help="Where a block's feature is read: at its output, before its last activation, or after its last convolution.",
)
@click.option(
    "--pair", "fixed", multiple=True, metavar="LAYER=LAYER", help="Keep this pair, teacher's layer first. Repeatable."
)
@click.option("--plan", metavar="FILE", help="Use the pairs of this (edited) plan; shapes and channels are recomputed.")
@click.option(
    "--similarity",
    type=click.Choice(["cka"]),
    help="Also score how similar the layers' features are on --data (linear CKA).",
)
@click.option(
    "--data",
    metavar="DATA",
    help="Data the models will be trained on: digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders. Inputs take their"
    " shape from it, and --similarity and --criterion look at it.",
)
@pictures.picture_options
@pictures.teacher_options
@common.count_option("--batches", default=16, help="For --similarity and criteria: number of batches of 64 samples.")
@click.option(
    "--criterion",
    default="l1",
    show_default=True,
    help="How the teacher's channels are ranked: l1, l2, bn_scale, geometric_median, random; activation and taylor need --data.",
)
@click.option("--diff", metavar="FILE", help="Also list the differences from this earlier plan.")
@common.count_option(
    "--explain", metavar="PAIR", help="Show the runner-up candidates of pair number PAIR, and why they lost."
)
@click.option(
    "--passes",
    is_flag=True,
    help="Print, instead of the table, both graphs of every stage as text, and what each compiler pass changes in them.",
)
def command(teacher: str, student: str, inputs: tuple[str, ...], trust: tuple[str, ...], **options: Any) -> None:
    """Pair the layers of TEACHER and STUDENT by the structure of their graphs.

    The plan (-o) is a file to read, edit and review; `distill --plan` takes it. After editing, `align … --plan plan.json -o plan.json`
    checks the names and brings shapes and channels up to date.

    \b
    Examples:
      indistill-fx align torchvision:resnet50 torchvision:resnet18
      indistill-fx align teacher.pt models.py:make_student --input 3x32x32 -o plan.json
      indistill-fx align teacher.pt models.py:make_student --similarity cka --data imagefolder:DIR
      indistill-fx align timm:vit_large_patch16_224 timm:vit_tiny_patch16_224 --html plan.html
    """
    from pathlib import Path

    from indistill_fx.passes.align import align_traced
    from indistill_fx.passes.pairing.cka import cka
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.system.files import try_file

    for name in ("output", "html", "svg", "png"):
        if options[name]:
            try_file(Path(options[name]))
    earlier = AlignmentPlan.load(options["diff"]) if options["diff"] else None
    matching = {"fixed": _fixed(options["fixed"]), **{name: options[name] for name in ("pairs", "every_block", "taps")}}
    plan = AlignmentPlan.load(options["plan"]) if options["plan"] else None
    if plan:
        edited = [(pair.teacher, pair.student) for pair in plan.pairs]
        matching.update(fixed=[*edited, *matching["fixed"]], pairs=len(edited) + len(matching["fixed"]))
    sources = common.open_model(teacher, trust), common.open_model(student, trust)
    data = _data(options, sources)
    if options["similarity"] and data is not None:
        matching["similarity"] = cka(data.train_plain, batches=options["batches"])
    example = common.example_for(sources[::-1], inputs, data)
    (view,) = pictures.teacher_views(options, sources[:1], data, (plan.view,) if plan is not None else ())
    plan = plan.model_copy(update={"view": view}) if plan is not None else None
    traced = (
        common.trace_model(sources[0], example, "teacher", logits=options["logits"], view=view),
        common.trace_model(sources[1], example, "student", logits=options["logits"]),
    )
    for line in plan.drift(*traced) if plan else ():
        common.say(f"{options['plan']}: {line}")
    loader = data.train_plain if data is not None else None
    alignment = align_traced(*traced, criterion=options["criterion"], loader=loader, **matching)
    if options["output"]:
        alignment.value.save(options["output"])
    _show(alignment, traced, (teacher, student), earlier, options)


def _fixed(pairs: tuple[str, ...]) -> list[tuple[str, str]]:
    """The pairs given by `--pair layer2=layer3`."""
    from indistill_fx.errors import ConfigError

    found = []
    for text in pairs:
        teacher_layer, sign, student_layer = text.partition("=")
        if not (teacher_layer and sign and student_layer):
            raise ConfigError(
                f"--pair {text!r} is not a pair of layers.",
                where="--pair",
                got=text,
                hint="Write the teacher's layer and the student's: --pair layer2=layer3.",
            )
        found.append((teacher_layer, student_layer))
    return found


def _data(options: dict[str, Any], sources: tuple[Source, Source]) -> Data | None:
    """The data, limited to the samples that are looked at."""
    from indistill_fx.errors import ConfigError

    if options["data"] is None and options["similarity"] is not None:
        raise ConfigError(
            "--similarity needs --data: features are compared on data.",
            where="--similarity",
            hint="Write --similarity cka --data DATA.",
        )
    if options["data"] is None:
        return None
    limit = 64 * options["batches"]
    return pictures.open_pictures(
        options["data"], options, *reversed(sources), training=True, batch_size=64, limit=limit, progress=True
    )


def _show(
    alignment: PassResult[AlignmentPlan, MatchReport],
    traced: tuple[TracedModel, TracedModel],
    names: tuple[str, str],
    earlier: AlignmentPlan | None,
    options: dict[str, Any],
) -> None:
    """Write pictures, then print the plan in the requested form."""
    from indistill_fx.system.terminal import printable

    if options["html"] or options["svg"] or options["png"]:
        _draw(alignment, traced, names, html=options["html"], svg=options["svg"], png=options["png"])
    if options["as_json"]:
        click.echo(printable(alignment.value.model_dump_json(indent=2)))
        return
    if options["passes"]:
        _show_passes(traced, alignment.value)
        return
    if options["mermaid"]:
        from indistill_fx.report import alignment_mermaid, see

        click.echo(printable(alignment_mermaid(see(alignment.value, *traced, names=names))), nl=False)
        return
    from indistill_fx.cli.tables import alignment_table

    out = common.console()
    out.print(alignment_table(alignment.value, alignment.report, traced[0], explain=options["explain"]))
    if earlier is not None:
        lines = earlier.diff(alignment.value) or (f"Nothing changed since {options['diff']}.",)
        for line in lines:
            out.print(line, soft_wrap=True)
    if options["output"]:
        out.print(
            f"Plan written to {options['output']}; "
            f"`indistill-fx distill {' '.join(names)} --plan {options['output']} …` takes it.",
            soft_wrap=True,
        )


def _show_passes(traced: tuple[TracedModel, TracedModel], plan: AlignmentPlan) -> None:
    from indistill_fx.cli.tables import passes_lines
    from indistill_fx.stages.compile import compile_stages

    out = common.console()
    for stage in compile_stages(*traced, plan):
        for role, records in (("teacher", stage.report.teacher), ("student", stage.report.student)):
            for line in passes_lines(f"stage {stage.name}, {role}", records):
                out.print(line, soft_wrap=True)


def _draw(
    alignment: PassResult[AlignmentPlan, MatchReport],
    traced: tuple[TracedModel, TracedModel],
    names: tuple[str, str],
    *,
    html: str | None,
    svg: str | None,
    png: str | None,
) -> None:
    """Write the requested page and pictures."""
    from indistill_fx.report import alignment_page, alignment_svg, see, to_png, write

    if not (html or svg or png):
        return
    seen = see(alignment.value, *traced, alignment.report, names=names)
    if html:
        write(html, alignment_page(alignment.value, seen))
    if svg or png:
        picture = alignment_svg(seen)
        if svg:
            write(svg, picture)
        if png:
            write(png, to_png(picture))
