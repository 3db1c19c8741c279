"""What several commands share: options, and the way from a spec to a traced model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from indistill_fx.data import Data
    from indistill_fx.record import RunRecord
    from indistill_fx.sources import Source
    from indistill_fx.traced import Role, TracedModel

Command = TypeVar("Command", bound=Callable[..., Any])

input_option = click.option(
    "--input",
    "input_size",
    metavar="CxHxW",
    help="Shape of one input sample, such as 3x32x32. [default: what the model or the data says]",
)
trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="Let model files name classes of this package. Only for files you trust: it can run code.",
)
data_option = click.option(
    "--data", required=True, metavar="DATA", help="digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders."
)


_TRAINING: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--epochs", default=20, show_default=True, type=click.IntRange(min=0), help="Epochs of the main stage."
    ),
    click.option("--batch-size", default=128, show_default=True, type=click.IntRange(min=1)),
    click.option(
        "--lr", "learning_rate", default=1e-3, show_default=True, type=float, help="Learning rate of the main stage."
    ),
    click.option("--optimizer", default="adam", show_default=True, type=click.Choice(["adam", "adamw", "sgd"])),
    click.option("--weight-decay", default=0.0, show_default=True, type=float),
    click.option(
        "--schedule",
        default="constant",
        show_default=True,
        type=click.Choice(["constant", "step", "cosine"]),
        help="Of the learning rate.",
    ),
    click.option("--milestones", metavar="15,18", help="Epochs after which `step` divides the rate by ten."),
    click.option("--clip-norm", type=float, help="Scale gradients down to this norm."),
    click.option(
        "--accumulate", default=1, show_default=True, type=click.IntRange(min=1), help="Batches per optimiser step."
    ),
    click.option("--mixed-precision", type=click.Choice(["bf16", "fp16"])),
    click.option("--compile", "compile", is_flag=True, help="torch.compile every stage."),
    click.option(
        "--workers", default=0, show_default=True, type=click.IntRange(min=0), help="Processes that read images."
    ),
    click.option("--limit", type=click.IntRange(min=1), help="Use only so many samples of each split."),
    click.option("--cache", metavar="DIR", help="Keep decoded small images here for the next time."),
    click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0)),
    click.option("--tensorboard", is_flag=True, help="Write metrics for TensorBoard too."),
    click.option("--resume", is_flag=True, help="Go on with the run in RUN_DIR."),
    trust_option,
)


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


_SETTINGS = "learning_rate optimizer weight_decay schedule clip_norm accumulate mixed_precision compile seed tensorboard".split()


def open_job(options: dict[str, Any], *, with_indices: bool = False) -> Job:
    """Open the data of a training command and gather its settings."""
    from indistill_fx.data import open_data

    named = {name: options[name] for name in ("batch_size", "workers", "seed", "limit", "cache")}
    data = open_data(options["data"], **named, with_indices=with_indices, progress=True)
    settings = {name: options[name] for name in _SETTINGS}
    settings["milestones"] = numbers(options["milestones"], "--milestones") if options["milestones"] else ()
    return Job(data, example_for((), None, data.input_size), settings)


def numbers(text: str, where: str) -> list[int]:
    """Whole numbers from an option such as 3,4,5.

    Raises:
        ConfigError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{where} {text!r} is no list of whole numbers.", where=where, got=text, hint="Write them as 3,4,5."
        ) from None


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


def console() -> Console:
    """The terminal, 100 columns wide where there is none."""
    from indistill_fx.terminal import SafeConsole

    return SafeConsole(width=None if sys.stdout.isatty() else 100)


def say(text: str) -> None:
    """A line on standard error. Names in it may come from a file of somebody else."""
    from indistill_fx.printable import printable

    click.echo(printable(text), err=True)


def open_model(spec: str, trust: tuple[str, ...]) -> Source:
    """Load a spec, and say aloud what was trusted or changed on the way."""
    from indistill_fx.runs import is_run, load_run
    from indistill_fx.sources import load_source

    source = load_run(spec, trust=trust) if is_run(spec) else load_source(spec, trust=trust)
    for note in source.notes:
        say(f"{spec}: {note}")
    return source


def example_for(sources: tuple[Source, ...], wanted: str | None, default: tuple[int, ...] | None = None) -> Any:
    """Example inputs: of the shape asked for, else of the shape that the data or the models know.

    Raises:
        ConfigError: nobody knows the shape.
    """
    import torch

    from indistill_fx.sources import parse_input

    if wanted is None and default is None:
        known = next((source.example_inputs for source in sources if source.example_inputs is not None), None)
        if known is not None:
            return known
    sizes = [source.input_size for source in sources if source.input_size is not None]
    size = parse_input(wanted) if wanted else default or (sizes[0] if sizes else None)
    if size is None:
        raise ConfigError(
            f"The input shape of {' and '.join(source.spec for source in sources)} is not known.",
            where="--input",
            hint="Give it: --input 3x224x224.",
        )
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def trace_model(source: Source, example: Any, role: Role) -> TracedModel:
    """Trace a loaded model, and say which rung it took when it was not the first."""
    from indistill_fx.passes.trace import trace

    traced = trace(source.module, example, role=role)
    if traced.report.rung != "symbolic":
        say(f"{source.spec}: traced by `{traced.report.rung}`")
    for line in (*traced.report.specialisations, *traced.report.notes):
        say(f"{source.spec}: {line}")
    if traced.report.leaves:
        say(f"{source.spec}: kept as one node: {', '.join(traced.report.leaves)}")
    return traced


def first_batches(loader: Any, samples: int) -> list[Any]:
    """Batches until there are so many samples; the last one is cut where it can be."""
    import torch

    found, left = [], samples
    for batch in loader:
        parts = [batch] if isinstance(batch, torch.Tensor) else list(batch)
        found.append([part[:left] if isinstance(part, torch.Tensor) else part for part in parts])
        left -= len(parts[0])
        if left <= 0:
            break
    return found


def first_inputs(loader: Any, samples: int) -> Any:
    """The inputs of the first so many samples, in one tensor."""
    import torch

    return torch.cat([batch[0] for batch in first_batches(loader, samples)])


def deployment_facts(spec: str, source: Source, data: Data | None) -> dict[str, str]:
    """What a deployed file should say of a model, by all that is known of it."""
    from indistill_fx.provenance import of_source
    from indistill_fx.runs import is_run, run_fingerprint

    return of_source(
        model=spec,
        run=run_fingerprint(spec) if is_run(spec) else "",
        classes=(data.classes if data else ()) or source.classes,
        normalisation=(data.normalisation if data else None) or source.normalisation,
    )


def class_name(classes: tuple[str, ...], label: int) -> str:
    """The class's name, or its number."""
    return classes[label] if label < len(classes) else str(label)
