"""The usual comparison on CIFAR-100: KD, KD with standardised logits and DKD, each without and with the warm-up, pair by pair.

    python benchmarks/cifar100.py run --data imagefolder:DIR --out OUT                      a GPU: the usual protocol, 240 epochs
    python benchmarks/cifar100.py run --data imagefolder:DIR --out OUT --protocol short \
        --pairs resnet56:resnet20 resnet56:mobilenetv2 --seeds 0 --threads 1                       a CPU
    python benchmarks/cifar100.py table benchmarks/results/cifar100.json OUT --json benchmarks/results/cifar100.json --into docs/results.md

The data are the originals as a folder of images (`train/<class>/`, `test/<class>/`). A pair is `teacher:student`, of
`cifar100_nets.py`. Teachers are trained on labels by `train`, once, or read from `--teachers DIR` (DIR/NAME.safetensors). The
usual protocol is RepDistiller's and mdistiller's: 240 epochs of SGD with batches of 64, a learning rate of 0.05 (0.01 for MobileNetV2 and
ShuffleNetV2), a tenth of it from epochs 150, 180 and 210, momentum 0.9, weight decay 5e-4. The short one takes 10 epochs (teachers
15), batches of 128, twice the learning rate, a cosine instead of the steps, and bfloat16. An arm `kd+warm-up` trains all pairs at
once first, for a third of the epochs (at most 12), by Adam at 1e-3; the main stage has the rest, so that all arms of a pair have
equal epochs. All start from the same weights. Accuracy is that of the last epoch. Arms that are done are skipped, interrupted ones go on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import cifar100_nets
import torch
from page import put_between
from safetensors.torch import load_file, save_file
from torch import nn

import indistill_fx as ifx
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data

PAIRS = ("resnet32x4:resnet8x4", "vgg13:vgg8", "resnet56:resnet20", "resnet32x4:shufflenetv2", "vgg13:mobilenetv2")
STANDARDIZED: Mapping[str, float | bool] = {
    "standardize": True,
    "temperature": 2.0,
    "weight": 9.0,
    "weight_labels": 0.1,
}
LOSSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "labels": ("labels", {}),
    "kd": ("kd", {}),
    "kd, standardised": ("kd", STANDARDIZED),
    "dkd": ("dkd", {}),
}
"""By name: the main loss and its options."""
BETA: Mapping[str, float] = {"resnet56:resnet20": 2.0, "vgg13:vgg8": 6.0, "vgg13:mobilenetv2": 6.0}
"""Of DKD, by pair, as its authors chose it; 8 for all others."""
SLOW = ("mobilenetv2", "shufflenetv2")
"""Networks that are trained with a fifth of the learning rate."""


@dataclass(frozen=True)
class Protocol:
    """How long and how everything is trained."""

    epochs: int
    teacher_epochs: Sequence[int]
    batch: int
    settings: Mapping[str, Any]

    def of(self, net: str, epochs: int) -> dict[str, Any]:
        """The settings of a main stage of so many epochs."""
        settings = dict(self.settings)
        if net in SLOW:
            settings["learning_rate"] /= 5
        if settings["schedule"] == "step":
            settings["milestones"] = [at - (self.epochs - epochs) for at in (150, 180, 210)]
        return settings


_SGD = {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "progress": False, "resume": True}
PROTOCOLS = {
    "usual": Protocol(240, (240,), 64, {**_SGD, "learning_rate": 0.05, "schedule": "step"}),
    "short": Protocol(
        10,
        (15,),
        128,
        {**_SGD, "learning_rate": 0.1, "schedule": "cosine", "rise_steps": 200, "mixed_precision": "bf16"},
    ),
}


def net_of(name: str, seed: int, device: str) -> nn.Module:
    """A network with the seed's own weights; on a CPU its convolutions are faster with channels last."""
    torch.manual_seed(seed)
    model: nn.Module = getattr(cifar100_nets, name)()
    return model.to(memory_format=torch.channels_last) if device == "cpu" else model


