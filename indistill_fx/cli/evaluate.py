"""`indistill-fx evaluate`."""

from __future__ import annotations

from typing import Any

import click

from indistill_fx.cli import common, pictures


@click.command(name="evaluate")
@click.argument("model")
@common.data_option
@pictures.picture_options
@common.input_option
@common.trust_option
@common.logits_option
@common.task_option
@common.device_option
@pictures.reading_options
@click.option(
    "--retrieval",
    is_flag=True,
    help="Also measure retrieval: mAP and precision of training images found by test images, by penultimate vectors; with "
    "--task embedding, retrieval alone, by the outputs.",
)
@common.count_option("-k", "k", default=100, help="Number of retrieved images for the precision P@k.")
@click.option("--tap", metavar="LAYER", help="Retrieve with this layer's features. [default: the penultimate vector]")
@common.json_option
def command(
    model: str,
    data: str,
    inputs: tuple[str, ...],
    trust: tuple[str, ...],
    retrieval: bool,
    k: int,
    tap: str | None,
    as_json: bool,
    logits: str | int | None,
    task: Any,
    device: str,
    **options: Any,
) -> None:
    """Measure MODEL (a spec or a run directory) on the test set of DATA.

    \b
    Examples:
      indistill-fx evaluate runs/first --data digits
      indistill-fx evaluate models.py:make_student@student.safetensors --data imagefolder:cifar10 --retrieval
    """
    from dataclasses import asdict

    from accelerate.utils import send_to_device

    from indistill_fx.evaluation.accuracy import evaluate, more_outputs_than_classes
    from indistill_fx.evaluation.kept_task import asked_or_kept
    from indistill_fx.evaluation.retrieval import evaluate_retrieval
    from indistill_fx.target import chosen_device

    place = chosen_device(device)
    source = common.open_model(model, trust)
    logits = common.logits_of(logits, source)
    opened = pictures.open_pictures(data, options, source, progress=True, **pictures.reading(options))
    source.module.to(place)
    task, origin = asked_or_kept(task, source)
    features_alone = bool(retrieval or tap) and getattr(task, "name", task) == "embedding"
    measured = None if features_alone else evaluate(source.module, opened.test, task=task, logits=logits, progress=True)
    result: dict[str, Any] = {"task": "embedding"} if measured is None else asdict(measured)
    example = send_to_device(common.example_for((source,), inputs, opened), place)
    if retrieval or tap:
        traced = common.trace_model(source, example, "teacher", logits=logits)
        tap = tap or (traced.tap_name(traced.logits) if features_alone else None)
        result["retrieval"] = asdict(evaluate_retrieval(traced, opened, k=k, tap=tap, progress=True))
    if as_json:
        common.say_json(result)
        return
    out = common.console()
    if measured is not None:
        summary = f"{measured.metric.title} {measured.metric.text(measured.value)}, loss {measured.loss:.4f}"
        out.print(f"{model} on {data}: {summary} on {measured.count:,} samples")
        for name, value in measured.metrics.items():
            if name != measured.metric.name:
                out.print(f"  {name.replace('_', ' ')}: {value:.4f}")
        if warning := more_outputs_than_classes(source.module, example, opened.classes, logits):
            common.say(f"{warning} If they are a backbone's features, measure these: --task embedding --retrieval.")
    common.say(f"Task: {result['task']}, {origin}.")
    for name, value in result.get("retrieval", {}).items():
        out.print(f"  {name}: {100 * value:.2f}" if isinstance(value, float) else f"  {name}: {value}")
