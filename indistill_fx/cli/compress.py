"""`indistill-fx compress`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from indistill_fx.cli import common, training

if TYPE_CHECKING:
    from indistill_fx.compression.make_student import Step

_SECTIONS = {
    "The budget": ("macs", "params", "size_mb", "latency_ms", "on", "threads", "batch"),
    "The widths": ("criterion", "round_to", "samples"),
    "The warm-up": ("warmup", "feed", "one_by_one", "stages", "no_warmup", "keep_features"),
    "The main stage": ("main", "main_options"),
    "Data and models": (*training.SECTIONS["Data and models"], "inputs"),
    "After training": ("qat",),
    "Training": training.SECTIONS["Training"],
    "The run": (*training.SECTIONS["The run"], "no_export"),
}


class _ByRecipe(training.Grouped):
    """The recipe's values are the defaults of the options, also in the help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Set the defaults first: the help is shown while arguments are read."""
        from indistill_fx.training.recipes import RECIPES

        ctx.default_map = {**RECIPES["compress"].student, "curriculum": None}
        return super().parse_args(ctx, args)


@click.command(name="compress", cls=_ByRecipe, sections=_SECTIONS)
@click.argument("teacher")
@common.data_option
@click.option("-o", "--output", required=True, metavar="RUN_DIR", help="Directory for the student and everything else.")
@click.option(
    "--macs", type=float, help="Budget of multiply-accumulates. Up to 1: a share of the teacher's; above 1: a number."
)
@click.option(
    "--params", type=float, help="Budget of parameters. Up to 1: a share of the teacher's; above 1: a number."
)
@click.option("--size-mb", type=float, help="Budget for the weights, in megabytes.")
@click.option(
    "--latency-ms",
    type=float,
    help="Budget for the time of one call on the target, in milliseconds; times are measured.",
)
@common.choice_option(
    "--on", ["onnxruntime", "torch", "torch-compile"], help="With --latency-ms: the runtime that is timed."
)
@common.count_option("--threads", default=1, help="With --latency-ms: CPU threads.")
@common.count_option("--batch", default=1, help="With --latency-ms: samples in one call.")
@common.criterion_option
@common.round_option
@common.count_option(
    "--samples",
    default=1024,
    help="Number of training samples (without labels) for measuring sensitivities and repairing weights.",
)
@click.option(
    "--warmup",
    metavar="EPOCHS",
    type=training.Numbers(),
    help="Epochs of the warm-up or, with --one-by-one, of each pair (1,2,3). [default: 6]",
)
@common.choice_option(
    "--feed",
    ["student", "teacher"],
    help="Input of each segment between two pairs: the student's own feature, or the teacher's.",
)
@click.option("--one-by-one", is_flag=True, help="Train one pair after another instead of all in one stage.")
@click.option("--stages", is_flag=True, help="Pair one layer of every network stage instead of one of every block.")
@training.no_warmup_option
@training.keep_features_option
@click.option("--main", default="kd", show_default=True, help="Main loss; `distill --help` lists them.")
@training.main_option_option
@training.qat_option
@click.option("--no-export", is_flag=True, help="Do not write student.onnx.")
@common.input_option
@training.training_options
def command(teacher: str, **options: Any) -> None:
    """Make a smaller student from TEACHER and train it: choose widths, shrink, repair, warm up, distil, export.

    Give one budget: --macs, --params, --size-mb or --latency-ms.

    RUN_DIR gets student.py (class Student: plain PyTorch, yours to edit), student.safetensors and student.onnx. Use --resume to
    continue an interrupted run. After every step a line shows the metric, MACs, parameters and, with --latency-ms, the latency.

    \b
    Examples:
      indistill-fx compress teacher.pt --data imagefolder:cifar10 --macs 0.5 -o runs/half
      indistill-fx compress torchvision:resnet50 --data imagefolder:flowers --latency-ms 20 --threads 2 -o runs/fast
    """
    from indistill_fx.compression.compress import compress
    from indistill_fx.compression.made import check_free
    from indistill_fx.runs.load import about_data

    if not options["resume"] or not Path(options["output"], "compress.json").exists():
        check_free(Path(options["output"]), options["resume"])
    source = common.open_model(teacher, options["trust"], seed=options["seed"])
    options["logits"] = common.logits_of(options["logits"], source)
    data = training.open_training_data(options, source)
    shared: dict[str, Any] = {
        "run_dir": options["output"],
        "main": options["main"],
        "main_options": training.main_options(options["main_options"]),
        "val_loader": data.test if data.labelled else None,
        "example_inputs": common.example_for((source,), options["inputs"], data),
        "logits": options["logits"],
        "task": training.task_of(options, source),
        "resume": options["resume"],
        "about": {"teacher": teacher, "data": options["data"], **about_data(data), **training.entry(options)},
        **training.settings_of(options),
    }
    request = {name: options[name] for name in _REQUEST}
    request |= {"every_block": not options["stages"], "export": not options["no_export"], "epochs": options["epochs"]}
    request |= {"calibration_loader": data.train_plain, "curriculum": _curriculum(options), "say": common.say}
    made = compress(source.module, data.train, **request, **shared)
    _tell(made.steps)
    out = common.console()
    if made.spec:
        spec = made.spec.replace(str(Path(options["output"]).absolute()), options["output"])
        out.print(f"The student: {quote(spec)}", soft_wrap=True, highlight=False)
    out.print(f"Everything is in {options['output']}.", soft_wrap=True)
    if made.spec:
        home = quote(options["output"])
        judged = made.record.task == "classification"  # int8 files are accepted by their accuracy
        small = f"indistill-fx export {home} -o student.onnx --data {quote(options['data'])}{' --int8' * judged}"
        out.print(f"Next: `indistill-fx bench {quote(teacher)} {home}`, `{small}`.", soft_wrap=True, highlight=False)
    if options["qat"] and not made.spec:
        out.print("--qat was left out: it starts from the student's source code, and there is none.", soft_wrap=True)
    elif options["qat"]:
        about = training.kept_of(made.spec.partition("@")[0], made.student, shared["example_inputs"], data, options)
        settings = {**shared, "about": {**shared["about"], **about}, "plan": made.plan}
        training.for_int8(source.module, made.student, data.train, settings, options["qat"])


