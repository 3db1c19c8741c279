"""Does the warm-up pay? The paper's pair on CIFAR-10 images, arm by arm, seed by seed.

    python benchmarks/cifar10.py run --data imagefolder:DIR --assistant FILE --teacher RUN_DIR --out OUT --seeds 0 1 2
    python benchmarks/cifar10.py table OUT [OUT …] --json benchmarks/results/cifar10.json --into docs/results.md

An arm is `method:warm-up+main`, in epochs: `kd:1-2-3+27` warms the three layers up for 1, 2 and 3 epochs and then
distils by `kd` for 27; `kd:0+33` has no warm-up. Further arguments of the curriculum may follow, as in
`kd:1-1-1+27@penultimate=3`. Arms of one method with equal sums are a comparison at equal total epochs, arms with equal
main epochs the paper's view. All arms of a seed start from the same weights and see the same batches. Arms that are done
are skipped, interrupted ones go on.

`labels` and `kd` are measured by accuracy and retrieval, `pkt` by retrieval alone: it trains no classifier. The
teacher of `kd` is a run directory of `indistill-fx train examples/paper_cifar10.py:Cnn32`; that of `pkt` the authors'
assistant. Retrieval: every fifth test image as a query, all training images as the database.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from ast import literal_eval
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from page import put_between
from safetensors.torch import load_model
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data

_QUERIES = 2000
_FIGURES = ("accuracy", "map_cosine", "map_euclidean", "p100_cosine", "p100_euclidean")


def paper() -> Any:
    """The example's module: models and measurement."""
    path = Path(__file__).parent.parent / "examples" / "paper_cifar10.py"
    spec = importlib.util.spec_from_file_location("paper_cifar10", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(arm: str) -> tuple[str, list[int], int, dict[str, Any]]:
    """Method, warm-up lengths, main epochs, further arguments of the curriculum."""
    method, _, rest = arm.partition(":")
    lengths, *options = rest.split("@")
    warm, _, main = lengths.partition("+")
    chosen = [int(n) for n in warm.split("-")]
    pairs = (option.split("=") for option in options)
    return method, chosen if any(chosen) else [], int(main), {key: literal(value) for key, value in pairs}


def literal(text: str) -> Any:
    """A number where it is one."""
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def arms_of(total: int) -> list[str]:
    """Labels; and per method no warm-up, the best and the paper's at equal total, and no warm-up at equal main epochs."""
    best = {"kd": f"1-1-1+{total - 6}@penultimate=3", "pkt": f"0+{total - 12}@penultimate=12"}
    arms = [f"labels:0+{total}"]
    for method, ours in best.items():
        arms += [f"{method}:{lengths}" for lengths in (f"0+{total}", ours, f"3-4-5+{total - 12}", f"0+{total - 12}")]
    return arms


def run(options: argparse.Namespace) -> None:
    """Train and measure every arm of every seed that is not done yet."""
    torch.set_num_threads(options.threads)
    example = paper()
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    teachers = {"pkt": example.make_teacher(options.assistant), "kd": example.Cnn32()}
    load_model(teachers["kd"], str(Path(options.teacher) / "student.safetensors"))
    for seed in options.seeds:
        data = open_data(options.data, batch_size=128, seed=seed, cache=options.cache)
        for name, teacher in teachers.items():
            target = folder / f"teacher-{name}.json"
            if not target.exists():
                target.write_text(json.dumps(example.measure(teacher, data, queries=_QUERIES)))
        for arm in options.arms or arms_of(options.epochs):
            target = folder / f"{arm.replace(':', '_')}_{seed}" / "figures.json"
            if not target.exists():
                figures = one(example, arm, seed, data, teachers, target.parent)
                target.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
                print(
                    json.dumps({"arm": arm, "seed": seed} | {k: v for k, v in figures.items() if k != "curve"}),
                    flush=True,
                )


def one(
    example: Any,
    arm: str,
    seed: int,
    data: Data,
    teachers: dict[str, nn.Module],
    run_dir: Path,
    *,
    compile: bool = True,
    main_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Train one arm, and measure it."""
    method, warm, main, options = parse(arm)
    torch.manual_seed(seed)
    student = example.make_student()
    x = torch.randn(2, 3, 32, 32)
    teacher = teachers["pkt" if method == "pkt" else "kd"]
    began = time.perf_counter()
    record = ifx.distill(
        teacher,
        student,
        data.train,
        plan=ifx.align(teacher, student, example_inputs=x),
        curriculum=ifx.Curriculum(lengths=warm, **options),
        main=method,
        main_options=main_options or {},
        epochs=main,
        example_inputs=x,
        run_dir=run_dir,
        resume=True,
        progress=False,
        seed=seed,
        schedule="step",
        milestones=[main - 3],
        compile=compile,
        val_loader=None if method == "pkt" else data.test,
    )
    figures = example.measure(student, data, queries=_QUERIES)
    return figures | {
        "loss": record.stages[-1].losses[-1],
        "seconds": record.seconds,
        "wall_seconds": time.perf_counter() - began,
        "curve": [[epoch.stage, epoch.seconds, epoch.loss, epoch.accuracy] for epoch in record.epochs],
    }


def collect(folders: list[str]) -> dict[str, Any]:
    """Every arm's figures by seed, and the teachers'."""
    arms: dict[str, dict[str, Any]] = {}
    teachers: dict[str, Any] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.glob("*/figures.json")):
            arm, _, seed = path.parent.name.replace("_", ":", 1).rpartition("_")
            arms.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("teacher-*.json")):
            teachers[path.stem.removeprefix("teacher-")] = json.loads(path.read_text(encoding="utf-8"))
    return {"teachers": teachers, "arms": arms}


def cell(values: list[float], *, scale: float = 100, digits: int = 2) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {scale * stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * mean(values):.{digits}f}{spread}"


def table(record: dict[str, Any]) -> str:
    """The arms as a Markdown table; `pkt` has no accuracy."""
    lines = [
        "| arm (warm-up + main epochs) | seeds | accuracy | mAP cosine | mAP Euclid | P@100 cosine | P@100 Euclid "
        "| final loss | training, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in record["teachers"].items():
        cells = ["—" if name == "pkt" and key == "accuracy" else f"{100 * figures[key]:.2f}" for key in _FIGURES]
        lines.append(f"| teacher of {name} | | {' | '.join(cells)} | | |")
    for arm, seeds in sorted(record["arms"].items(), key=lambda entry: order(entry[0])):
        rows = list(seeds.values())
        cells = [
            "—" if arm.startswith("pkt") and key == "accuracy" else cell([row[key] for row in rows]) for key in _FIGURES
        ]
        loss = f"{mean(row['loss'] for row in rows):.4g}"
        seconds = cell([row["seconds"] for row in rows], scale=1, digits=0)
        lines.append(f"| {arm} | {len(rows)} | {' | '.join(cells)} | {loss} | {seconds} |")
    return "\n".join(lines)


def order(arm: str) -> tuple[Any, ...]:
    """Method, total, warm-up."""
    method, warm, main, options = parse(arm)
    before = sum(warm) + options.get("penultimate", 0)
    return ("labels", "kd", "pkt").index(method), main + before, before, str(options)


def differences(record: dict[str, Any]) -> str:
    """What the warm-up changes, seed by seed: paired differences at equal total and at equal main epochs."""
    lines = ["| with | without | equal | seeds | accuracy | mAP cosine | mAP Euclid |", "|---|---|---|---|---|---|---|"]
    arms = record["arms"]
    for ours in sorted(arms, key=order):
        method, warm, main, options = parse(ours)
        before = sum(warm) + options.get("penultimate", 0)
        for what, epochs in (("total", main + before), ("main", main)) if before else ():
            other = f"{method}:0+{epochs}"
            seeds = sorted(arms[ours].keys() & arms.get(other, {}).keys())
            if seeds:
                cells = [
                    "—"
                    if method == "pkt" and key == "accuracy"
                    else cell([arms[ours][seed][key] - arms[other][seed][key] for seed in seeds])
                    for key in _FIGURES[:3]
                ]
                lines.append(f"| {ours} | {other} | {what} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def over_time(record: dict[str, Any], epochs: tuple[int, ...] = (9, 13, 17, 21, 25, 29, 33, 45, 57, 70)) -> str:
    """Accuracy against wall-clock: after so many epochs of training in all, seconds and accuracy, means over seeds."""
    lines = [f"| arm | {' | '.join(f'epoch {n}' for n in epochs)} |", "|---" * (len(epochs) + 1) + "|"]
    for arm, seeds in sorted(record["arms"].items(), key=lambda entry: order(entry[0])):
        if arm.startswith("pkt"):
            continue
        curves = [row["curve"] for row in seeds.values()]
        cells = []
        for n in epochs:
            known = all(len(curve) >= n and curve[n - 1][3] is not None for curve in curves)
            seconds = mean(sum(epoch[1] for epoch in curve[:n]) for curve in curves)
            cells.append(f"{seconds:.0f} s: {cell([curve[n - 1][3] for curve in curves])}" if known else "")
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the page's marks."""
    begin, end = "<!-- made by benchmarks/cifar10.py table -->", "<!-- end of cifar10 -->"
    put_between(page, begin, end, text)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    runs = commands.add_parser("run", help="train and measure arms")
    runs.add_argument("--data", default="imagefolder:/data")
    runs.add_argument("--cache", help="keep decoded images here")
    runs.add_argument("--assistant", required=True, help="the authors' state dict of Cnn32")
    runs.add_argument("--teacher", required=True, help="run directory of Cnn32 trained on labels")
    runs.add_argument("--out", required=True)
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs.add_argument("--epochs", type=int, default=33, help="in all")
    runs.add_argument("--arms", nargs="+", help="these arms instead of the standard ones")
    runs.add_argument("--threads", type=int, default=1)
    shows = commands.add_parser("table", help="print the tables of what is done")
    shows.add_argument("folders", nargs="+")
    shows.add_argument("--json", help="write all figures here")
    shows.add_argument("--into", type=Path, help="the page whose tables are replaced, instead of printing")
    options = parser.parse_args()
    if options.what == "run":
        run(options)
        return
    record = collect(options.folders)
    text = "\n\n".join((table(record), differences(record), over_time(record)))
    print(text) if options.into is None else put_into(options.into, text)
    if options.json:
        told = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(sys.argv),
            "versions": {name: version(name) for name in ("torch", "torchvision", "accelerate")},
            "cores": os.cpu_count(),
        }
        Path(options.json).write_text(json.dumps(told | record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
