"""What several commands share: options, and loading and tracing of models."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from indistill_fx.data.dataset import Data
    from indistill_fx.deploy.parity import RealParity
    from indistill_fx.graph.view import View
    from indistill_fx.loading.load import Source
    from indistill_fx.losses.task import Task
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.traced import Role, TracedModel


Command = TypeVar("Command", bound=Callable[..., Any])


def count_option(
    *names: str, default: int | None = None, metavar: str | None = None, least: int = 1, help: str | None = None
) -> Callable[[Command], Command]:
    """An option that takes an integer of at least `least`; the help shows its default, if it has one."""
    return click.option(
        *names, default=default, show_default=default is not None, metavar=metavar, type=click.IntRange(min=least), help=help
    )  # fmt: skip


def choice_option(name: str, choices: Sequence[str], *, help: str) -> Callable[[Command], Command]:
    """An option that takes one of a few words; the first is the default, and is shown in the help."""
    return click.option(name, type=click.Choice(choices), default=choices[0], show_default=True, help=help)


input_option = click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="SHAPE",
    help="Shape of one input sample, such as 3x32x32. If the model has several inputs, repeat it with their names; for integers "
    "add their type and range: input_ids:int64[0..30521]x128. [default: taken from the data or the model]",
)
trust_option = click.option(
    "--trust",
    multiple=True,
    metavar="PACKAGE",
    help="Let model files use classes of this package; repeatable. Only for files that you trust, because loading them can then run code.",
)
data_option = click.option(
    "--data", required=True, metavar="DATA", help="digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders."
)


class _Entry(click.ParamType[str | int]):
    """A key of a dict, or an index of a tuple."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        return int(value) if isinstance(value, str) and value.isdigit() else value


logits_option = click.option(
    "--logits",
    metavar="KEY",
    type=_Entry(),
    help="Where the class scores are if the model returns several outputs: a key of its dict, or an index (from 0) into its tuple. "
    "[default: the output called logits or out]",
)
task_option = click.option(
    "--task",
    metavar="TASK",
    help="What the labels mean: classification, multilabel, regression, segmentation, language, embedding or file.py:task."
    " [default: inferred from the labels of the first batch]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
limit_option = count_option("--limit", help="Use only this many samples of each split.")
cache_option = click.option("--cache", metavar="DIR", help="Cache decoded small images in this folder.")
round_option = count_option("--round-to", help="Keep a multiple of this many channels.")
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="cpu, cuda, cuda:1 or mps; auto: an accelerator if there is one.",
)


criterion_option = click.option(
    "--criterion",
    default="l1",
    show_default=True,
    help="How channels are ranked: l1, l2, bn_scale, geometric_median, isomorphic, random; activation, taylor, fisher look at DATA.",
)


def console() -> Console:
    """The terminal, 100 columns wide where there is none."""
    from indistill_fx.system.terminal import SafeConsole

    return SafeConsole(width=None if sys.stdout.isatty() else 100)


def say(text: str) -> None:
    """Print a line on standard error. Control characters are removed, because names may come from other people's files."""
    from indistill_fx.system.terminal import one_line, tell

    tell(one_line(text))


def say_json(value: Any) -> None:
    """An answer as JSON on standard output."""
    from indistill_fx.system.files import json_text
    from indistill_fx.system.terminal import printable

    click.echo(printable(json_text(value, indent=2, default=str)))


def open_model(spec: str, trust: tuple[str, ...], *, seed: int = 0) -> Source:
    """Load a spec, and print what was trusted or changed. The seed decides what a factory draws at random."""
    from indistill_fx.runs.load import open_source
    from indistill_fx.system.random_state import own_randomness

    with own_randomness(seed):
        source = open_source(spec, trust=trust)
    for note in source.notes:
        say(f"{spec}: {note}")
    return source


def example_for(sources: tuple[Source, ...], asked: Sequence[str] = (), data: Data | None = None) -> Any:
    """Example inputs for some models: as requested, or like the data's first sample, or of the shape that the models state.

    Without data, real numbers have the dtype of the first model's weights, unless the request names another.

    Returns:
        A tensor, or several: in order, or by name where the data have names.

    Raises:
        ConfigError: the shape is unknown.
    """
    import torch

    from indistill_fx.graph.module_state import real_dtype
    from indistill_fx.loading.inputs import example_inputs, within_tables

    real = (real_dtype(sources[0].module) if sources else None) or torch.float32
    if asked:
        return example_inputs(asked, str(real).removeprefix("torch."))
    if data is not None:
        return _example_of_data(sources, data)
    stating = next((source for source in sources if source.example_inputs is not None), None)
    known = None if stating is None else within_tables(stating.example_inputs, stating.module)
    if stating is not None and known is not stating.example_inputs:
        advice = "; --data gives real ones" if _takes_data() else ""
        say(f"{stating.spec}: not every table has the whole numbers of the stated inputs, so zeros are used{advice}.")
    if known is None:
        known = next((dummy for source in sources if (dummy := _dummy_inputs(source.module))), None)
    if known is not None:
        return known
    size = next((source.input_size for source in sources if source.input_size is not None), None)
    if size is None:
        raise ConfigError(
            f"The input shape of {' and '.join(source.spec for source in sources)} is not known.",
            where="--input",
            hint=f"Give the shape (--input 3x224x224){' or the data (--data DATA)' if _takes_data() else ''}.",
        )
    return _random(size).to(real)


