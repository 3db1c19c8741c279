"""Where does the warm-up pay? Labels, KD and warm-up + KD at equal epochs, over images, kind and size of the student, and epochs.

    python benchmarks/regimes.py run --out OUT [--seeds 0 1 2] [--minutes 30]       goes on where it stopped
    python benchmarks/regimes.py table OUT|FILE.json [OUT …] --json benchmarks/results/regimes.json --into docs/results.md --svg FILE
    python benchmarks/regimes.py run --on cifar10 --data imagefolder:DIR --teacher FILE --out OUT --shares 0.5 0.1
    python benchmarks/regimes.py table OUT --on cifar10 --json benchmarks/results/regimes_cifar10.json --into docs/results.md

scikit-learn's digits whole (1,442 to train with, 355 to test on; a residual teacher, trained once on all of them), or the corners of the
same map on CIFAR-10 (10,000 to test on; the teacher is the paper's assistant, FILE its weights). Students: `pruned`:
the teacher cut to a share of its MACs by `compress` (its weights, repaired); `cut`: by `prune`, not repaired; `fresh`: the networks of
`pruned` with new weights; `other`: a plain chain of three convolutions of the same MACs (on CIFAR-10, where the teacher is such a chain,
a residual network), which no teacher can feed (`fed` is left out).
Ways: `labels`; `kd`; `curriculum`: pair after pair in half of the epochs, lengths rising, then KD; `joint`: all pairs at once, from
the student's own features, in half of the epochs, then KD; `third`: the same in a third of the epochs, as `distill` does where it warms
up by itself; `fed`: all segments at once, fed by the teacher, in a quarter of the epochs, then KD. All ways of a cell begin with the
same weights and see the same batches; every way's result is written at once.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from page import put_between
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.make_student import Measure, calibration, make_student
from indistill_fx.compression.write_source import source_of
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.demo.networks import DigitsStudent, DigitsTeacher, ResidualBlock
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.runs.record import environment
from indistill_fx.training.recipes import least_steps

WAYS = ("labels", "kd", "curriculum", "joint", "fed", "third")
MAIN = ("labels", "kd", "curriculum", "joint", "third")
"""In the table; `fed` is for comparison."""
COMPARED = {"kd", "joint"}
"""A seed counts where both were measured; labels and curriculum may have fewer seeds, which the table then says."""
KINDS = ("pruned", "cut", "fresh", "other")
SHARES = (0.5, 0.25, 0.1, 0.03)
EPOCHS = {
    "digits": {100: (30, 120), 400: (10, 40), 1442: (4, 16)},
    "cifar10": {100: (30, 120), 1000: (4, 20), 10000: (2, 8)},
}
"""Of all stages together, by number of images. Digits: 30 and 120 steps for 100 images, 60 and 240 for 400, 88 and 352 for all; CIFAR-10:
30 and 120 steps for 100 images, 60 and 300 for 1,000, 312 and 1,248 for 10,000 (full batches only)."""
RATE = 3e-3
BATCH = 64


@dataclass(frozen=True)
class Cell:
    """One place on the map, one seed."""

    images: int
    kind: str
    share: float
    epochs: int
    seed: int

    def __str__(self) -> str:
        return f"{self.images}-{self.kind}-{self.share:g}-{self.epochs}-{self.seed}"


@dataclass(frozen=True)
class Start:
    """A student before training, and its pairs."""

    student: nn.Module
    plan: ifx.AlignmentPlan


def teacher_of(options: argparse.Namespace, data: Data) -> nn.Module:
    """The network given, or one trained once on all digits."""
    if options.on == "cifar10":
        example = Path(__file__).parent.parent / "examples" / "paper_cifar10.py"
        return ifx.load(f"{example}:Cnn32@{options.teacher}").eval()
    torch.manual_seed(0)
    model, file = DigitsTeacher(), Path(options.out) / "teacher.safetensors"
    if not file.exists():
        ifx.train(model, data.train, epochs=12, schedule="cosine", learning_rate=5e-3, progress=False, device="cpu")
        save_file(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.eval()


def other_of(macs: float, x: Tensor) -> nn.Module:
    """Another kind of network than the teacher, with about these MACs: a chain for digits, a residual one for CIFAR-10."""

    def made(width: int) -> nn.Module:
        widths = (width, 2 * width, 4 * width)
        if x.shape[1] == 1:
            return DigitsStudent(widths)
        model = DigitsTeacher(widths)
        model.layer1[0] = ResidualBlock(x.shape[1], width, 2)
        return model

    found = {width: ifx.trace(made(width), x).macs for width in range(2, 80 if x.shape[1] == 1 else 20)}
    return made(min(found, key=lambda width: abs(found[width] - macs)))


def start_of(cell: Cell, teacher: ifx.TracedModel, data: Data) -> Start:
    """The student of a cell; the pruned ones are made with the cell's own images, without their labels."""
    x = teacher.example_inputs[0]
    torch.manual_seed(cell.seed)
    if cell.kind == "other":
        student = other_of(cell.share * teacher.macs, x)
        return Start(student, ifx.align(teacher.module, student, example_inputs=x))
    if cell.kind == "cut":
        shrunk = ifx.shrink(teacher, macs=cell.share)
        student = source_of(shrunk.value).build()
        return Start(student, plan_of(teacher, ifx.trace(student, x, role="student"), shrunk.report.axes))
    made = make_student(teacher, Budget(macs=cell.share), Measure(calibration(data.train_plain, 256)))
    student = source_of(made.model).build()
    if cell.kind == "fresh":
        for part in student.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()  # type: ignore[operator]
    return Start(student, plan_of(teacher, ifx.trace(student, x, role="student"), made.shrunk.axes))


