"""`indistill-fx train`."""

from __future__ import annotations

from typing import Any

import click

from indistill_fx.cli import common, training


@click.command(name="train", cls=training.Grouped, sections=training.SECTIONS)
@click.argument("model")
@common.data_option
@click.option(
    "-o", "--output", required=True, metavar="RUN_DIR", help="Directory for checkpoints, metrics and the trained model."
)
@training.training_options
def command(model: str, **options: Any) -> None:
    """Train MODEL on labels alone: a teacher, or the student's own baseline.

    \b
    Example:
      indistill-fx train torchvision:resnet18?num_classes=10 --data cifar10 -o runs/teacher
    """
    from indistill_fx.evaluation.accuracy import more_outputs_than_classes
    from indistill_fx.training.supervised import train

    settings = training.settings_of(options)  # impossible options are refused before anything is loaded
    source = common.open_model(model, options["trust"], seed=options["seed"])
    options["logits"] = common.logits_of(options["logits"], source)
    data = training.open_training_data(options, source)
    example = common.example_for((source,), (), data)
    if (warning := more_outputs_than_classes(source.module, example, data.classes, options["logits"])) is not None:
        common.say(warning)
    record = train(
        source.module,
        data.train,
        val_loader=data.test if data.labelled else None,
        logits=options["logits"],
        task=training.task_of(options, source),
        run_dir=options["output"],
        resume=options["resume"],
        allow_changed=options["allow_changed"],
        epochs=options["epochs"],
        about=training.kept_of(model, source.module, example, data, options),
        **settings,
    )
    training.print_run(record, options["output"])