def _takes_data() -> bool:
    """Whether the command that is running has --data."""
    context = click.get_current_context(silent=True)
    return context is not None and any(parameter.name == "data" for parameter in context.command.params)


def _dummy_inputs(module: nn.Module) -> Any:
    """The dummy inputs, by name, of a model from Hugging Face's transformers; None for other models."""
    found = getattr(module, "dummy_inputs", None)
    if not isinstance(found, dict) or getattr(module, "main_input_name", None) not in found:
        return None
    shown = ", ".join(f"{name} {'x'.join(map(str, value.shape[1:]))}" for name, value in found.items())
    say(f"Input sizes are the defaults of {type(module).__name__}: {shown}. For other sizes give --input or --data.")
    return found


def _example_of_data(sources: tuple[Source, ...], data: Data) -> Any:
    """Random numbers of an image's size; if a batch is not a single tensor of real numbers, its first samples."""
    from torch import Tensor

    from indistill_fx.batch import split
    from indistill_fx.system.model_inputs import Inputs
    from indistill_fx.system.nested import samples_of

    if data.normalisation is not None:
        return _random(data.input_size)
    batch = samples_of(next(iter(data.test)), slice(2))
    takes = [taken for taken in (Inputs.of(source.module) for source in sources) if not taken.by_number]
    calls = split(batch, *takes, where="The model").calls
    if any(call.kwargs for call in calls):
        named = [
            {**dict(zip(taken.names, call.args, strict=False)), **call.kwargs}
            for call, taken in zip(calls, takes, strict=True)
        ]
        return {name: value for entries in named for name, value in entries.items()}
    longest = max((call.args for call in calls), key=len)
    plain = len(longest) == 1 and isinstance(longest[0], Tensor) and longest[0].is_floating_point()
    return _random(tuple(longest[0].shape[1:])) if plain else longest


def _random(size: tuple[int, ...]) -> Any:
    import torch

    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def trace_model(
    source: Source, example: Any, role: Role, *, logits: str | int | None = None, view: View | None = None
) -> TracedModel:
    """Trace a loaded model, and print which method traced it if it was not the first one.

    Args:
        source: the model.
        example: inputs as the student takes them.
        role: see `trace`.
        logits: see `trace`; None: what the model's run remembers.
        view: what a teacher sees of them.
    """
    from indistill_fx.passes.capture.trace import as_traced

    traced = as_traced(source.module, example, role=role, logits=logits_of(logits, source), view=view)
    if traced.report.method != "symbolic":
        say(f"{source.spec}: traced by `{traced.report.method}`")
    for line in (*traced.report.specialisations, *traced.report.notes):
        say(f"{source.spec}: {line}")
    if traced.report.leaves:
        say(f"{source.spec}: kept as one node: {', '.join(traced.report.leaves)}")
    return traced


def logits_of(asked: str | int | None, source: Source) -> str | int | None:
    """Which output holds the logits: as asked, else as the model's run remembers."""
    return source.logits if asked is None else asked


def first_batches(loader: Any, samples: int) -> list[Any]:
    """The first batches with this many samples in total; the last batch is shortened if possible."""
    from indistill_fx.system.nested import samples_of, tensors_of

    found, left = [], samples
    for batch in loader:
        found.append(samples_of(batch, slice(left)))
        left -= len(tensors_of(batch)[0])
        if left <= 0:
            break
    return found


def first_inputs(loader: Any, samples: int, module: nn.Module) -> Any:
    """The inputs of the first samples as a model takes them: one tensor, several in order, or by name."""
    from torch import Tensor

    from indistill_fx.batch import split
    from indistill_fx.system.model_inputs import Inputs
    from indistill_fx.system.nested import joined

    taken = Inputs.of(module)
    calls = [split(batch, taken, where=taken.owner).calls[0] for batch in first_batches(loader, samples)]
    if calls[0].kwargs:
        return joined([call.kwargs for call in calls])
    inputs = joined([call.args for call in calls])
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], Tensor) else inputs


