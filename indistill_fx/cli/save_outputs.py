"""`indistill-fx save-outputs`."""

from __future__ import annotations

from typing import Any

import click

from indistill_fx.cli import common, pictures


@click.command(name="save-outputs")
@click.argument("teacher")
@common.data_option
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="Folder to write; use it as a teacher for `distill` with saved:DIR.",
)
@click.option(
    "--tap",
    "taps",
    multiple=True,
    metavar="LAYER",
    help="Save this layer's features too; repeatable. `inspect` lists the layers.",
)
@pictures.picture_options
@pictures.teacher_options
@pictures.reading_options
@common.logits_option
@common.trust_option
def command(teacher: str, data: str, output: str, taps: tuple[str, ...], **options: Any) -> None:
    """Run TEACHER once over the training set of DATA, without augmentation, and save its logits.

    `distill saved:DIR STUDENT --no-augment` then distils from them without the teacher. It refuses data with another
    digest, or with another number of samples: give both commands the same data, size and normalisation.

    \b
    Examples:
      indistill-fx save-outputs teacher.onnx --data imagefolder:cifar10 -o outputs
      indistill-fx distill saved:outputs models.py:make_student --data imagefolder:cifar10 --no-augment --no-warmup -o runs/saved
    """
    from indistill_fx.runs.saved_outputs import FILE
    from indistill_fx.training.save_outputs import save_outputs

    source = common.open_model(teacher, options["trust"])
    opened = pictures.open_pictures(data, options, source, augment=False, progress=True, **pictures.reading(options))
    (view,) = pictures.teacher_views(options, (source,), opened)
    folder = save_outputs(
        source.module,
        opened.train,
        output,
        taps=taps,
        logits=common.logits_of(options["logits"], source),
        view=view,
        about=teacher,
        progress=True,
    )
    size = (folder / FILE).stat().st_size / (1 << 20)
    common.say(f"{len(taps) + 1} tensors of {opened.train.samples} samples, {size:.1f} MiB, are in {folder}.")
