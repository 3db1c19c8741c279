"""Does the alignment find the layers that people pair, and what does it cost?

    python benchmarks/alignment.py cases --json FILE       human pairings; --cases FOLDER says where they are
    python benchmarks/alignment.py pairings --json FILE    our own pairings (pairings.py)
    python benchmarks/alignment.py stages --json FILE      stage ends against timm's own feature lists
    python benchmarks/alignment.py identity --json FILE    30 models of the zoo, each with itself
    python benchmarks/alignment.py speed --json FILE       ResNet-152 → ResNet-50, and growth from 100 to 10,000 nodes
    python benchmarks/alignment.py table FILE              the results as Markdown

The results kept are in benchmarks/results/alignment.json. `--only A,B` does a part; its results are added to those in the file.

The human pairings are read from distillation configs and scored by tensor identity (see alignment_score.py beside them): names have no
part in it, neither ours nor theirs. Where the folder is absent the command says so and ends well.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import zoo

from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import match
from indistill_fx.passes.structure.stages import stages
from indistill_fx.traced import TracedModel

CASES = next(
    (p for up in Path(__file__).parents if (p := up / "shared" / "benchmarks").exists()), Path("shared/benchmarks")
)
TAPS = {"pre_activation": "pre-activation", "last_conv": "last-conv"}
"""Kind of a case -> which tensor of a block it is about; all others are about block outputs."""

_ONE_OF_EACH = (
    "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "densenet169", "googlenet", "inception_v3", "vgg11",
    "vgg13_bn", "alexnet", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5",
    "mnasnet1_0", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s", "regnet_x_400mf",
    "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16", "maxvit_t",
)  # fmt: skip


def cases(folder: Path, only: str, *, own: bool = False) -> dict[str, Any]:
    """Score the alignment on the human pairings of the folder, or on our own (pairings.py)."""
    if not (folder / "alignment_score.py").exists():
        print(f"skipped: there are no human pairings in {folder}; give --cases FOLDER")
        return {}
    sys.path.insert(0, str(folder))
    score = importlib.import_module("alignment_score").score
    results: dict[str, Any] = {}
    print(
        f"{'case':42s}{'places':>7s}{'pairs':>6s}{'exact':>7s}{'site':>6s}{'shape':>7s}  contradictions, seconds to align"
    )
    for module in ["pairings"] if own else [file.stem for file in sorted(folder.glob("alignment_*.py"))]:
        for case in getattr(importlib.import_module(module), "CASES", ()):
            if any(text in case.id for text in only.split(",")) and case.available():
                try:
                    results[case.id] = row = _case(case, score)
                except Exception as error:  # counts as nothing found; one case must not end the sweep
                    results[case.id] = row = _failed(case, error)
                cells = "".join(f"{100 * row[name]:7.0f}" for name in ("recall_exact", "recall_site", "recall_shape"))
                print(
                    f"{case.id:42s}{row['n_truth']:7d}{row['n_pred']:6d}{cells}  {row['contradictions']}, {row['seconds']:.2f}"
                    f" {row.get('error', '')}",
                    flush=True,
                )
                gc.collect()
    print("all:", summary(results))
    return results


def _case(case: Any, score: Callable[..., dict[str, float]]) -> dict[str, Any]:
    built = case.build()
    models = {which: trace(module, built[2]) for which, module in zip(("teacher", "student"), built, strict=False)}
    start = time.perf_counter()
    found = match(models["teacher"], models["student"], taps=TAPS.get(case.kind, "block"))
    seconds = time.perf_counter() - start
    pairs = [*found.value, *([found.report.embedding] if found.report.embedding else [])]

    def features(which: str, taps: list[str], x: Tensor) -> dict[str, Tensor]:
        return values(models[which], taps, x)

    row = score(case, [(pair.teacher, pair.student) for pair in pairs], features, built=built)
    told = [f"{pair.teacher} ↔ {pair.student}" for pair in pairs]
    return {**row, "kind": case.kind, "seconds": round(seconds, 3), "found": told}


def _failed(case: Any, error: Exception) -> dict[str, Any]:
    nothing = dict.fromkeys(("recall_exact", "recall_site", "recall_shape", "precision_site"), 0.0)
    counts = {"n_truth": len(case.places()), "n_pred": 0, "contradictions": 0, "unresolved": 0, "seconds": 0.0}
    return {**counts, **nothing, "kind": case.kind, "found": [], "error": f"{type(error).__name__}: {str(error)[:200]}"}


def summary(results: dict[str, Any]) -> dict[str, float]:
    """The rates over all places."""
    places = sum(row["n_truth"] for row in results.values())
    rates = {
        name: round(sum(row[name] * row["n_truth"] for row in results.values()) / max(1, places), 4)
        for name in ("recall_exact", "recall_site", "recall_shape")
    }
    return {
        "cases": len(results),
        "places": places,
        **rates,
        "contradictions": sum(row["contradictions"] for row in results.values()),
    }


def values(model: TracedModel, taps: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    """The tensors of some taps on an input."""
    with torch.no_grad():
        _, found = run_keeping(model.graph_module, {model.taps[tap] for tap in taps}, x)
    return {tap: found[model.taps[tap]].clone() for tap in taps}


def stage_ends(only: str) -> dict[str, Any]:
    """Compare stage exits with the features that timm's maintainers list for each family (from stride 4 on)."""
    results: dict[str, Any] = {}
    for entry in zoo("timm"):
        if only not in entry.id:
            continue
        module = entry.build()
        listed = [dict(item) for item in getattr(module, "feature_info", None) or ()]
        names = [item["module"] for item in listed if item.get("reduction", 0) >= 4]
        x = entry.example(2)
        truth = _outputs(module, names, x)
        try:
            model = trace(module, x)
            found = stages(model)
            even = sum(not stage.is_output for stage in found) == 1
            blocks = [block for stage in found for block in (stage.blocks if even else stage.blocks[-1:])]
            mine = values(model, [model.tap_name(block.output) for block in blocks], x)
            hits = {
                name: next((tap for tap, value in mine.items() if _same(value, wanted)), None)
                for name, wanted in truth.items()
            }
            results[entry.id] = {
                "listed": len(hits),
                "found": sum(hit is not None for hit in hits.values()),
                "hits": hits,
                "mine": list(mine),
            }
        except Exception as error:  # one family must not end the sweep
            results[entry.id] = {
                "listed": len(truth),
                "found": 0,
                "error": f"{type(error).__name__}: {str(error)[:200]}",
            }
        print(
            entry.id,
            {key: value for key, value in results[entry.id].items() if key in ("listed", "found", "error")},
            flush=True,
        )
        gc.collect()
    print("found", sum(row["found"] for row in results.values()), "of", sum(row["listed"] for row in results.values()))
    return results


