"""`indistill-fx inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from indistill_fx.cli import common

if TYPE_CHECKING:
    from rich.console import Console

    from indistill_fx.traced import TracedModel


@click.command(name="inspect")
@click.argument("model")
@common.input_option
@common.logits_option
@common.trust_option
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Show all tensors, not only the main path, with every name that a plan file may use for them.",
)
@click.option(
    "--passes",
    is_flag=True,
    help="Print the graph as text, and what each compiler pass would change in it if MODEL were a teacher.",
)
@common.json_option
def command(
    model: str,
    inputs: tuple[str, ...],
    logits: str | int | None,
    trust: tuple[str, ...],
    everything: bool,
    passes: bool,
    as_json: bool,
) -> None:
    """Show MODEL's layers: the main path (what every path from input to output passes through), stages, widths, MACs.

    \b
    Examples:
      indistill-fx inspect torchvision:mobilenet_v2
      indistill-fx inspect torchvision:resnet18 --passes | less
    """
    from dataclasses import asdict

    from rich.text import Text

    from indistill_fx.cli.tables import count, main_path_table, plain_table, size
    from indistill_fx.passes.structure.stages import main_path

    source = common.open_model(model, trust)
    traced = common.trace_model(source, common.example_for((source,), inputs), "teacher", logits=logits)
    nodes = main_path(traced)
    if as_json:
        rows = [{**asdict(node), "facts": {**asdict(node.facts), "dtype": str(node.facts.dtype)}} for node in nodes]
        # In files the level keeps its old name, "octaves".
        rows = [{"octaves" if key == "level" else key: row[key] for key in row} for row in rows]
        common.say_json({"macs": traced.macs, "fingerprint": traced.fingerprint, "spine": rows})
        return
    out = common.console()
    parameters = sum(parameter.numel() for parameter in source.module.parameters())
    out.print(
        Text(
            f"{model}: {count(parameters)} parameters, {count(traced.macs)} MACs for an input of {_inputs(traced.example_values)}"
        )
    )
    sizes = [str(size) for size, _ in traced.report.checked]
    at = f"batch size{'s' if len(sizes) > 1 else ''} {', '.join(sizes)}"
    out.print(f"Traced by `{traced.report.method}`; equal to the module at {at}.")
    if passes:
        _show_passes(out, traced)
        return
    if not everything:
        out.print(main_path_table(traced, nodes))
        out.print(Text("All tensors and their names: --all", style="dim"))
        return
    table = plain_table("layer", "other names", "shape", "kind", "MACs", "parameters", numbers=("MACs", "parameters"))
    for name, names in traced.aliases.items():
        facts = traced.facts[name]
        table.add_row(
            Text(names[0]),
            Text(", ".join(names[1:])),
            size(facts.shape),
            facts.kind,
            count(facts.macs),
            count(facts.parameters),
        )
    out.print(table)


def _show_passes(out: Console, traced: TracedModel) -> None:
    from indistill_fx.cli.tables import passes_lines
    from indistill_fx.passes.lowering.table import lowerings_for
    from indistill_fx.passes.pipeline import whole_teacher
    from indistill_fx.target import Target

    half = whole_teacher(traced, lowerings=lowerings_for(Target.of(traced.module)))
    for line in passes_lines("traced", half.report):
        out.print(line, soft_wrap=True)


def _inputs(inputs: tuple[object, ...]) -> str:
    from indistill_fx.system.nested import tensors_of

    return ", ".join("x".join(map(str, value.shape[1:])) for value in tensors_of(inputs))