_REQUEST = "macs params size_mb latency_ms on threads batch criterion round_to samples".split()


def _curriculum(options: dict[str, Any]) -> Any:
    """The recipe's curriculum, with the requested values in place of its own."""
    from indistill_fx.errors import ConfigError
    from indistill_fx.training.recipes import NO_WARMUP, RECIPES

    if options["no_warmup"]:
        asked = {"--warmup": options["warmup"], "--one-by-one": options["one_by_one"]}
        asked["--feed teacher"] = options["feed"] == "teacher"
        if ignored := [name for name, value in asked.items() if value]:
            raise ConfigError(
                f"{ignored[0]} and --no-warmup contradict each other.", where=ignored[0], hint="Give one of them."
            )
        return replace(NO_WARMUP, keep_features=options["keep_features"] or 0.0)
    if options["one_by_one"] and options["feed"] == "teacher":
        raise ConfigError(
            "--one-by-one and --feed teacher exclude each other: segments fed with the teacher's features train in one stage.",
            where="--one-by-one",
            hint="Leave one of them out.",
        )
    recipe_curriculum = replace(
        RECIPES["compress"].student["curriculum"], feed=options["feed"], together=not options["one_by_one"]
    )
    if options["keep_features"] is not None:
        recipe_curriculum = replace(recipe_curriculum, keep_features=options["keep_features"])
    lengths = options["warmup"]
    if lengths:
        recipe_curriculum = replace(recipe_curriculum, lengths=lengths[0] if len(lengths) == 1 else lengths)
    elif options["one_by_one"]:
        recipe_curriculum = replace(recipe_curriculum, lengths=1)
    return recipe_curriculum


def _tell(steps: tuple[Step, ...]) -> None:
    from indistill_fx.cli.tables import count, plain_table

    timed = any(step.latency_ms is not None for step in steps)
    metric = next((step.metric for step in steps if step.shown), None)
    numbers = (*filter(None, (metric,)), "MACs", "parameters", "divergence", *(("ms",) if timed else ()))
    table = plain_table("step", *numbers, numbers=numbers)
    for step in steps:
        row = [step.shown] if metric is not None else []
        row += [count(step.macs), count(step.parameters)]
        row += [f"{step.divergence:.3g}" if step.divergence is not None else ""]
        row += [f"{step.latency_ms:.3g}" if step.latency_ms is not None else ""] if timed else []
        table.add_row(f"{step.name} (training starts here)" if step.start else step.name, *row)
    common.console().print(table)