def _outputs(module: nn.Module, names: Sequence[str], x: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    submodules = dict(module.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(part: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found[name] = output.detach().clone()

        return hook

    handles = [submodules[name].register_forward_hook(keep(name)) for name in names if name in submodules]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of the axes."""
    if a.numel() != b.numel() or a.dim() != b.dim():
        return False
    orders = [range(a.dim()), (0, *range(2, a.dim()), 1), (0, a.dim() - 1, *range(1, a.dim() - 1))]
    return any(
        a.shape == (c := b.permute(*order)).shape and torch.allclose(a, c, rtol=1e-4, atol=1e-5) for order in orders
    )


def identity(only: str) -> dict[str, Any]:
    """Align 30 models with themselves, by stages and by blocks: every tap must go with itself."""
    results: dict[str, Any] = {}
    for entry in zoo("torchvision"):
        if entry.name in _ONE_OF_EACH and entry.name in (only.split(",") if only else _ONE_OF_EACH):
            model = trace(entry.build(), entry.example(2))
            pairs = [
                pair for every_block in (False, True) for pair in match(model, model, every_block=every_block).value
            ]
            astray = [f"{pair.teacher} ↔ {pair.student}" for pair in pairs if pair.teacher != pair.student]
            results[entry.id] = {"pairs": len(pairs), "astray": astray}
            print(entry.id, results[entry.id], flush=True)
            gc.collect()
    print(
        f"{sum(not row['astray'] for row in results.values())} of {len(results)} models go with themselves layer by layer"
    )
    return results


class Chain(nn.Module):
    """Residual blocks, smaller maps four times on the way: as many nodes as are wanted."""

    def __init__(self, nodes: int):
        super().__init__()
        count = max(4, nodes // 3)
        self.stem, self.head = nn.Conv2d(3, 2, 1), nn.Linear(2, 2)
        self.convs = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(count))
        self.every = count // 4

    def forward(self, x: Tensor) -> Tensor:
        """Images to two numbers."""
        x = self.stem(x)
        for k, conv in enumerate(self.convs):
            x = torch.relu(x + conv(x))
            if k % self.every == self.every - 1:
                x = nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def speed() -> dict[str, Any]:
    """Seconds to align, tracing left out: the best of three."""
    import torchvision

    x = torch.randn(2, 3, 64, 64)
    models = [trace(getattr(torchvision.models, name)(weights=None), x) for name in ("resnet152", "resnet50")]
    results: dict[str, Any] = {"resnet152 → resnet50": _best(lambda: match(models[0], models[1]))}
    results["resnet152 → resnet50, every block"] = _best(lambda: match(models[0], models[1], every_block=True))
    for nodes in (100, 1_000, 10_000):
        results[f"chain of {nodes}"] = _chain_seconds(nodes)
        print(nodes, results[f"chain of {nodes}"], flush=True)
    small, large = results["chain of 100"], results["chain of 10000"]
    for what in ("stages", "match"):
        results[f"exponent of {what}"] = round(log(large[what] / small[what]) / log(large["nodes"] / small["nodes"]), 3)
    print(json.dumps(results, indent=1))
    return results


def _chain_seconds(nodes: int) -> dict[str, float]:
    model = trace(Chain(nodes), torch.randn(2, 3, 32, 32))
    count = len(list(model.graph_module.graph.nodes))
    return {"nodes": count, "stages": _best(lambda: stages(model)), "match": _best(lambda: match(model, model))}


def _best(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return round(min(seconds), 4)


def table(path: Path) -> None:
    """Print the results of a file as Markdown."""
    record = json.loads(path.read_text())
    for what, title in (("cases", "Human pairings"), ("pairings", "Our own pairings")):
        results = record.get(what, {}).get("results", {})
        print(f"\n### {title}, {record.get(what, {}).get('date', 'not run')[:10]}\n")
        print("| case | places | exact | site | shape | contradictions |\n|---|---|---|---|---|---|")
        for name, row in results.items():
            recalls = " | ".join(f"{row[measure]:.2f}" for measure in ("recall_exact", "recall_site", "recall_shape"))
            print(f"| {name.removeprefix('own_')} | {row['n_truth']} | {recalls} | {row['contradictions']} |")
        total = summary(results)
        recalls = " | ".join(f"**{total[measure]:.3f}**" for measure in ("recall_exact", "recall_site", "recall_shape"))
        print(f"| **all {total['cases']}** | **{total['places']}** | {recalls} | **{total['contradictions']}** |")
    same = record.get("identity", {}).get("results", {})
    print(f"\n### Identity, {record.get('identity', {}).get('date', 'not run')}\n")
    print(f"{sum(not row['astray'] for row in same.values())} of {len(same)} models pair every tap with itself", end="")
    print(f" ({sum(row['pairs'] for row in same.values())} pairs).")
    print(f"\n### Speed, {record.get('speed', {}).get('date', 'not run')}\n\n| what | seconds of CPU |\n|---|---|")
    for name, value in record.get("speed", {}).get("results", {}).items():
        print(
            f"| {name} | {value if not isinstance(value, dict) else ', '.join(f'{k} {v}' for k, v in value.items())} |"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["cases", "pairings", "stages", "identity", "speed", "table"])
    parser.add_argument("file", nargs="?", type=Path, help="for `table`: a file of results")
    parser.add_argument("--cases", type=Path, default=CASES, metavar="FOLDER")
    parser.add_argument("--only", default="", metavar="TEXT", help="only those whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="add the results to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.what == "table":
        return table(options.file)
    results = {
        "cases": lambda: cases(options.cases, options.only),
        "pairings": lambda: cases(options.cases, options.only, own=True),
        "stages": lambda: stage_ends(options.only),
        "identity": lambda: identity(options.only),
        "speed": speed,
    }[options.what]()
    if options.json and results:
        record = json.loads(options.json.read_text()) if options.json.exists() else {}
        versions = {name: version(name) for name in ("torch", "torchvision", "timm", "networkx")}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        earlier = record.get(options.what, {}).get("results", {}) if options.only else {}
        command = f"python benchmarks/alignment.py {options.what} --json {options.json}"
        record[options.what] = {"date": date, "versions": versions, "command": command, "results": earlier | results}
        options.json.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return None


if __name__ == "__main__":
    main()
