"""The paper's claim: does the warm-up help every loss? Its pair on lossless CIFAR-10, five losses, each without and with it.

    python benchmarks/claim.py run --data imagefolder:DIR --assistant FILE --out OUT --epochs 33 70 --seeds 0 1 2
    python benchmarks/claim.py table benchmarks/results/claim.json OUT --json benchmarks/results/claim.json --into docs/results.md

Every loss gets the same number of epochs in all: N without the warm-up, or the paper's 3, 4 and 5 epochs for its three pairs and then
N - 12. Both start from the same weights and see the same batches. The teacher of `pkt` is the authors' assistant; that of the other
losses is the same network, trained here on labels for 24 epochs, once: `--teacher benchmarks/results/claim_teacher.safetensors` is the
one of the table in docs/results.md. `crd` draws 4,096 negatives. `pkt` trains no classifier, so that it
is measured by retrieval alone: mAP by cosine, every fifth test image as a query, all training images as the database. Arms that are
done are skipped, interrupted ones go on; the order is by length, then by seed.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cifar10 import cell, one, paper
from page import put_between
from safetensors.torch import load_file, save_file
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data

LOSSES = ("kd", "dkd", "pkt", "crd", "reviewkd")
NEGATIVES = 4096
"""Of `crd`: a quarter of its default, for speed."""
WARMUP = (3, 4, 5)
_QUERIES = 2000


def arm_of(loss: str, epochs: int, *, warm: bool) -> str:
    """The arm as `benchmarks/cifar10.py` writes it."""
    return f"{loss}:{'-'.join(map(str, WARMUP))}+{epochs - sum(WARMUP)}" if warm else f"{loss}:0+{epochs}"


def teachers_of(example: Any, options: argparse.Namespace, data: Data) -> dict[str, nn.Module]:
    """The authors' assistant for `pkt`; for the others the one that is trained here, once. Both are measured, once."""
    out = Path(options.out)
    on_labels = example.Cnn32()
    file = Path(options.teacher or out / "teacher.safetensors")
    if not file.exists():
        torch.manual_seed(0)
        on_labels = example.Cnn32()
        ifx.train(
            on_labels, data.train, epochs=24, schedule="cosine", val_loader=data.test, progress=False, seed=0,
            run_dir=out / "teacher", resume=True, device="cpu",
        )  # fmt: skip
        save_file({name: value.contiguous() for name, value in on_labels.state_dict().items()}, file)
    on_labels.load_state_dict(load_file(file))
    teachers = {"kd": on_labels, "pkt": example.make_teacher(options.assistant)}
    for name, teacher in teachers.items():
        target = out / f"teacher-{name}.json"
        if not target.exists():
            target.write_text(json.dumps(example.measure(teacher, data, queries=_QUERIES)))
    return teachers


