"""Does `compress` pay? Networks for CIFAR-10 cut to a share of their work, arm by arm, all for the same number of epochs.

    python benchmarks/compress.py run --net resnet56 --macs 0.476 0.4 --data imagefolder:DIR --reference DIR --out OUT \
        --arms joint tp kd --epochs 20 --batch-size 256 --optimizer sgd --lr 0.05 --weight-decay 5e-4 --minutes 5
    python benchmarks/compress.py run --net assistant --macs 0.35 --limit 5000 --seeds 0 1 2 --data imagefolder:DIR --out OUT --device cpu
    python benchmarks/compress.py repair --net resnet20 resnet56 assistant --macs 0.5 --data … --out OUT     before any training
    python benchmarks/compress.py table [EARLIER.json …] OUT [OUT …] --json benchmarks/results/compress.json --into docs/compress.md

Arms, most telling first: `joint` (what `compress` does: sensitivities, repair, all pairs at once, KD); `kept` (the same, and the
warm-up's loss stays in the main stage with weight --keep-features); `fed` (the same, but segments fed
by the teacher) and `steps` (pair after pair); `kd` (the same student, KD alone); `unlabelled` (joint, with the teacher's answers
alone); `tp` (Torch-Pruning 1.6, uniform L1 to the same work, then labels; without that package our own uniform L1); `l1kd` (that one,
by KD); `freshjoint`, `freshkd` and `fresh` (our student's shape from new weights: joint, by KD, by labels). Arms that are done are skipped,
interrupted ones go on; every arm's result is written at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from compress_table import ARMS, table
from resnet_cifar import resnet20, resnet56
from safetensors.torch import load_file
from torch import nn

import indistill_fx as ifx
from indistill_fx.compression.allocate import Budget
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.make_student import Measure, calibration, make_student
from indistill_fx.compression.write_source import source_of
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import evaluate

NO_WARMUP = Curriculum(lengths=[])


def teacher_of(options: argparse.Namespace, net: str) -> nn.Module:
    """The published network, or the paper's assistant as benchmarks/claim.py trained it on labels."""
    if net != "assistant":
        file = Path(options.reference) / f"cifar10_{net}.safetensors"
        return {"resnet20": resnet20, "resnet56": resnet56}[net](str(file)).eval()
    spec = importlib.util.spec_from_file_location(
        "paper", Path(__file__).parent.parent / "examples" / "paper_cifar10.py"
    )
    assert spec is not None and spec.loader is not None
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    model: nn.Module = paper.Cnn32()
    model.load_state_dict(load_file(options.assistant))
    return model.eval()