def teacher_of(name: str, data: Data, protocol: Protocol, options: argparse.Namespace) -> tuple[nn.Module, float]:
    """Trained on labels, once, in as many cycles as the protocol has (Loshchilov and Hutter, SGDR, ICLR 2017); and its accuracy."""
    model, out = net_of(name, 0, options.device), Path(options.out)
    file = Path(options.teachers or options.out) / f"{name}.safetensors"
    if not file.exists():
        for cycle, epochs in enumerate(protocol.teacher_epochs):
            ifx.train(
                model, data.train, epochs=epochs, val_loader=data.test, seed=cycle, device=options.device,
                run_dir=out / (f"{name}-{cycle}" if cycle else name), compile=options.compile, **protocol.of(name, epochs),
            )  # fmt: skip
        save_file({key: value.contiguous() for key, value in model.cpu().state_dict().items()}, file)
    model.load_state_dict(load_file(file))
    model.to(options.device)
    return model.eval(), ifx.evaluate(model, data.test).accuracy


def train_arm(
    pair: str, arm: str, seed: int, teacher: nn.Module, data: Data, protocol: Protocol, options: argparse.Namespace
) -> dict[str, Any]:
    """One arm's figures."""
    loss, _, warm = arm.partition("+")
    main, extra = LOSSES[loss]
    if loss == "dkd":
        extra = {"beta": BETA.get(pair, 8.0)}
    length = min(12, protocol.epochs // 3) if warm else 0
    student_name = pair.split(":")[1]
    student = net_of(student_name, seed, options.device)
    began, file = time.time(), f"{pair.replace(':', '-')}_{arm}_{seed}".replace(", ", "-")
    record = ifx.distill(
        teacher, student, data.train, main=main, main_options=dict(extra), epochs=protocol.epochs - length,
        curriculum=ifx.Curriculum(together=True, lengths=length) if warm else ifx.Curriculum(lengths=[]),
        val_loader=data.test, seed=seed, run_dir=Path(options.out) / file, device=options.device,
        compile=options.compile, **protocol.of(student_name, protocol.epochs - length),
    )  # fmt: skip
    return {
        "accuracy": record.accuracy, "best": record.best_accuracy, "by epoch": [epoch.accuracy for epoch in record.epochs],
        "warm-up epochs": length, "main options": extra, "training seconds": round(record.seconds, 1),
        "wall seconds": round(time.time() - began, 1),
    }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Every arm that is not done yet, until the minutes are over."""
    if options.threads:
        torch.set_num_threads(options.threads)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    began, protocol, out = time.time(), PROTOCOLS[options.protocol], Path(options.out)
    if options.epochs:
        protocol = replace(protocol, epochs=options.epochs, teacher_epochs=(options.epochs,))
    if options.teacher_epochs:
        protocol = replace(protocol, teacher_epochs=options.teacher_epochs)
    out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        data = open_data(
            options.data, batch_size=protocol.batch, seed=seed, mean="cifar100", cache=options.cache, workers=options.workers
        )  # fmt: skip
        for pair in options.pairs:
            name = pair.split(":")[0]
            teacher, accuracy = teacher_of(name, data, protocol, options)
            print(f"{name}: {accuracy:.2%}", flush=True)
            for arm in options.arms:
                target = out / f"{pair.replace(':', '-')}_{arm}_{seed}.json".replace(", ", "-")
                if target.exists() or (options.minutes and time.time() - began > 60 * options.minutes):
                    continue
                figures = train_arm(pair, arm, seed, teacher, data, protocol, options)
                figures = {"pair": pair, "arm": arm, "seed": seed, "teacher": accuracy, **figures}
                figures |= {"protocol": options.protocol, "epochs": protocol.epochs, "device": options.device}
                figures |= {"teacher epochs": list(protocol.teacher_epochs), "compile": options.compile}
                figures |= {"torch": torch.__version__, "date": datetime.now(UTC).isoformat(timespec="seconds")}
                target.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
                print(f"{target.stem}: {figures['accuracy']:.2%}, {figures['wall seconds']:.0f} s", flush=True)


def found_in(places: list[str]) -> list[dict[str, Any]]:
    """All arms, each once: of folders that `run` wrote, and of files that `table` wrote."""
    arms: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place in map(Path, places):
        rows = (
            [json.loads(file.read_text()) for file in sorted(place.glob("*_*_*.json"))]
            if place.is_dir()
            else json.loads(place.read_text())["arms"]
        )
        arms |= {(row["protocol"], row["epochs"], row["pair"], row["arm"], row["seed"]): row for row in rows}
    return [arms[key] for key in sorted(arms)]


def table(options: argparse.Namespace) -> None:
    """Per pair: every loss without and with the warm-up, and the paired difference."""
    rows = found_in(options.out)
    lines = [
        "| teacher → student | epochs | loss | without warm-up | with it | difference | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for key in sorted({(row["protocol"], row["pair"], row["epochs"], row["teacher"]) for row in rows}):
        chosen = [row for row in rows if (row["protocol"], row["pair"], row["epochs"], row["teacher"]) == key]
        head = f"{key[1].replace(':', ' → ')} ({100 * chosen[0]['teacher']:.2f}) | {chosen[0]['epochs']}"
        for loss in LOSSES:
            without, with_it = (
                {row["seed"]: 100 * row["accuracy"] for row in chosen if row["arm"] == arm}
                for arm in (loss, f"{loss}+warm-up")
            )
            both = sorted(without.keys() & with_it.keys())
            if without or with_it:
                change = cell([with_it[seed] - without[seed] for seed in both], sign="+")
                cells = f"{cell([*without.values()])} | {cell([*with_it.values()])} | {change}"
                lines.append(f"| {head} | {loss} | {cells} | {max(len(without), len(with_it))} |")
    text = "\n".join(lines)
    if options.json:
        told = {
            "commands": [
                f"python benchmarks/cifar100.py run --data imagefolder:DIR --out OUT --protocol {protocol}"
                for protocol in sorted({row["protocol"] for row in rows})
            ],
            "versions": {name: version(name) for name in ("torch", "torchvision", "indistill-fx")},
        }
        Path(options.json).write_text(json.dumps(told | {"arms": rows}, indent=1) + "\n")
    if options.into is None:
        print(text)
        return
    begin, end = "<!-- cifar100: made by benchmarks/cifar100.py table -->", "<!-- cifar100: end -->"
    put_between(options.into, begin, end, text)


def cell(values: list[float], sign: str = "") -> str:
    """Mean ± standard deviation, or a dash."""
    if not values:
        return "–"
    return f"{mean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def main() -> None:
    """Run or show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    arms = [name for loss in LOSSES for name in ((loss,) if loss == "labels" else (loss, f"{loss}+warm-up"))]
    one_run = commands.add_parser("run", help="train and measure arms")
    one_run.set_defaults(call=run)
    one_run.add_argument("--data", required=True)
    one_run.add_argument("--cache", help="keep decoded images here")
    one_run.add_argument("--out", required=True)
    one_run.add_argument("--protocol", choices=PROTOCOLS, default="usual")
    one_run.add_argument(
        "--epochs", type=int, help="of teachers and students, instead of the protocol's (`short` only)"
    )
    one_run.add_argument(
        "--teacher-epochs", type=int, nargs="+", metavar="EPOCHS",
        help="of teachers alone (`short` only); several are cycles, each from the full learning rate down to 0",
    )  # fmt: skip
    one_run.add_argument("--compile", action="store_true", help="train with torch.compile")
    one_run.add_argument("--pairs", nargs="+", default=PAIRS, metavar="TEACHER:STUDENT")
    one_run.add_argument("--arms", nargs="+", choices=arms, default=arms)
    one_run.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one_run.add_argument("--teachers", help="a folder of trained teachers")
    one_run.add_argument("--threads", type=int)
    one_run.add_argument("--workers", type=int, default=0)
    one_run.add_argument("--minutes", type=float, help="begin no arm later than this")
    shows = commands.add_parser("table", help="the table of what is done")
    shows.set_defaults(call=table)
    shows.add_argument("out", nargs="+", help="folders that `run` wrote, and files that `table` wrote")
    shows.add_argument("--json", help="write all figures here")
    shows.add_argument("--into", type=Path, help="the page whose table is replaced, instead of printing")
    options = parser.parse_args()
    chosen = getattr(options, "epochs", None) or getattr(options, "teacher_epochs", None)
    if chosen and options.protocol == "usual":
        parser.error("the usual protocol has 240 epochs: --epochs and --teacher-epochs go with --protocol short")
    options.call(options)


if __name__ == "__main__":
    main()
