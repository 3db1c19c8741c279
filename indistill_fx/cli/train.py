"""`indistill-fx train`."""

from __future__ import annotations

from typing import Any

import click

from indistill_fx.cli import common


@click.command(name="train")
@click.argument("model")
@common.data_option
@click.option(
    "-o", "--output", required=True, metavar="RUN_DIR", help="Where checkpoints, metrics and the trained model go."
)
@common.training_options
def command(model: str, **options: Any) -> None:
    """Train MODEL on labels alone: a teacher, or the student's own baseline.

    \b
    Example:
      indistill-fx train torchvision:resnet18?num_classes=10 --data cifar10 -o runs/teacher
    """
    from indistill_fx.runs import about, about_data
    from indistill_fx.train import train

    source = common.open_model(model, options["trust"])
    job = common.open_job(options)
    record = train(
        source.module,
        job.data.train,
        val_loader=job.data.test,
        run_dir=options["output"],
        resume=options["resume"],
        epochs=options["epochs"],
        about=about(model, options["data"], job.data.input_size, **about_data(job.data)),
        **job.settings,
    )
    common.tell_run(record, options["output"])
