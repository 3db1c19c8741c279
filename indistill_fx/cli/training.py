"""What `distill` and `train` share: their options, and the summary at a run's end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli.common import Command, console, device_option, example_for, logits_option, trust_option
from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from indistill_fx.data.dataset import Data
    from indistill_fx.runs.record import RunRecord


class Grouped(click.Command):
    """A command whose help shows its options in sections.

    Args:
        sections: title -> parameter names; the others come last, under `Other`.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sections = dict(sections)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list of options per section."""
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        titles = {name: title for title, names in self.sections.items() for name in names}
        for title in (*self.sections, "Other"):
            shown = [option for option in options if titles.get(option.name or "", "Other") == title]
            records = [record for option in shown if (record := option.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


class Numbers(click.ParamType[list[float]]):
    """Numbers such as 3,4,5.

    Args:
        kind: int or float.
    """

    name = "numbers"

    def __init__(self, kind: Callable[[str], float] = int):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list; a list (of a recipe) as it is."""
        if not isinstance(value, str):
            return value
        where = param.opts[0] if param is not None else "a list"
        try:
            return [self.kind(part) for part in value.split(",")] if value else []
        except ValueError:
            what = "whole numbers" if self.kind is int else "numbers"
            example = "3,4,5" if self.kind is int else "0.001,0.0005"
            raise ConfigError(
                f"{where} {value!r} is no list of {what}.", where=where, got=value, hint=f"Write them as {example}."
            ) from None


class Names(click.ParamType[list[str]]):
    """Names such as a,b."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The list."""
        return value.split(",") if isinstance(value, str) else value


_TRAINING: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--epochs", default=20, show_default=True, type=click.IntRange(min=0), help="Epochs of the main stage."
    ),
    click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1)),
    click.option(
        "--lr", "learning_rate", default=1e-3, show_default=True, type=float, help="Learning rate of the main stage."
    ),
    click.option(
        "--optimizer",
        default="adam",
        show_default=True,
        type=click.Choice(["adam", "adamw", "sgd"]),
        help="Of the main stage.",
    ),
    click.option("--momentum", default=0.9, show_default=True, type=float, help="Of sgd."),
    click.option("--weight-decay", default=0.0, show_default=True, type=float, help="Of the main stage."),
    click.option(
        "--schedule",
        default="constant",
        show_default=True,
        type=click.Choice(["constant", "step", "cosine"]),
        help="Of the main stage's learning rate, epoch by epoch.",
    ),
    click.option(
        "--milestones",
        metavar="15,18",
        type=Numbers(),
        default=(),
        help="Main epochs after which `step` multiplies the rate by gamma.",
    ),
    click.option("--gamma", default=0.1, show_default=True, type=float, help="Factor of `step`."),
    click.option("--clip-norm", type=float, help="Scale gradients down to this norm."),
    click.option(
        "--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Batches per optimiser step."
    ),
    click.option(
        "--mixed-precision",
        type=click.Choice(["no", "bf16", "fp16"]),
        help="[default: what `accelerate launch` says, else no]",
    ),
    click.option("--compile", "compile", is_flag=True, help="torch.compile every stage."),
    device_option,
    click.option(
        "--sync-batch-norm/--no-sync-batch-norm",
        default=True,
        show_default=True,
        help="With several processes: batch-norm statistics over the whole batch.",
    ),
    click.option(
        "--shard",
        is_flag=True,
        help="With several processes: spread teacher, student and optimiser over them (FSDP), to save memory.",
    ),
    click.option(
        "--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Processes that read large images."
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Use only so many samples of each split."),
    click.option("--no-augment", is_flag=True, help="Leave training images as they are."),
    click.option("--cache", metavar="DIR", help="Keep decoded small images here for the next time."),
    logits_option,
    click.option(
        "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of fresh weights, batches and noise."
    ),
    click.option(
        "--checkpoint-every",
        "checkpoint_every_steps",
        metavar="STEPS",
        type=click.IntRange(min=1),
        help="Checkpoints within epochs too. [default: after an epoch]",
    ),
    click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too."),
    click.option("--resume", is_flag=True, help="Go on with the run in RUN_DIR, or begin if there is none."),
    trust_option,
)