def device_of(options: argparse.Namespace) -> torch.device:
    """Where it runs."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(found if options.device == "auto" else options.device)


def traced_teacher(options: argparse.Namespace, net: str) -> ifx.TracedModel:
    """The teacher on its device, traced."""
    device = device_of(options)
    return ifx.trace(teacher_of(options, net).to(device), (torch.randn(2, 3, 32, 32, device=device),), role="teacher")


def uniform(teacher: ifx.TracedModel, macs: float) -> tuple[nn.Module, str]:
    """The same share of every layer gone, by L1: by Torch-Pruning where it is installed, else by our own shrink."""
    try:
        import torch_pruning as tp
    except ImportError:
        low, high = 0.05, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            share = ifx.shrink(teacher, ratio=middle).report
            low, high = (middle, high) if share.macs[1] <= macs * share.macs[0] else (low, middle)
        small = ifx.shrink(teacher, ratio=low).value.graph_module
        return small.requires_grad_(), "our uniform L1"
    import copy

    example, low, high = teacher.example_inputs[0][:1], 0.0, 0.95
    best: nn.Module | None = None
    whole, _ = tp.utils.count_ops_and_params(copy.deepcopy(teacher.module), example)
    for _ in range(12):
        middle = (low + high) / 2
        model = copy.deepcopy(teacher.module).eval()
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.MagnitudePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=middle,
            ignored_layers=[last],
        )
        pruner.step()
        ops, _ = tp.utils.count_ops_and_params(model, example)
        if ops <= macs * whole:
            best, high = model, middle
        else:
            low = middle
    assert best is not None
    return best, f"Torch-Pruning {version('torch-pruning')}, uniform L1"


def made_of(teacher: ifx.TracedModel, macs: float, data: Data, options: argparse.Namespace) -> tuple[Any, Any]:
    """Our student before training."""
    batches = calibration(data.train, options.samples)
    made = make_student(teacher, Budget(macs=macs), Measure(batches, lambda m: evaluate(m, data.test), say=print))
    return made, source_of(made.model)


def train_arm(
    arm: str,
    teacher: ifx.TracedModel,
    macs: float,
    data: Data,
    seed: int,
    options: argparse.Namespace,
    where: Path,
    make: Callable[[], tuple[Any, Any]],
) -> dict[str, Any]:
    """One arm; its row of the table. `make` gives our student, which all arms of a seed share, as it is before training."""
    began, resumed = time.time(), (where / "run").exists()
    settings: dict[str, Any] = {
        "val_loader": data.test, "progress": False, "seed": seed, "run_dir": where / "run", "resume": True,
        "optimizer": options.optimizer, "learning_rate": options.lr, "weight_decay": options.weight_decay,
        "schedule": "cosine", "device": options.device, "compile": options.compile, "mixed_precision": options.precision,
        **options.also,
    }  # fmt: skip
    epochs, warm = options.epochs, min(options.warmup, options.epochs - 1)
    how, steps = "", []
    if arm in ("tp", "l1kd"):
        student, how = uniform(teacher, macs)
    else:
        made, source = make()
        student, steps = source.build().to(device_of(options)), [asdict(step) for step in made.steps]
        torch.manual_seed(seed)
        if arm.startswith("fresh"):
            for part in student.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
    before = evaluate(student, data.test).accuracy
    parameters = sum(p.numel() for p in student.parameters())
    if arm in ("tp", "fresh"):
        record = ifx.train(student, data.train, epochs=epochs, **settings)
    elif arm in ("l1kd", "freshkd"):
        traced = ifx.trace(student, teacher.example_inputs, role="student")
        record = ifx.distill(teacher, traced, data.train, curriculum=NO_WARMUP, epochs=epochs, **settings)
    else:
        traced = ifx.trace(student, teacher.example_inputs, role="student")
        plan = plan_of(teacher, traced, made.shrunk.axes, every_block=arm != "steps")
        rate = options.lr if options.optimizer == "adam" else 1e-3
        curriculum, main = Curriculum(together=True, lengths=warm, learning_rate=rate), epochs - warm
        if arm == "kept":
            curriculum = replace(curriculum, keep_features=options.keep_features)
        if arm == "fed":
            curriculum = Curriculum(feed="teacher", lengths=warm, learning_rate=rate)
        if arm == "steps":
            lengths = [*range(1, len(plan.pairs) + 1)]
            lengths = lengths if sum(lengths) < epochs else [1] * len(lengths)
            how = f"warm-up {'-'.join(map(str, lengths))}"
            curriculum, main = Curriculum(lengths=lengths, learning_rate=rate), epochs - sum(lengths)
        if arm == "kd":
            curriculum, main = NO_WARMUP, epochs
        weights = {"weight_labels": 0.0} if arm == "unlabelled" else options.main_option
        loss = {"main": options.main, "main_options": weights}
        record = ifx.distill(
            teacher, traced, data.train, plan=plan, curriculum=curriculum, epochs=main, **loss, **settings
        )
    return {
        "arm": arm, "how": how, "parameters": parameters, "before": before, "accuracy": record.accuracy, "best": record.best_accuracy,
        "average": record.average and record.average["accuracy"],
        "by epoch": [epoch.accuracy for epoch in record.epochs], "seconds": round(time.time() - began, 1),
        "training seconds": round(record.seconds, 1), "resumed": resumed, "steps": steps,
    }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """All arms that are not done yet, until the minutes are over."""
    if options.threads:
        torch.set_num_threads(options.threads)
    began, longest = time.time(), 0.0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        data = open_data(
            options.data, batch_size=options.batch_size, seed=seed, limit=options.limit, cache=options.cache
        )
        if options.limit:  # all test images
            data = with_test(data, open_data(options.data, batch_size=500, cache=options.cache))
        for net in options.net:
            teacher = traced_teacher(options, net)
            accuracy = evaluate(teacher.module, data.test).accuracy
            for macs in options.macs:
                make = cache(partial(made_of, teacher, macs, data, options))
                for arm in options.arms:
                    how = f"{options.limit or 'all'}-{options.epochs}-{options.optimizer}-{options.lr:g}"
                    warm = f"-{options.warmup}" if arm in ("joint", "kept", "fed", "unlabelled") else ""
                    also = "".join(f"-{key}{value:g}" for key, value in options.also.items())
                    also += f"-decay{options.weight_decay:g}" if options.weight_decay else ""
                    also += f"-batch{options.batch_size}" if options.batch_size != 128 else ""
                    also += f"-{options.main}" if options.main != "kd" else ""
                    also += "".join(f"-{key}{value:g}" for key, value in options.main_option.items())
                    also += f"-{options.precision}" if options.precision not in (None, "no") else ""
                    name = f"{net}-{macs:g}-{how}-{seed}-{arm}{warm}{also}"
                    if (out / f"{name}.json").exists():
                        continue
                    if options.minutes and time.time() - began + longest > 60 * options.minutes:
                        print(f"{name}: no time left")
                        continue
                    start = time.time()
                    row = train_arm(arm, teacher, macs, data, seed, options, out / name, make)
                    longest = max(longest, time.time() - start)
                    row |= {
                        "net": net,
                        "macs": macs,
                        "images": options.limit or 50_000,
                        "seed": seed,
                        "teacher": accuracy,
                    }
                    row |= {"epochs": options.epochs, "warmup": options.warmup, "batch": options.batch_size}
                    row |= {"keep": options.keep_features if arm == "kept" else 0.0}
                    row |= {
                        "optimizer": options.optimizer,
                        "lr": options.lr,
                        "weight_decay": options.weight_decay,
                        "precision": options.precision or "no",
                        "main": options.main,
                        "main_options": options.main_option,
                        "also": options.also,
                        **told(),
                    }
                    (out / f"{name}.json").write_text(json.dumps(row, indent=1))
                    print(
                        f"{name}: before {row['before']:.2%}, {row['accuracy']:.2%}, {row['seconds']:.0f} s", flush=True
                    )


def with_test(data: Data, other: Data) -> Data:
    """The training data of the one, the test data of the other."""
    return replace(data, test=other.test)


def told() -> dict[str, Any]:
    """Where and when."""
    found = {}
    for name in ("torch", "indistill-fx", "torch-pruning"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"versions": found, "device": device, "date": datetime.now(UTC).isoformat(timespec="seconds")}


def repairs(options: argparse.Namespace) -> None:
    """Accuracy before any training: after shrinking, with norms re-estimated, with readers fitted; by uniform L1 and by our widths."""
    if options.threads:
        torch.set_num_threads(options.threads)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    data = open_data(options.data, batch_size=128, cache=options.cache)
    rows = []
    for net in options.net:
        teacher = traced_teacher(options, net)
        for macs in options.macs:
            small, how = uniform(teacher, macs)
            made, _ = made_of(teacher, macs, data, options)
            rows.append(
                {
                    "net": net,
                    "macs": macs,
                    "uniform": evaluate(small, data.test).accuracy,
                    "uniform by": how,
                    "steps": [asdict(step) for step in made.steps],
                    "samples": options.samples,
                    **told(),
                }
            )
            (out / "repair.json").write_text(json.dumps(rows, indent=1))


def setting(text: str) -> tuple[str, float]:
    """`mixup=0.4` as its name and its number."""
    name, _, number = text.partition("=")
    return name, float(number)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("run", run), ("repair", repairs)):
        one = commands.add_parser(name)
        one.set_defaults(call=function)
        one.add_argument("--net", nargs="+", default=["resnet20"], choices=["resnet20", "resnet56", "assistant"])
        one.add_argument("--macs", nargs="+", type=float, default=[0.5])
        one.add_argument("--data", required=True)
        one.add_argument("--reference", default="../shared/reference")
        one.add_argument("--assistant", default=Path(__file__).parent / "results" / "claim_teacher.safetensors")
        one.add_argument("--cache")
        one.add_argument("--out", required=True)
        one.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
        one.add_argument("--seeds", nargs="+", type=int, default=[0])
        one.add_argument("--limit", type=int)
        one.add_argument("--samples", type=int, default=512)
        one.add_argument("--epochs", type=int, default=20)
        one.add_argument("--warmup", type=int, default=6)
        one.add_argument("--keep-features", type=float, default=10.0)
        one.add_argument("--batch-size", type=int, default=128)
        one.add_argument("--optimizer", default="adam")
        one.add_argument("--lr", type=float, default=1e-3)
        one.add_argument("--weight-decay", type=float, default=0.0)
        one.add_argument("--also", nargs="+", type=setting, default=[], metavar="NAME=NUMBER", help="further settings")
        one.add_argument("--main", default="kd", help="main loss of the arms that have our plan")
        one.add_argument("--main-option", nargs="+", type=setting, default=[], metavar="NAME=NUMBER", help="of --main")
        one.add_argument("--device", default="auto")
        one.add_argument("--compile", action="store_true")
        one.add_argument("--precision", choices=["no", "bf16", "fp16"])
        one.add_argument("--threads", type=int)
        one.add_argument("--minutes", type=float)
    one = commands.add_parser("table")
    one.set_defaults(call=table)
    one.add_argument("out", nargs="+")
    one.add_argument("--json")
    one.add_argument("--into")
    options = parser.parse_args()
    options.also, options.main_option = dict(getattr(options, "also", [])), dict(getattr(options, "main_option", []))
    options.call(options)


if __name__ == "__main__":
    main()
