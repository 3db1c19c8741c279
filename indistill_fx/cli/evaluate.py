"""`indistill-fx evaluate`."""

from __future__ import annotations

import click

from indistill_fx.cli import common


@click.command(name="evaluate")
@click.argument("model")
@common.data_option
@common.input_option
@common.trust_option
@click.option("--batch-size", default=256, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--retrieval",
    is_flag=True,
    help="Also retrieve training images by test images on the penultimate features: mAP and precision.",
)
@click.option(
    "-k", "k", default=100, show_default=True, type=click.IntRange(min=1), help="Depth of the precision, P@k."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    data: str,
    input_size: str | None,
    trust: tuple[str, ...],
    batch_size: int,
    retrieval: bool,
    k: int,
    as_json: bool,
) -> None:
    """Measure MODEL (a spec or a run directory) on the test set of DATA.

    \b
    Examples:
      indistill-fx evaluate runs/first --data digits
      indistill-fx evaluate models.py:make_student@student.safetensors --data imagefolder:cifar10 --retrieval
    """
    import json
    from dataclasses import asdict

    from indistill_fx.data import open_data
    from indistill_fx.evaluate import evaluate, evaluate_retrieval

    source = common.open_model(model, trust)
    opened = open_data(data, batch_size=batch_size)
    result = asdict(evaluate(source.module, opened.test))
    if retrieval:
        traced = common.trace_model(source, common.example_for((source,), input_size, opened.input_size), "teacher")
        result["retrieval"] = asdict(evaluate_retrieval(traced, opened, k=k))
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    out = common.console()
    out.print(
        f"{model} on {data}: accuracy {100 * result['accuracy']:.2f}%, loss {result['loss']:.4f} on {result['count']:,} samples"
    )
    for name, value in result.get("retrieval", {}).items():
        out.print(f"  {name}: {100 * value:.2f}" if isinstance(value, float) else f"  {name}: {value}")
