"""Why does the warm-up pay, or not? What features do in it and after it, and which of its settings decide.

    python benchmarks/why.py run --out OUT [--seeds 0 1 2] [--minutes 60]       goes on where it stopped
    python benchmarks/why.py table OUT|FILE.json [OUT …] --json benchmarks/results/why.json --into docs/why.md

scikit-learn's digits and the students of `regimes.py`, in four of its places: `fresh`, a network of the teacher's kind with new weights
and 100 images, where the warm-up gains most; `all`, the same with all 1,442 images; `repaired`, the same shape with the teacher's
weights, cut and repaired by `compress`; `other`, a plain chain of convolutions. A quarter of the teacher's MACs, equal epochs in all.

`watch` follows the features of every pair through KD alone and through warm-up + KD: the loss of the warm-up (mean squared error beside the
teacher's kept channels, divided by what a constant guess would have) on training and test images, and linear CKA on test images.
`reach` is what a warm-up of ten times the length ends at. `arms` changes one setting of the warm-up at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from page import put_between
from regimes import BATCH, RATE, Cell, Start, rows_in, start_of, teacher_of
from torch import nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import evaluate
from indistill_fx.passes.pairing.cka import cka
from indistill_fx.runs.record import environment

PLACES = {
    "fresh": (100, "fresh", 120),
    "all": (1442, "fresh", 16),
    "repaired": (100, "pruned", 120),
    "other": (100, "other", 120),
}
"""Images, kind of student, epochs of all stages together."""
SHARE = 0.25
NONE = Curriculum(lengths=[])
TIMES = ("start", "after the warm-up", "end", "end, KD alone")


@dataclass(frozen=True)
class Case:
    """A place on the map and a seed: the teacher, the student before training, the data."""

    teacher: ifx.TracedModel
    start: Start
    data: Data
    epochs: int
    seed: int

    @property
    def taps(self) -> list[str]:
        """The student's taps, shallow to deep."""
        return [pair.student for pair in self.start.plan.pairs]

    def student(self) -> nn.Module:
        """The student as it is before training."""
        return copy.deepcopy(self.start.student)

    def distill(self, student: nn.Module, curriculum: Curriculum, epochs: int, **more: Any) -> None:
        """Train as all arms do."""
        ifx.distill(
            self.teacher.module, student, self.data.train, plan=self.start.plan, curriculum=curriculum, epochs=epochs,
            example_inputs=self.teacher.example_inputs[0], seed=self.seed, learning_rate=RATE, schedule="cosine",
            progress=False, device="cpu", **more,
        )  # fmt: skip

    def features(self, student: nn.Module) -> dict[str, Any]:
        """Of every pair: the relative loss on training and on test images, and CKA on test images."""
        x, plan = self.teacher.example_inputs[0], self.start.plan
        warm = Curriculum(together=True, lengths=1)
        stage = ifx.compile_stages(self.teacher.module, student, plan=plan, curriculum=warm, example_inputs=x)[0].eval()
        both = {"train": self.data.train_plain, "test": self.data.test}
        found: dict[str, Any] = {name: relative_losses(stage, batches) for name, batches in both.items()}
        traced = ifx.trace(student, x, role="student")
        student.train()  # `distill` leaves layers in eval mode that it finds so
        rows = cka(self.data.test, batches=None)(self.teacher, traced, [pair.teacher for pair in plan.pairs], self.taps)
        return found | {"cka": [rows[number][number] for number in range(len(rows))]}


def relative_losses(stage: ifx.Stage, batches: Iterable[Any]) -> list[float]:
    """Of every pair: squared error over the squared distance of the teacher's features from their mean, on all samples."""
    assert stage.teacher is not None
    sums: dict[str, list[float]] = {}
    with torch.no_grad():
        seen = [(stage.student(batch[0])[0], stage.teacher(batch[0])[0]) for batch in batches]
    for pair in stage.pairs:
        ours = torch.cat([features[pair.student] for features, _ in seen])
        theirs = torch.cat([features[pair.teacher] for _, features in seen])
        sums[pair.student] = [float((ours - theirs).square().sum()), float((theirs - theirs.mean(0)).square().sum())]
    return [error / whole for error, whole in sums.values()]


def joint(epochs: int, rate: float = RATE, **more: Any) -> Curriculum:
    """All pairs at once."""
    return Curriculum(together=True, lengths=epochs, learning_rate=rate, **more)


