"""`indistill-fx distill`."""

from __future__ import annotations

from typing import Any

import click

from indistill_fx.cli import common


@click.command(name="distill")
@click.argument("teacher")
@click.argument("student")
@common.data_option
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="RUN_DIR",
    help="Where plan, checkpoints, metrics and the trained student go.",
)
@click.option("--plan", "plan_file", metavar="FILE", help="Pairs from a file made by `align`. [default: align now]")
@click.option(
    "--main",
    "main_loss",
    default="kd",
    show_default=True,
    help="kd, dkd, dist, pkt, pkt_kl, at, sp, rkd, crd, fitnet, vid, labels or file.py:loss.",
)
@click.option("--warmup", metavar="3,4,5", help="Epochs of every warm-up stage. [default: 3, 4, 5, …]")
@click.option("--no-warmup", is_flag=True, help="Only the main loss.")
@click.option("--warmup-loss", default="mse", show_default=True, help="mse, cosine, at, pkt or file.py:loss.")
@click.option(
    "--compare",
    "comparing",
    is_flag=True,
    help="Also train the student on labels alone and by the main loss alone, for as many epochs in all.",
)
@common.training_options
def command(
    teacher: str,
    student: str,
    plan_file: str | None,
    main_loss: str,
    warmup: str | None,
    no_warmup: bool,
    warmup_loss: str,
    comparing: bool,
    **options: Any,
) -> None:
    """Distil TEACHER into STUDENT: the warm-up layer by layer, then the main loss.

    An interrupted run (Ctrl-C, a kill, a power cut) goes on with --resume. The trained student is RUN_DIR/student.safetensors; `evaluate`
    and `export` take RUN_DIR itself.

    \b
    Example:
      indistill-fx distill teacher.pt models.py:make_student --data imagefolder:cifar10 -o runs/first
    """
    from indistill_fx.compare import compare
    from indistill_fx.curriculum import Curriculum
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.runs import about, about_data
    from indistill_fx.train import distill

    sources = common.open_model(teacher, options["trust"]), common.open_model(student, options["trust"])
    job = common.open_job(options, with_indices=main_loss == "crd")
    lengths = [] if no_warmup else common.numbers(warmup, "--warmup") if warmup else None
    shared: dict[str, Any] = {
        "plan": AlignmentPlan.load(plan_file) if plan_file else None,
        "curriculum": Curriculum(lengths=lengths, loss=warmup_loss),
        "main": main_loss,
        "main_options": {"samples": job.samples} if main_loss == "crd" else None,
        "val_loader": job.data.test,
        "example_inputs": job.example,
        "run_dir": options["output"],
        "resume": options["resume"],
        "about": about(student, options["data"], job.data.input_size, teacher=teacher, **about_data(job.data)),
        **job.settings,
    }
    models = sources[0].module, sources[1].module
    if comparing:
        arms = compare(
            *models,
            job.data.train,
            epochs=options["epochs"],
            announce=lambda arm: click.echo(f"{arm}:", err=True),
            **shared,
        )
        common.tell_arms({name: arm.record for name, arm in arms.items()}, options["output"])
    else:
        common.tell_run(distill(*models, job.data.train, epochs=options["epochs"], **shared), options["output"])
