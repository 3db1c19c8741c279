"""What several commands share: options, and the way from a spec to a traced model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from indistill_fx.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from indistill_fx.sources import Source
    from indistill_fx.traced import Role, TracedModel

Command = TypeVar("Command", bound=Callable[..., Any])

input_option = click.option("--input", "input_size", metavar="CxHxW", help="Shape of one input sample, such as 3x32x32. [default: what the model or the data says]")
trust_option = click.option(
    "--trust", multiple=True, metavar="PACKAGE", help="Let model files name classes of this package. Only for files you trust: it can run code."
)
data_option = click.option("--data", required=True, metavar="DATA", help="digits, cifar10, cifar100, imagefolder:DIR or file.py:make_loaders.")


def console() -> Console:
    """The terminal, 100 columns wide where there is none."""
    from rich.console import Console

    return Console(width=None if click.get_text_stream("stdout").isatty() else 100, highlight=False)


def open_model(spec: str, trust: tuple[str, ...]) -> Source:
    """Load a spec, and say aloud what was trusted or changed on the way."""
    from indistill_fx.sources import load_source

    source = load_source(spec, trust=trust)
    for note in source.notes:
        click.echo(f"{spec}: {note}", err=True)
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
            f"The input shape of {' and '.join(source.spec for source in sources)} is not known.", where="--input", hint="Give it: --input 3x224x224."
        )
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


def trace_model(source: Source, example: Any, role: Role) -> TracedModel:
    """Trace a loaded model, and say which rung it took when it was not the first."""
    from indistill_fx.passes.trace import trace

    traced = trace(source.module, example, role=role)
    if traced.report.rung != "symbolic":
        click.echo(f"{source.spec}: traced by `{traced.report.rung}`", err=True)
    for line in (*traced.report.specialisations, *traced.report.notes):
        click.echo(f"{source.spec}: {line}", err=True)
    if traced.report.leaves:
        click.echo(f"{source.spec}: kept as one node: {', '.join(traced.report.leaves)}", err=True)
    return traced