def watch(case: Case) -> dict[str, Any]:
    """The features before, between and after, with a warm-up of half of the epochs and without one."""
    half = case.epochs // 2
    student, alone, long = case.student(), case.student(), case.student()
    found = {"start": case.features(student)}
    case.distill(student, joint(half), 0)
    found["after the warm-up"] = case.features(student)
    case.distill(student, NONE, case.epochs - half)
    found["end"] = case.features(student)
    case.distill(alone, NONE, case.epochs)
    found["end, KD alone"] = case.features(alone)
    case.distill(long, joint(10 * half), 0)
    accuracies = [evaluate(model, case.data.test).accuracy for model in (student, alone)]
    return {"taps": case.taps, **found, "reach": case.features(long), "accuracy": accuracies}


def warmed(case: Case, curriculum: Curriculum, epochs: int) -> nn.Module:
    """A student after a warm-up and KD."""
    student = case.student()
    case.distill(student, curriculum, epochs)
    return student


def pair_by_pair(case: Case, *, deepest_first: bool = False, only: int | None = None) -> nn.Module:
    """One pair after another, each for as long, in half of the epochs; or one pair alone for all of these."""
    half, taps = case.epochs // 2, case.taps
    lengths = [half // len(taps)] * len(taps)
    if only is not None:
        lengths = [half if tap == taps[only] else 0 for tap in taps]
    order = taps[::-1] if deepest_first else None
    return warmed(case, Curriculum(layers=order, lengths=lengths, learning_rate=RATE), case.epochs - sum(lengths))


def projected(case: Case) -> nn.Module:
    """Hints through a trained projection to the teacher's full width (FitNets) in half of the epochs, instead of kept channels."""
    student, half = case.student(), case.epochs // 2
    case.distill(student, NONE, half, main="fitnet", main_options={"weight_labels": 0})
    case.distill(student, NONE, case.epochs - half)
    return student


def anchored(case: Case, weight: float, *, to: str) -> nn.Module:
    """KD after the warm-up, plus the distance of the features from a frozen copy of the student (`copy`), or from the teacher's."""
    student, half = case.student(), case.epochs // 2
    case.distill(student, joint(half), 0)
    x, plan = case.teacher.example_inputs[0], case.start.plan
    if to == "copy":
        frozen = copy.deepcopy(student)
        kept: list[tuple[str, str]] = [(tap, tap) for tap in case.taps]
        same = ifx.align(frozen, student, example_inputs=x, fixed=kept, pairs=len(kept))
        anchor = ifx.compile_stages(frozen, student, plan=same, curriculum=joint(1), example_inputs=x)[0]
    else:
        anchor = ifx.compile_stages(case.teacher.module, student, plan=plan, curriculum=joint(1), example_inputs=x)[0]
    main = ifx.compile_stages(case.teacher.module, student, plan=plan, curriculum=NONE, example_inputs=x)[-1]
    epochs = case.epochs - half
    optimizer = torch.optim.Adam(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    main.train()
    anchor.train()
    for epoch in range(epochs):
        case.data.train.set_epoch(epoch)
        for batch in case.data.train:
            loss = main(batch) + (weight * anchor(batch) if weight else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return student.eval()


def arms() -> dict[str, Callable[[Case], nn.Module]]:
    """One setting of the warm-up changed at a time; the base is `all pairs at once, half of the epochs`."""
    found: dict[str, Callable[[Case], nn.Module]] = {"KD alone": lambda case: warmed(case, NONE, case.epochs)}
    for part, name in ((8, "an eighth"), (4, "a quarter"), (2, "half")):
        found[f"all pairs at once, {name} of the epochs"] = lambda case, part=part: warmed(
            case, joint(case.epochs // part), case.epochs - case.epochs // part
        )
    found["all pairs at once, three quarters of the epochs"] = lambda case: warmed(
        case, joint(3 * case.epochs // 4), case.epochs - 3 * case.epochs // 4
    )
    for rate in (3e-4, 1e-3, 1e-2):
        found[f"learning rate {rate:g} instead of {RATE:g}"] = lambda case, rate=rate: warmed(
            case, joint(case.epochs // 2, rate), case.epochs - case.epochs // 2
        )
    found |= {
        "pair after pair, shallow to deep": pair_by_pair,
        "pair after pair, deep to shallow": lambda case: pair_by_pair(case, deepest_first=True),
        "the first pair alone": lambda case: pair_by_pair(case, only=0),
        "the last pair alone": lambda case: pair_by_pair(case, only=-1),
        "segments fed by the teacher": lambda case: warmed(
            case,
            Curriculum(feed="teacher", lengths=case.epochs // 2, learning_rate=RATE),
            case.epochs - case.epochs // 2,
        ),
        "a trained projection instead of kept channels": projected,
        "then KD in a loop of its own (control)": lambda case: anchored(case, 0.0, to="copy"),
        "then KD, anchored to a frozen copy, weight 1": lambda case: anchored(case, 1.0, to="copy"),
        "then KD, anchored to a frozen copy, weight 10": lambda case: anchored(case, 10.0, to="copy"),
        "then KD, the warm-up's loss kept, weight 1": lambda case: anchored(case, 1.0, to="teacher"),
        "then KD, the warm-up's loss kept, weight 10": lambda case: anchored(case, 10.0, to="teacher"),
    }
    return found


def run(options: argparse.Namespace) -> None:
    """All that is not measured yet, until the minutes are over."""
    torch.set_num_threads(1)
    out, end = Path(options.out), time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    file = out / "rows.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(row["place"], row["seed"], row["what"]) for row in map(json.loads, lines)}
    whole = open_data("digits", batch_size=BATCH)
    teacher = ifx.trace(teacher_of(out, whole), next(iter(whole.train_plain))[0][:2], role="teacher")
    for seed in options.seeds:
        for place in options.places:
            images, kind, epochs = PLACES[place]
            names = ["watch", *(name for name in arms() if not (kind == "other" and "fed by" in name))]
            left = [name for name in names if (place, seed, name) not in done]
            if not left:
                continue
            data = replace(open_data("digits", batch_size=BATCH, seed=seed, limit=images), test=whole.test)
            case = Case(teacher, start_of(Cell(images, kind, SHARE, epochs, seed), teacher, data), data, epochs, seed)
            for name in left:
                if time.monotonic() > end:
                    return
                row = {"place": place, "seed": seed, "what": name}
                row |= (
                    watch(case) if name == "watch" else {"accuracy": evaluate(arms()[name](case), whole.test).accuracy}
                )
                with file.open("a") as sink:
                    sink.write(json.dumps(row) + "\n")
                print(place, seed, name, row["accuracy"], flush=True)


def table(options: argparse.Namespace) -> None:
    """Both tables, as JSON and into the page."""
    rows = rows_in(options.out, "place", "seed", "what")
    text = "\n".join([*feature_lines(rows), "", *arm_lines(rows)]) + "\n"
    print(text)
    if options.json:
        facts = {
            "command": f"python benchmarks/why.py {' '.join(sys.argv[1:])}",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        kept = {
            **facts,
            "environment": environment("cpu", 1),
            "places": PLACES,
            "share": SHARE,
            "rate": RATE,
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(kept, indent=1) + "\n")
    if options.into:
        page = Path(options.into)
        begin, close = "<!-- made by benchmarks/why.py table -->", "<!-- why: end -->"
        put_between(page, begin, close, text)


def feature_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A row for every place and pair: losses and CKA at each time, means over the seeds."""
    lines = [
        "| place | pair | relative loss on test images: "
        + " | ".join([*TIMES, "reach"])
        + " | CKA: "
        + " | ".join(TIMES)
        + " |"
    ]
    lines.append("|" + "---|" * (2 + 2 * len(TIMES) + 1))
    for place in PLACES:
        own = [row for row in rows if row["place"] == place and row["what"] == "watch"]
        if not own:
            continue
        for number in range(len(own[0]["taps"])):
            losses = [f"{mean(row[when]['test'][number] for row in own):.3f}" for when in (*TIMES, "reach")]
            similar = [f"{mean(row[when]['cka'][number] for row in own):.3f}" for when in TIMES]
            lines.append(f"| {place} | {number + 1} of {len(own[0]['taps'])} | {' | '.join([*losses, *similar])} |")
    return lines


def arm_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A row for every arm: test accuracy in every place, means and deviations over the seeds."""
    lines = ["| warm-up | " + " | ".join(PLACES) + " |", "|" + "---|" * (1 + len(PLACES))]
    for name in arms():
        cells = []
        for place in PLACES:
            found = [100 * row["accuracy"] for row in rows if row["place"] == place and row["what"] == name]
            spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{mean(found):.1f}{spread}" if found else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(call=run)
    one.add_argument("--out", required=True)
    one.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    one.add_argument("--places", nargs="+", default=list(PLACES), choices=PLACES)
    one.add_argument("--minutes", type=float, default=1e6)
    one = commands.add_parser("table")
    one.set_defaults(call=table)
    one.add_argument("out", nargs="+")
    one.add_argument("--json")
    one.add_argument("--into")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