def deployment_facts(spec: str, source: Source, data: Data | None, task: Any = None) -> dict[str, str]:
    """The metadata for a deployed file, from all that is known of the model; `task`: as plain values."""
    from indistill_fx.deploy.metadata import of_source
    from indistill_fx.runs.load import is_run, run_fingerprint

    return of_source(
        model=spec,
        run=run_fingerprint(spec) if is_run(spec) else "",
        classes=(data.classes if data else ()) or source.classes,
        normalisation=(data.normalisation if data else None) or source.normalisation,
        task=task,
    )


def task_of_data(options: dict[str, Any], source: Source, data: Data | None) -> Task | None:
    """The task as named (--task), as the model was trained, or as the first test batch shows; None if unknown."""
    from indistill_fx.evaluation.compared_task import task_shown

    if data is None:
        return None
    logits = logits_of(options["logits"], source)
    task, origin = task_shown(source, next(iter(data.test)), options["task"], logits)
    if task is not None:
        say(f"Task: {task.name}, {origin}.")
    return task


_ALIKE = {
    "segmentation": "the pixels of {} samples get the same class",
    "multilabel": "the labels of {} samples are the same",
    "language": "the positions of {} samples get the same word",
}


def agreement(real: RealParity, task: Task | None) -> str:
    """How far two models decide alike, in words that fit the task."""
    fitting = _ALIKE.get(task.name) if task is not None else None
    alike = "{} samples get the same class" if real.per_class else "the decisions on {} samples are the same"
    return f"{100 * (real.agreement or 0.0):.2f}% of {(fitting or alike).format(real.rows)}"


def shares_of(first: str, options: dict[str, Any]) -> dict[str, float]:
    """Every teacher's spec with its weight, in order; weights are read only if there are several teachers."""
    if not options["more_teachers"]:
        return {first: 1.0}
    found: dict[str, float] = {}
    for text in (first, *options["more_teachers"]):
        spec, equals, number = text.rpartition("=")
        # `?` without `=` after it: the `=` belongs to a constructor's argument
        named = "?" in spec and "=" not in re.split("[?&]", spec)[-1]
        try:
            weight = float(number) if equals and not named else None
        except ValueError:
            weight = None
        spec, weight = (text, 1.0) if weight is None else (spec, weight)
        if spec in found:
            raise ConfigError(
                f"The teacher {spec!r} is given twice.", where="--teacher", hint="Give it a weight: SPEC=2."
            )
        found[spec] = weight
    return found


def together(
    teachers: Sequence[Source],
    shares: dict[str, float],
    example: Any,
    views: Sequence[View | None],
    options: dict[str, Any],
    logits: Sequence[str | int | None],
) -> nn.Module:
    """The teachers as one module; an ensemble includes its members' views."""
    from indistill_fx.passes.ensemble import ensemble

    if len(teachers) == 1:
        return teachers[0].module
    if options["assistant"] == "auto":
        raise ConfigError(
            "--assistant auto shrinks the teacher, but several teachers are given.",
            where="--assistant",
            hint="Name the assistant: --assistant SPEC.",
        )
    modules, weights = [teacher.module for teacher in teachers], list(shares.values())
    made = ensemble(modules, weights, example_inputs=example, logits=logits, views=views)
    for number, (spec, share) in enumerate(zip(shares, made.meta["teachers"]["weights"], strict=True)):
        say(f"teachers.{number}: {spec}, its logits have the weight {share:.4g}")
    return made


def plan_beside(student: Source, teacher: nn.Module, example: Any) -> AlignmentPlan | None:
    """The plan beside a student's source code, written by `prune` or `compress`, if it is for this teacher and still fits."""
    from pathlib import Path

    from indistill_fx.loading.spec import parse_spec
    from indistill_fx.passes.capture.trace import as_traced
    from indistill_fx.plan import AlignmentPlan
    from indistill_fx.runs.load import made_by

    place = Path(parse_spec(made_by(student.spec)).place)
    file = place.with_name("plan.json")
    if place.name != "student.py" or not file.exists():
        return None
    plan = AlignmentPlan.load(file)
    traced = as_traced(teacher, example, role="teacher")
    if plan.teacher.fingerprint != traced.fingerprint:
        return None
    try:
        plan.check(traced, as_traced(student.module, example, role="student"))
    except ConfigError:
        say(f"{place} was changed since it was made, so {file} no longer fits it: its layers are paired anew.")
        return None
    say(
        f"{place} was made from this teacher: {file} says which channels it kept. `--recipe compress` is meant for such students."
    )
    return plan
