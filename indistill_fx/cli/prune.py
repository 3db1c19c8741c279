"""`indistill-fx prune`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common

if TYPE_CHECKING:
    from torch import nn

    from indistill_fx.traced import TracedModel


@click.command(name="prune")
@click.argument("model")
@click.option(
    "--width", "widths", multiple=True, metavar="LAYER=N", help="Channels of a layer; may be given several times."
)
@click.option("--ratio", type=float, help="Share of every layer's channels that stays.")
@click.option("--macs", type=float, help="Work that may stay: a share up to 1, or a number.")
@click.option("--params", type=float, help="Parameters that may stay: a share up to 1, or a number.")
@click.option(
    "--plan",
    "plan_file",
    metavar="FILE",
    help="Narrow the plan's layers instead; the result returns (features, output).",
)
@click.option("--criterion", default="l1", show_default=True, help="How channels are ranked.")
@click.option("--round-to", type=click.IntRange(min=1), help="Keep multiples of so many channels.")
@click.option("-o", "--output", required=True, metavar="FILE", help="The .pt2 file to write.")
@common.input_option
@common.trust_option
def command(
    model: str, output: str, input_size: str | None, trust: tuple[str, ...], plan_file: str | None, **wishes: Any
) -> None:
    """Remove channels from MODEL, consumers included: a smaller network of its own.

    \b
    Examples:
      indistill-fx prune torchvision:resnet18 --ratio 0.5 -o small.pt2
      indistill-fx prune teacher.pt --width layer1=32 --input 3x32x32 -o small.pt2
      indistill-fx prune teacher.pt --plan plan.json -o narrowed.pt2
    """
    from indistill_fx.saving import save_program

    source = common.open_model(model, trust)
    traced = common.trace_model(source, common.example_for((source,), input_size), "teacher")
    smaller = _narrowed(traced, plan_file) if plan_file else _shrunk(traced, **wishes)
    save_program(smaller, traced.example_inputs, output)
    common.console().print(f"Written to {output}.", soft_wrap=True)


def _narrowed(traced: TracedModel, plan_file: str) -> nn.Module:
    from indistill_fx.cli.tables import plain_table
    from indistill_fx.passes.instrument import instrument
    from indistill_fx.passes.narrow import narrow
    from indistill_fx.plan import AlignmentPlan

    plan = AlignmentPlan.load(plan_file)
    result = narrow(traced, plan)
    table = plain_table("layer", "channels kept", numbers=("channels kept",))
    for tap, kept in result.report.kept.items():
        table.add_row(tap, f"{len(kept)} of {traced.facts_of(tap).channels}")
    common.console().print(table)
    return instrument(result.value, [pair.teacher for pair in plan.pairs])


def _shrunk(traced: TracedModel, *, widths: tuple[str, ...], **wishes: Any) -> nn.Module:
    from rich.text import Text

    from indistill_fx.bench import measure
    from indistill_fx.cli.tables import count, plain_table
    from indistill_fx.passes.shrink import shrink

    result = shrink(traced, widths=_widths(widths), **wishes)
    table = plain_table("layer", "before", "after", numbers=("before", "after"))
    for layer, (before, after) in result.report.widths.items():
        table.add_row(Text(layer), str(before), str(after), style="" if after < before else "dim")
    graphs = {"before": traced.graph_module, "after": result.value.graph_module}
    calls = {name: partial(graph, *traced.example_inputs) for name, graph in graphs.items()}
    times = measure(calls)
    table.add_section()
    for name, values in (("parameters", result.report.parameters), ("MACs", result.report.macs)):
        table.add_row(name, count(values[0]), count(values[1]))
    table.add_row("ms, batch 1 (median)", f"{times['before'].median_ms:.2f}", f"{times['after'].median_ms:.2f}")
    out = common.console()
    out.print(table)
    for frozen in result.report.frozen:
        out.print(Text(f"Stayed whole: {frozen.channels} channels, {frozen.reason}"))
    return result.value.graph_module


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