def ways_of(cell: Cell) -> tuple[str, ...]:
    """The ways that a cell's student can be trained in."""
    without = {"fed" if cell.kind == "other" else "", "third" if cell.epochs < 3 else ""}
    return tuple(way for way in WAYS if way not in without)


def curriculum_of(way: str, epochs: int, pairs: int) -> tuple[Curriculum, int]:
    """The warm-up of a way, and the epochs that are left for the main stage."""
    if way == "fed":
        warm = max(1, epochs // 4)
        return Curriculum(feed="teacher", lengths=warm, learning_rate=RATE), epochs - warm
    if way == "joint":
        return Curriculum(together=True, lengths=epochs // 2, learning_rate=RATE), epochs - epochs // 2
    if way == "third":
        return Curriculum(together=True, lengths=epochs // 3, learning_rate=RATE), epochs - epochs // 3
    if way == "kd":
        return Curriculum(lengths=[]), epochs
    total = pairs * (pairs + 1) / 2
    ends = [round(epochs / 2 * k * (k + 1) / 2 / total) for k in range(pairs + 1)]
    lengths = [b - a for a, b in pairwise(ends)]
    return Curriculum(lengths=lengths, learning_rate=RATE), epochs - sum(lengths)


def accuracy_of(way: str, cell: Cell, start: Start, teacher: ifx.TracedModel, data: Data) -> dict[str, Any]:
    """Train one way; its accuracy on all test images."""
    student = copy.deepcopy(start.student)
    began = time.perf_counter()
    shared: dict[str, Any] = {
        "progress": False, "seed": cell.seed, "device": "cpu", "learning_rate": RATE, "schedule": "cosine"
    }  # fmt: skip
    if way == "labels":
        ifx.train(student, data.train, epochs=cell.epochs, **shared)
    else:
        curriculum, main = curriculum_of(way, cell.epochs, len(start.plan.pairs))
        x = teacher.example_inputs[0]
        ifx.distill(
            teacher.module, student, data.train, plan=start.plan, curriculum=curriculum, epochs=main, example_inputs=x,
            **shared,
        )  # fmt: skip
    return {"accuracy": evaluate(student, data.test).accuracy, "seconds": round(time.perf_counter() - began, 2)}


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Seed by seed, so that a map cut short is whole for the first seeds."""
    for seed, images, kind, share in product(
        options.seeds, options.images or EPOCHS[options.on], options.kinds, options.shares
    ):
        for epochs in EPOCHS[options.on][images]:
            yield Cell(images, kind, share, epochs, seed)


def run(options: argparse.Namespace) -> None:
    """All that is not measured yet, until the minutes are over."""
    torch.set_num_threads(options.threads)
    out, end = Path(options.out), time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(row["cell"], row["way"]) for row in map(json.loads, lines)}
    whole = open_data(options.data, batch_size=BATCH)
    teacher = ifx.trace(teacher_of(options, whole), next(iter(whole.train_plain))[0][:2], role="teacher")
    best = evaluate(teacher.module, whole.test).accuracy
    for cell in cells(options):
        left = [way for way in ways_of(cell) if way in options.ways and (str(cell), way) not in done]
        if not left:
            continue
        data = replace(open_data(options.data, batch_size=BATCH, seed=cell.seed, limit=cell.images), test=whole.test)
        start = start_of(cell, teacher, data)
        before = evaluate(start.student, whole.test).accuracy
        for way in left:
            if time.monotonic() > end:
                return
            row = {"cell": str(cell), "way": way, **vars(cell), "teacher": best, "before": before}
            row |= accuracy_of(way, cell, start, teacher, data)
            with file.open("a") as sink:
                sink.write(json.dumps(row) + "\n")
        print(cell, flush=True)


def rows_in(places: Sequence[str], *keys: str) -> list[dict[str, Any]]:
    """All rows, each measurement once: of folders that `run` wrote, and of files that `table` wrote."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place in map(Path, places):
        if place.is_dir():
            found = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
        else:
            found = json.loads(place.read_text())["rows"]
        rows |= {tuple(row[key] for key in keys): row for row in found}
    return list(rows.values())


def table(options: argparse.Namespace) -> None:
    """The map as JSON, as a table and as a picture."""
    rows = rows_in(options.out, "cell", "way")
    places = sorted(
        {(r["images"], r["kind"], r["share"], r["epochs"]) for r in rows},
        key=lambda p: (p[0], KINDS.index(p[1]), -p[2], p[3]),
    )
    found = {place: by_way(place, rows) for place in places}
    text = "\n".join(lines_of(found, rows)) + "\n"
    print(text)
    if options.json:
        facts = {"command": "python benchmarks/regimes.py run", "date": datetime.now(UTC).isoformat(timespec="seconds")}
        kept = {**facts, "environment": environment("cpu", 1), "rate": RATE, "rows": rows}
        Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")
    if options.into:
        page = Path(options.into)
        on = "" if options.on == "digits" else f" --on {options.on}"
        begin, close = f"<!-- made by benchmarks/regimes.py table{on} -->", "<!-- regimes: end -->"
        put_between(page, begin, close, text)
    if options.svg:
        Path(options.svg).write_text(heat_map(found))


Place = tuple[int, str, float, int]
Ways = dict[str, dict[int, float]]
"""Of each way, by seed: accuracy in percent."""
Found = dict[Place, Ways]


def by_way(place: Place, rows: Sequence[dict[str, Any]]) -> Ways:
    """The accuracies of a place, of the seeds that have KD and `joint`."""
    own = [r for r in rows if (r["images"], r["kind"], r["share"], r["epochs"]) == place]
    seeds = [s for s in sorted({r["seed"] for r in own}) if {r["way"] for r in own if r["seed"] == s} >= COMPARED]
    return {
        way: {s: 100 * r["accuracy"] for s in seeds for r in own if r["seed"] == s and r["way"] == way} for way in MAIN
    }


def gain_of(ways: Ways, way: str = "joint") -> float:
    """A way minus KD in points, over the seeds of that way; 0 if it was not measured."""
    return mean([ways[way][seed] - ways["kd"][seed] for seed in ways[way]] or [0.0])


def by_default(place: Place) -> bool:
    """Whether `distill` warms up there."""
    images, kind, share, epochs = place
    least = least_steps(share, made=kind in ("pruned", "cut"))
    return kind != "other" and least is not None and epochs // 3 * (images // BATCH) >= least


def lines_of(found: Found, rows: Sequence[dict[str, Any]]) -> list[str]:
    """A row a place, and what the default gains and loses."""
    lines = [
        "| images | student | MACs | epochs | before | labels | KD | curriculum + KD | joint + KD | third + KD |"
        " joint over KD | third over KD | default | seeds |"
    ]
    lines += ["|" + "---|" * 14]
    gains = []
    for place, ways in found.items():
        if not ways["kd"]:
            continue
        images, kind, share, epochs = place
        own = [100 * r["before"] for r in rows if (r["images"], r["kind"], r["share"], r["epochs"]) == place]
        gain, seeds, warm = gain_of(ways, "third"), len(ways["kd"]), by_default(place)
        cells = [cell_of(list(values.values()), seeds) for values in ways.values()]
        gains += [(gain, place)] if warm and ways["third"] else []
        lines.append(
            f"| {images:,} | {kind} | {share:.0%} | {epochs} | {mean(own):.1f} | {' | '.join(cells)} |"
            f" {gain_of(ways):+.1f} | {f'{gain:+.1f}' if ways['third'] else '–'} | {'third' if warm else 'KD'} | {seeds} |"
        )
    if gains:
        worst, most = min(gains), max(gains)
        lines += [
            "",
            f"Where `distill` warms up by default ({len(gains)} cells): {mean(g for g, _ in gains):+.1f} points on the mean;",
        ]
        lines += [
            f"the worst is {worst[0]:+.1f} ({described(worst[1])}), the best {most[0]:+.1f} ({described(most[1])})."
        ]
    return lines


def cell_of(values: Sequence[float], seeds: int) -> str:
    """Mean and deviation, and the number of seeds where it is another than the row's."""
    if not values:
        return "–"
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}" + (f" ({len(values)})" if len(values) != seeds else "")


def described(place: Place) -> str:
    """A place in words."""
    images, kind, share, epochs = place
    return f"{images:,} images, {kind}, {share:.0%} of the MACs, {epochs} epochs"


def heat_map(found: Found) -> str:
    """Rows: kind and size; columns: images and epochs; colour and figure: joint + KD minus KD, in points."""
    columns = [(images, epochs) for images, both in EPOCHS["digits"].items() for epochs in both]
    rows = [row for row in product(KINDS, SHARES) if any(place[1:3] == row for place in found)]
    wide, high, left, top = 92, 26, 150, 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide * len(columns)} {top + high * len(rows) + 8}"'
        ' font-family="sans-serif" font-size="12">',
        "<title>Warm-up (all pairs at once) + KD minus KD, points of test accuracy</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for k, (images, epochs) in enumerate(columns):
        x = left + wide * (k + 0.5)
        parts.append(f'<text x="{x}" y="18" text-anchor="middle">{images:,} images</text>')
        parts.append(f'<text x="{x}" y="36" text-anchor="middle">{epochs} epochs</text>')
    for j, (kind, share) in enumerate(rows):
        y = top + high * j
        parts.append(f'<text x="{left - 8}" y="{y + 17}" text-anchor="end">{kind}, {share:.0%} of MACs</text>')
        for k, (images, epochs) in enumerate(columns):
            ways = found.get((images, kind, share, epochs))
            if not ways or not ways["kd"]:
                continue
            gain = gain_of(ways)
            strength = min(abs(gain) / 15, 1.0)
            hue = (30, 110, 60) if gain > 0 else (170, 50, 40)
            colour = ",".join(str(round(255 + (part - 255) * strength)) for part in hue)
            ink = "white" if strength > 0.6 else "black"
            x = left + wide * k
            parts.append(f'<rect x="{x}" y="{y}" width="{wide - 2}" height="{high - 2}" fill="rgb({colour})"/>')
            parts.append(
                f'<text x="{x + wide / 2 - 1}" y="{y + 16}" text-anchor="middle" fill="{ink}">{gain:+.1f}</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("--on", default="digits", choices=list(EPOCHS))
    one.add_argument("--data", default="digits")
    one.add_argument(
        "--teacher", help="with --on cifar10: weights of examples/paper_cifar10.py:Cnn32, a safetensors file"
    )
    one.add_argument("--images", nargs="+", type=int)
    one.add_argument("--out", required=True)
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    one.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    one.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    one.add_argument("--minutes", type=float, default=1e6)
    one.add_argument("--threads", type=int, default=1)
    one = commands.add_parser("table")
    one.set_defaults(call=table)
    one.add_argument("out", nargs="+")
    one.add_argument("--on", default="digits", choices=list(EPOCHS))
    one.add_argument("--json")
    one.add_argument("--into")
    one.add_argument("--svg")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
