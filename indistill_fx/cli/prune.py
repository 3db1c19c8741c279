"""`indistill-fx prune`."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, pictures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from indistill_fx.passes.pruning.shrink import ShrinkReport
    from indistill_fx.traced import TracedModel


@click.command(name="prune")
@click.argument("model")
@click.option(
    "--width", "widths", multiple=True, metavar="LAYER=N", help="Number of channels to keep in a layer; repeatable."
)
@click.option("--ratio", type=float, help="Share of every layer's channels to keep.")
@click.option(
    "--macs", type=float, help="Budget of multiply-accumulates. Up to 1: a share of the model's; above 1: a number."
)
@click.option("--params", type=float, help="Budget of parameters. Up to 1: a share of the model's; above 1: a number.")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    help="Instead, narrow the layers that this plan pairs to the plan's widths; the result returns (features, output).",
)
@common.criterion_option
@click.option(
    "--data",
    metavar="DATA",
    help="Data for these criteria: digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders.",
)
@common.count_option("--batches", default=32, help="Number of batches of DATA to use.")
@common.round_option
@click.option("--layers", is_flag=True, help="Show every layer, not only the stages.")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR/|FILE",
    help="A directory, for the network as source code (student.py and student.safetensors); or a .pt2 file.",
)
@pictures.picture_options
@common.input_option
@common.logits_option
@common.trust_option
def command(
    model: str,
    output: str,
    inputs: tuple[str, ...],
    logits: str | int | None,
    trust: tuple[str, ...],
    plan_file: str | None,
    data: str | None,
    batches: int,
    criterion: str,
    layers: bool,
    **requests: Any,
) -> None:
    """Remove channels from MODEL, and from the layers that read them. The result is an independent, smaller network.

    \b
    Examples:
      indistill-fx prune torchvision:resnet18 --ratio 0.5 -o small/
      indistill-fx prune torchvision:resnet18 --ratio 0.5 -o small.pt2
      indistill-fx prune teacher.pt --width layer1=32 --input 3x32x32 -o small.pt2
      indistill-fx prune teacher.pt --plan plan.json -o narrowed.pt2
    """
    from itertools import islice
    from pathlib import Path

    from indistill_fx.compression.basis import in_both_modes, train_as
    from indistill_fx.compression.write_source import check_own
    from indistill_fx.errors import ConfigError
    from indistill_fx.runs.directory import COMPRESSION
    from indistill_fx.runs.model_facts import facts_of
    from indistill_fx.system.files import try_file, try_folder

    asked = {name: requests.pop(name) for name in pictures.NAMES}

    if plan_file and (
        others := [f"--{name.replace('_', '-').rstrip('s')}" for name, request in requests.items() if request]
    ):
        raise ConfigError(
            f"--plan names the layers and their widths; {', '.join(others)} would name them a second time.",
            where="--plan",
            hint="Give one of them.",
        )
    try_folder(Path(output)) if _is_directory(output) else try_file(Path(output))
    if held := [name for name in (COMPRESSION, "run.json") if os.path.exists(os.path.join(output, name))]:
        raise ConfigError(
            f"{output} holds a run ({held[0]}), whose student would be overwritten.",
            where="-o",
            got=output,
            hint="Give another directory.",
        )
    if _is_directory(output):
        check_own(Path(output))
    source = common.open_model(model, trust)
    opened = pictures.open_pictures(data, asked, source) if data else None
    traced = common.trace_model(source, common.example_for((source,), inputs, opened), "teacher", logits=logits)
    loader = islice(opened.train_plain, batches) if opened else None
    ranking: dict[str, Any] = {"criterion": criterion, "loader": loader}
    if plan_file:
        _save(_narrowed(traced, plan_file, ranking), output)
    else:
        show = partial(common.console().print, soft_wrap=True)
        basis = in_both_modes(traced, traced.chosen, show) if _is_directory(output) else traced
        smaller, report = _shrunk(basis, layers, **requests, **ranking)
        train_as(basis, smaller)
        read: dict[str, Any] = {"logits": common.logits_of(logits, source), "task": source.task}
        read |= {"example": traced.example, "wanted_size": source.wanted_size}
        _save(smaller, output, traced, report, facts_of(source.classes, source.wanted_normalisation, **read))


def _is_directory(output: str) -> bool:
    return output.endswith(("/", os.sep)) or os.path.isdir(output)


def _save(
    smaller: TracedModel,
    output: str,
    original: TracedModel | None = None,
    report: ShrinkReport | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Save the network as source code in a directory if possible, or as a program; with a plan of the channels that it has."""
    from pathlib import Path

    from indistill_fx.compression.correspond import plan_if_any
    from indistill_fx.compression.write_source import source_of
    from indistill_fx.deploy.save_pt2 import save_program
    from indistill_fx.errors import ExportError
    from indistill_fx.passes.capture.trace import trace
    from indistill_fx.runs.directory import PLAN
    from indistill_fx.runs.model_facts import FACTS
    from indistill_fx.system.files import json_text

    out, target = common.console(), Path(output)
    if _is_directory(output):
        try:
            source = source_of(smaller)
        except ExportError as error:
            out.print(f"No source code: {error} The result is an exported program instead.", soft_wrap=True)
            target.mkdir(parents=True, exist_ok=True)
            target = target / "student.pt2"
        else:
            plan = None
            if original is not None and report is not None:
                student = trace(source.build(), original.example, role="student", logits=original.chosen)
                plan = plan_if_any(original, student, report.axes)
            known = json_text(facts, indent=2) + "\n" if facts else ""
            pairs = plan.model_dump_json(indent=2) + "\n" if plan is not None else ""
            spec = source.save(target, {PLAN: pairs, FACTS: known})
            out.print(f"Written to {target}. Load it as {spec}", soft_wrap=True, highlight=False)
            return
    save_program(smaller.graph_module, smaller.example_values, target)
    out.print(f"Written to {target}.", soft_wrap=True)