SECTIONS: dict[str, tuple[str, ...]] = {
    "Data and models": ("data", "batch_size", "workers", "limit", "cache", "logits", "trust"),
    "Training": (
        "epochs", "learning_rate", "optimizer", "momentum", "weight_decay", "schedule", "milestones", "gamma", "clip_norm",
        "accumulate", "mixed_precision", "compile", "device", "sync_batch_norm", "shard", "seed",
    ),
    "The run": ("output", "resume", "checkpoint_every_steps", "tensorboard"),
}  # fmt: skip


def training_options(command: Command) -> Command:
    """The options that `distill` and `train` share."""
    for option in reversed(_TRAINING):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Job:
    """Data, example inputs and settings of a training command."""

    data: Data
    example: Any
    settings: dict[str, Any]

    @property
    def samples(self) -> int:
        """How many training samples there are."""
        return sum(len(labels) for _, labels, *_ in self.data.train_plain)


_SETTINGS = (
    "learning_rate optimizer momentum weight_decay schedule milestones gamma clip_norm accumulate mixed_precision compile "
    "device sync_batch_norm shard seed checkpoint_every_steps tensorboard"
).split()


def open_job(options: dict[str, Any], *, with_indices: bool = False) -> Job:
    """Open the data of a training command and gather its settings."""
    from indistill_fx.data.open import open_data

    named = {name: options[name] for name in ("batch_size", "workers", "seed", "limit", "cache")}
    data = open_data(
        options["data"], **named, augment=not options["no_augment"], with_indices=with_indices, progress=True
    )
    settings = {name: options[name] for name in _SETTINGS}
    return Job(data, example_for((), None, data.input_size), settings)


def tell_run(record: RunRecord, run_dir: str) -> None:
    """The summary at a run's end."""
    from indistill_fx.cli.tables import plain_table

    table = plain_table(
        "stage",
        "epochs",
        "steps",
        "first loss",
        "last loss",
        "seconds",
        numbers=("epochs", "steps", "first loss", "last loss", "seconds"),
    )
    for stage in record.stages:
        losses = [f"{stage.losses[0]:.4g}", f"{stage.losses[-1]:.4g}"] if stage.losses else ["", ""]
        table.add_row(stage.name, str(stage.epochs), str(stage.steps), *losses, f"{stage.seconds:.0f}")
    out = console()
    out.print(table)
    for stage in record.stages:
        for note in stage.notes:
            out.print(f"{stage.name}: {note}")
    if record.accuracy is not None:
        teacher = f", teacher {100 * record.teacher_accuracy:.2f}%" if record.teacher_accuracy is not None else ""
        best = (
            f" (best {100 * record.best_accuracy:.2f}% after epoch {record.best_epoch})"
            if record.best_accuracy is not None
            else ""
        )
        out.print(f"Test accuracy {100 * record.accuracy:.2f}%{best}{teacher}.")
    out.print(f"All of it is in {run_dir}; try `indistill-fx export {run_dir} -o student.onnx`.", soft_wrap=True)


def tell_arms(records: dict[str, RunRecord], run_dir: str) -> None:
    """The table at a comparison's end."""
    from indistill_fx.cli.tables import plain_table

    numbers = ("accuracy", "best", "last loss", "epochs", "seconds")
    table = plain_table("trained by", *numbers, numbers=numbers)
    for name, record in records.items():
        accuracy, best = (
            f"{100 * value:.2f}%" if value is not None else "" for value in (record.accuracy, record.best_accuracy)
        )
        table.add_row(
            name, accuracy, best, f"{record.epochs[-1].loss:.4g}", str(len(record.epochs)), f"{record.seconds:.0f}"
        )
    out = console()
    teacher = next(iter(records.values())).teacher_accuracy
    out.print(table, f"Teacher: {100 * teacher:.2f}%" if teacher is not None else "")
    out.print(
        f"A run directory for each is in {run_dir}; try `indistill-fx export {run_dir}/indistill -o student.onnx`.",
        soft_wrap=True,
    )
