"""`indistill-fx report`."""

from __future__ import annotations

import click


@click.command(name="report")
@click.argument("run", metavar="RUN_DIR", type=click.Path())
@click.option(
    "-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the page to this HTML file."
)
@click.option("--svg", metavar="FILE", type=click.Path(dir_okay=False), help="Write the curves as an SVG image.")
@click.option("--png", metavar="FILE", type=click.Path(dir_okay=False), help="Write the curves as a PNG image.")
def command(run: str, output: str | None, svg: str | None, png: str | None) -> None:
    """Show what a run did on one page: schedule, curves, models, kept channels, environment. The HTML file needs no network connection.

    RUN_DIR is the -o of `distill`, `train`, `compress` or `demo`. Give a folder of runs to compare them. If a run is unfinished or damaged,
    the page shows what it can read and says what is missing.

    \b
    Examples:
      indistill-fx report runs/demo-1 -o report.html
      indistill-fx report runs/mine --svg curves.svg
    """
    from indistill_fx.errors import ConfigError
    from indistill_fx.report import charts_of, curves_svg, read_runs, run_page, to_png, write

    if not (output or svg or png):
        raise ConfigError("There is nothing to write.", where="-o", hint="Give -o report.html, --svg or --png.")
    if output:
        write(output, run_page(run))
    if svg or png:
        charts = charts_of(read_runs(run))
        if not charts:
            raise ConfigError(f"{run} has no curves.", where=run, hint="Wait for the end of its first epoch.")
        picture = curves_svg(charts)
        if svg:
            write(svg, picture)
        if png:
            write(png, to_png(picture))
    click.echo(f"Written: {', '.join(filter(None, (output, svg, png)))}.")