def _narrowed(traced: TracedModel, plan_file: str, ranking: dict[str, Any]) -> TracedModel:
    from rich.text import Text

    from indistill_fx.cli.tables import count, plain_table
    from indistill_fx.passes.extract.instrument import instrument
    from indistill_fx.passes.pruning.narrow import narrow
    from indistill_fx.plan import AlignmentPlan

    plan = AlignmentPlan.load(plan_file)
    result = narrow(traced, plan, **ranking)
    titles = ("channels kept", "MACs less", "parameters less")
    table = plain_table("layer", *titles, "selected at", numbers=titles)
    for tap in result.report.taps:
        less = (count(tap.macs_removed), count(tap.parameters_removed))
        places = ", ".join(dict.fromkeys(stop.node for stop in tap.stopped)) or "weights only"
        table.add_row(Text(tap.tap), f"{len(tap.kept)} of {tap.of}", *less, Text(places))
    common.console().print(table)
    graph = instrument(result.value, [pair.teacher for pair in plan.pairs])
    return result.value.with_graph(graph, facts=result.value.facts, aliases=result.value.aliases)


def _shrunk(
    traced: TracedModel, layers: bool, *, widths: tuple[str, ...], **requests: Any
) -> tuple[TracedModel, ShrinkReport]:
    from rich.text import Text

    from indistill_fx.cli.tables import count
    from indistill_fx.compression.allocate import Budget
    from indistill_fx.deploy.bench import measure
    from indistill_fx.graph.edit import batch_size
    from indistill_fx.passes.pruning.shrink import PruneError, shrink

    budgets = {name: requests[name] for name in ("macs", "params") if requests[name] is not None}
    if len(budgets) == 1 and not widths and requests["ratio"] is None:
        Budget(**budgets).require_less_than(traced)
    result = shrink(traced, widths=_widths(widths), **requests)
    if requests["ratio"] is not None and not widths and not result.report.axes:
        kept = "; ".join(f"{frozen.channels} channels, {frozen.reason}" for frozen in result.report.frozen[:3])
        raise PruneError(
            f"With a ratio of {requests['ratio']:g} the network would lose no channel.{kept and f' Not removable: {kept}.'}",
            where="--ratio",
            hint="Give a smaller ratio, or take another network.",
        )
    table = _layers(result.report) if layers else _stages(traced, result.value)
    graphs = {"before": traced.graph_module, "after": result.value.graph_module}
    calls = {name: partial(graph, *traced.example_values) for name, graph in graphs.items()}
    times = measure(calls)
    batch = batch_size(traced.example_values)
    table.add_section()
    for name, values in (("parameters", result.report.parameters), ("MACs", result.report.macs)):
        table.add_row(name, count(values[0]), count(values[1]))
    table.add_row(f"ms, batch {batch} (median)", f"{times['before'].median_ms:.2f}", f"{times['after'].median_ms:.2f}")
    out = common.console()
    out.print(table)
    for frozen in result.report.frozen:
        out.print(Text(f"Not removable: {frozen.channels} channels, {frozen.reason}"))
    if approximate := result.report.approximate:
        more = f", and {len(approximate) - 5} more" if len(approximate) > 5 else ""
        out.print(
            Text(
                f"Only approximate, because they are computed over the kept channels alone: {', '.join(approximate[:5])}{more}"
            )
        )
    return result.value, result.report


def _layers(report: ShrinkReport) -> Table:
    from rich.text import Text

    from indistill_fx.cli.tables import plain_table

    table = plain_table("layer", "before", "after", numbers=("before", "after"))
    for layer, (before, after) in report.widths.items():
        table.add_row(Text(layer), str(before), str(after), style="" if after < before else "dim")
    return table


def _stages(traced: TracedModel, smaller: TracedModel) -> Table:
    """Show the widths at the exits of the stages."""
    from rich.text import Text

    from indistill_fx.cli.tables import plain_table
    from indistill_fx.passes.structure.stages import stages

    table = plain_table("stage ends at", "before", "after", numbers=("before", "after"))
    for stage in stages(traced):
        tap = traced.tap_name(stage.exit.output)
        before, after = traced.facts_of(tap), smaller.facts_of(tap)
        if before.channel_axis is not None and after.channel_axis is not None:
            style = "" if after.channels < before.channels else "dim"
            table.add_row(Text(tap), str(before.channels), str(after.channels), style=style)
    return table


def _widths(options: tuple[str, ...]) -> dict[str, int] | None:
    from indistill_fx.errors import ConfigError

    found = {}
    for option in options:
        layer, _, width = option.rpartition("=")
        if not layer or not width.isdigit():
            raise ConfigError(
                f"--width {option!r} is not of the form LAYER=N.",
                where="--width",
                got=option,
                hint="Write --width layer1=32.",
            )
        found[layer] = int(width)
    return found or None