def run(options: argparse.Namespace) -> None:
    """Every arm that is not done yet, until the minutes are over."""
    torch.set_num_threads(options.threads)
    began, out, example = time.time(), Path(options.out), paper()
    out.mkdir(parents=True, exist_ok=True)
    for epochs in options.epochs:
        for seed in options.seeds:
            data = open_data(options.data, batch_size=128, seed=seed, cache=options.cache)
            teachers = teachers_of(example, options, data)
            for loss in options.losses:
                for warm in (False, True):
                    arm = arm_of(loss, epochs, warm=warm)
                    target = out / f"{arm.replace(':', '_')}_{seed}.json"
                    if target.exists() or (options.minutes and time.time() - began > 60 * options.minutes):
                        continue
                    extra = {"negatives": NEGATIVES} if loss == "crd" else None
                    figures = one(example, arm, seed, data, teachers, out / target.stem, main_options=extra)
                    figures |= {"loss": loss, "epochs": epochs, "warm": warm, "seed": seed}
                    figures["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                    target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
                    print(f"{target.stem}: {figures['accuracy']:.2%}, mAP {figures['map_cosine']:.2%}", flush=True)


def found_in(places: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """All arms, each once, and both teachers: of folders that `run` wrote, and of files that `table` wrote."""
    arms: dict[tuple[Any, ...], dict[str, Any]] = {}
    teachers: dict[str, Any] = {}
    for place in map(Path, places):
        if place.is_dir():
            rows = [json.loads(file.read_text()) for file in sorted(place.glob("*+*.json"))]
            teachers |= {name: json.loads((place / f"teacher-{name}.json").read_text()) for name in ("kd", "pkt")}
        else:
            kept = json.loads(place.read_text())
            rows, teachers = kept["arms"], teachers | kept["teachers"]
        arms |= {(row["epochs"], row["loss"], row["seed"], row["warm"]): row for row in rows}
    return [arms[key] for key in sorted(arms)], teachers


def table(options: argparse.Namespace) -> None:
    """Both tables: what each loss reaches, and its paired differences."""
    rows, teachers = found_in(options.out)
    lines = [
        f"Teachers: {100 * teachers['kd']['accuracy']:.2f}% ({100 * teachers['kd']['map_cosine']:.1f} mAP), trained on labels; "
        f"of `pkt`: {100 * teachers['pkt']['map_cosine']:.1f} mAP.",
        "",
        "| loss | epochs in all | measure | without warm-up | with 3-4-5 | difference | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for epochs in sorted({row["epochs"] for row in rows}):
        for loss in LOSSES:
            found = {
                warm: {r["seed"]: r for r in rows if (r["loss"], r["epochs"], r["warm"]) == (loss, epochs, warm)}
                for warm in (False, True)
            }
            seeds = sorted(found[False].keys() & found[True].keys())
            for key, name in (("accuracy", "accuracy"), ("map_cosine", "mAP")):
                if seeds and not (loss == "pkt" and key == "accuracy"):
                    without, with_it = ([found[warm][seed][key] for seed in seeds] for warm in (False, True))
                    change = [b - a for a, b in zip(without, with_it, strict=True)]
                    spread = f" ± {100 * stdev(change):.2f}" if len(change) > 1 else ""
                    cells = f"{cell(without)} | {cell(with_it)} | {100 * mean(change):+.2f}{spread}"
                    lines.append(f"| {loss} | {epochs} | {name} | {cells} | {len(seeds)} |")
    text = "\n".join(lines)
    if options.json:
        names = ("torch", "torchvision", "indistill-fx")
        told = {
            "command": "python " + " ".join(__doc__.split("python ")[1].split()),
            "versions": {n: version(n) for n in names},
        }
        Path(options.json).write_text(json.dumps(told | {"teachers": teachers, "arms": rows}, indent=1) + "\n")
    if options.into is None:
        print(text)
        return
    begin, end = "<!-- claim: made by benchmarks/claim.py table -->", "<!-- claim: end -->"
    put_between(options.into, begin, end, text)


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one_run = commands.add_parser("run", help="train and measure arms")
    one_run.set_defaults(call=run)
    one_run.add_argument("--data", required=True)
    one_run.add_argument("--cache", help="keep decoded images here")
    one_run.add_argument("--assistant", required=True, help="the authors' state dict of Cnn32")
    one_run.add_argument(
        "--teacher", help="weights of the Cnn32 that was trained on labels; by default it is trained, and kept in OUT"
    )
    one_run.add_argument("--out", required=True)
    one_run.add_argument("--epochs", type=int, nargs="+", default=[33, 70], help="in all")
    one_run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one_run.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    one_run.add_argument("--threads", type=int, default=1)
    one_run.add_argument("--minutes", type=float, help="begin no arm later than this")
    shows = commands.add_parser("table", help="the table of what is done")
    shows.set_defaults(call=table)
    shows.add_argument("out", nargs="+", help="folders that `run` wrote, and files that `table` wrote")
    shows.add_argument("--json", help="write all figures here")
    shows.add_argument("--into", type=Path, help="the page whose table is replaced, instead of printing")
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
