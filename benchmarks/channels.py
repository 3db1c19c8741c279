"""Are the channel rules right on real networks, and what do they cost? Sweeps of `narrow` and `shrink` over the zoo.

    python benchmarks/channels.py narrow --json docs/channels-narrow.json     every tap of every model, half its channels at random
    python benchmarks/channels.py shrink --json docs/channels-shrink.json     every classifier at ratio 0.5, beside Torch-Pruning
    python benchmarks/channels.py exact                                      every (C, n), C up to 256, on a plain convolution
    python benchmarks/channels.py table docs/channels-narrow.json docs/channels-shrink.json

Every model runs in a process of its own under a time limit; results already in the file are kept. All comparisons are in float64 with
random weights and batch norms calibrated on data, and relative to the part of a tensor that depends on the input: a constant cannot
pass a test.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from zoo import ZooModel, zoo

from indistill_fx.errors import IndistillError
from indistill_fx.graphs import copy_graph, output_node, sweep
from indistill_fx.passes.masked import run_masked
from indistill_fx.passes.narrow import narrow
from indistill_fx.passes.shrink import shrink
from indistill_fx.passes.trace import trace
from indistill_fx.traced import TracedModel

TOLERANCE = 1e-10
_MEMORY = 2e9
"""Bytes that the copies of one batch of taps may take, roughly."""
_LIMIT = 8 << 30
"""Address space of one model's process, in bytes: a sweep must not starve its neighbours."""
_SMALL = 64
_FIXED = ("inception", "googlenet", "vit", "maxvit")
"""Families whose pictures cannot be small; channels do not depend on the size."""
_CNN = frozenset(
    "alexnet vgg resnet resnext wide densenet googlenet inception mnasnet mobilenet regnet shufflenet squeezenet efficientnet".split()
)
"""torchvision's families of plain convolutional networks."""
_HEAVY = (
    "large",
    "gf",
    "vit_l",
    "vit_h",
    "152",
    "101",
    "161",
    "201",
    "_b7",
    "_b6",
    "_b5",
    "_l",
    "vgg1",
    "base",
    "segmentation",
)
"""In the names of models that are run last."""


def run_values(graph_module: fx.GraphModule, nodes: list[fx.Node], *inputs: Tensor) -> list[Tensor]:
    """The tensors of some nodes; only what they need is run."""
    part, by_name = copy_graph(graph_module)
    output_node(part.graph).args = ([by_name[node.name] for node in nodes],)
    sweep(part)
    with torch.no_grad():
        return list(part(*inputs))


def narrow_one(model: ZooModel) -> dict[str, Any]:
    """Narrow every tap to a random half, a few at a time, and compare with the whole."""
    module = model.build().double()
    x = model.example(2).double()
    traced = trace(module, x)
    chooser = random.Random(0)
    taps = [
        names[0]
        for node, names in traced.aliases.items()
        if (known := traced.facts[node]).channel_axis is not None
        and known.batch_axis is not None
        and known.channels > 1
        and traced.node(names[0]).op not in ("placeholder", "output")
    ]
    kept = {tap: sorted(chooser.sample(range(n := traced.facts_of(tap).channels), max(1, n // 2))) for tap in taps}
    worst, failures, stopped, absorbed, seconds = 0.0, [], Counter[str](), 0, 0.0
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    at_once = max(2, min(24, int(_MEMORY / (size + 1))))
    for at in range(0, len(taps), at_once):
        some = taps[at : at + at_once]
        start = time.perf_counter()
        result = narrow(traced, kept={tap: kept[tap] for tap in some})
        seconds += time.perf_counter() - start
        whole = run_values(traced.graph_module, [traced.node(tap) for tap in some], x)
        slim = run_values(result.value.graph_module, [result.value.node(tap) for tap in some], x)
        for tap, expected, got, report in zip(some, whole, slim, result.report.taps, strict=True):
            difference = _difference(traced, tap, kept[tap], expected, got, result.value.facts_of(tap).shape)
            worst = max(worst, difference)
            failures += [] if difference <= TOLERANCE else [f"{tap}: {difference:.1e}"]
            absorbed += not report.stopped
            stopped.update({stop.reason for stop in report.stopped})
    return {
        "ok": not failures,
        "taps": len(taps),
        "absorbed": absorbed,
        "worst": worst,
        "failures": failures[:20],
        "stopped": dict(stopped.most_common(12)),
        "narrow_seconds": round(seconds, 2),
        "rung": traced.report.rung,
    }


def _difference(
    traced: TracedModel, tap: str, kept: list[int], expected: Tensor, got: Tensor, told: tuple[int, ...]
) -> float:
    """Largest difference, in parts of the input-dependent part of the whole feature; infinite if the shape is wrong."""
    axis, batch = traced.facts_of(tap).channel_axis or 0, traced.facts_of(tap).batch_axis or 0
    wanted = expected.index_select(axis, torch.tensor(kept))
    if got.shape != wanted.shape or tuple(got.shape) != told:
        return float("inf")
    halves = expected.movedim(batch, 0).unflatten(0, (2, -1))
    moving = float((halves[0] - halves[1]).abs().max()) or float(expected.abs().max()) or 1.0
    difference = float((got - wanted).abs().max())
    return difference / moving


def shrink_one(model: ZooModel) -> dict[str, Any]:
    """Halve a network, run it in both modes, and compare it with the masked original."""
    module = model.build()
    x = model.example(2)
    start = time.perf_counter()
    traced = trace(module, x)
    seen = time.perf_counter()
    try:
        result = shrink(traced, ratio=0.5)
    except IndistillError as error:
        return {"ok": False, "refused": str(error)}
    done = time.perf_counter()
    layers = result.report.layers
    found: dict[str, Any] = {
        "trace_seconds": round(seen - start, 3),
        "shrink_seconds": round(done - seen, 3),
        "macs": result.report.macs,
        "parameters": result.report.parameters,
        "layers": len(layers),
        "whole": [layer.path for layer in layers if len(layer.kept) == layer.of],
        "inexact": {
            layer.path: [len(layer.kept), layer.of]
            for layer in layers
            if len(layer.kept) < layer.of and len(layer.kept) != (layer.of // layer.each + 1) // 2 * layer.each
        },
        "frozen": {frozen.reason: frozen.channels for frozen in result.report.frozen},
        "rung": traced.report.rung,
    }
    found["eval"] = _runs(result.value.graph_module.eval(), model.example(2))
    found["train"] = _runs(copy.deepcopy(result.value.graph_module).train(), model.example(2))
    del result, traced
    found |= _equivalence(model, module)
    found["ok"] = (
        found["eval"] is True
        and found["train"] is True
        and found["difference"] <= TOLERANCE
        and found["control"] > 1e-6
    )
    return found


def _equivalence(model: ZooModel, module: nn.Module) -> dict[str, Any]:
    """Sliced against masked, in float64; and with two kept columns of a reader swapped, which must show."""
    module = module.double()
    x = model.example(2).double()
    traced = trace(module, x)
    result = shrink(traced, ratio=0.5)
    expected = _first(run_masked(traced, result.report, x))
    moving = float((expected[0] - expected[1]).abs().max()) or 1.0
    small = result.value.graph_module
    with torch.no_grad():
        difference = float((_first(small(x)) - expected).abs().max()) / moving
        _swap_columns(small)
        control = float((_first(small(x)) - expected).abs().max()) / moving
    return {"difference": difference, "control": control}


def _swap_columns(small: fx.GraphModule) -> None:
    """Exchange two channels that a layer in the middle and the last one read."""
    readers = [m for m in small.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m.weight.shape[1] > 1]
    for reader in (readers[len(readers) // 2], readers[-1]):  # the middle one may be a gate that is shut
        reader.weight[:, [0, 1]] = reader.weight[:, [1, 0]]


def _first(value: Any) -> Tensor:
    return (
        value if isinstance(value, Tensor) else _first(next(iter(value.values() if isinstance(value, dict) else value)))
    )


def _runs(module: nn.Module, x: Tensor) -> bool | str:
    try:
        with torch.no_grad():
            return bool(_first(module(x)).isfinite().all())
    except Exception as error:  # anything may go wrong in a broken network
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def torch_pruning_one(model: ZooModel) -> dict[str, Any]:
    """The same by Torch-Pruning: L1, ratio 0.5, the classifier left whole."""
    import torch_pruning as tp

    module, x = model.build(), model.example(2)
    last = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    heads = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == 1000] or [last]
    before = sum(p.numel() for p in module.parameters())
    start = time.perf_counter()
    pruner = tp.pruner.MagnitudePruner(
        module, x, importance=tp.importance.MagnitudeImportance(p=1), pruning_ratio=0.5, ignored_layers=heads
    )
    pruner.step()
    seconds = time.perf_counter() - start
    after = sum(p.numel() for p in module.parameters())
    return {
        "seconds": round(seconds, 3),
        "parameters": [before, after],
        "eval": _runs(module.eval(), x),
        "train": _runs(module.train(), x),
    }


def exact() -> None:
    """Asking for n gets n, for all (C, n) with C up to 256: by width and by ratio."""
    wrong = 0
    for channels in range(1, 257):
        net = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU(), nn.Conv2d(channels, 4, 1))
        traced = trace(net, torch.randn(2, 3, 4, 4))
        for n in range(1, channels + 1):
            wrong += shrink(traced, ratio=n / channels).report.widths["0"][1] != n
            wrong += shrink(traced, widths={"0": n}).report.widths["0"][1] != n
            wrong += len(narrow(traced, widths={"0": n}).report.kept["0"]) != n
    print(f"{256 * 257 // 2} pairs (C, n), three ways each: {wrong} wrong")


def run_all(task: str, models: list[ZooModel], path: Path | None, *, limit: float, beside: bool) -> None:
    """One process per model; the file is written after each."""
    record: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    results: dict[str, Any] = record.setdefault("models", {})
    record.update(
        task=task,
        versions=_versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=" ".join(sys.argv),
    )
    for model in sorted(models, key=lambda m: any(word in m.name for word in _HEAVY)):
        if results.get(model.id, {}).get("ok"):
            continue
        start = time.perf_counter()
        results[model.id] = _in_process(narrow_one if task == "narrow" else shrink_one, model, limit)
        results[model.id] |= {"family": model.family, "seconds": round(time.perf_counter() - start, 1)}
        if beside:
            results[model.id]["torch_pruning"] = _in_process(torch_pruning_one, model, limit)
        print(_line(model.id, results[model.id]), flush=True)
        if path:
            path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _line(name: str, result: dict[str, Any]) -> str:
    short = {
        key: value for key, value in result.items() if key not in ("stopped", "whole", "inexact", "frozen", "failures")
    }
    why = result.get("failures") or result.get("stopped") or result.get("frozen") or ""
    return f"{'ok  ' if result.get('ok') else 'FAIL'} {name} {short} {why}"


def _in_process(task: Callable[[ZooModel], dict[str, Any]], model: ZooModel, limit: float) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(task, model, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else {"ok": False, "error": f"more than {limit:.0f} s"}  # type: ignore[no-any-return]
    except EOFError:
        return {"ok": False, "error": "the process died"}
    finally:
        process.kill()
        process.join()


def _send(task: Callable[[ZooModel], dict[str, Any]], model: ZooModel, sender: Any) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_LIMIT, _LIMIT))
    try:
        sender.send(task(model))
    except Exception as error:  # a sweep records whatever happens
        sender.send({"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "timm", "torch-pruning", "indistill-fx"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "from the repository" if name == "indistill-fx" else "absent"
    return found


def table(paths: list[Path]) -> None:
    """The results as Markdown."""
    for path in paths:
        record = json.loads(path.read_text())
        print(f"\n{record['date']}, {', '.join(f'{k} {v}' for k, v in record['versions'].items())}\n")
        (_narrow_table if record["task"] == "narrow" else _shrink_table)(record["models"])


def _narrow_table(models: dict[str, Any]) -> None:
    print("| models | right at every tap | taps | fully absorbed |\n|---|---|---|---|")
    sets = {
        "torchvision CNN families": [
            m for k, m in models.items() if k.startswith("torchvision") and m["family"] in _CNN
        ],
        "torchvision transformers, ConvNeXt": [
            m for k, m in models.items() if k.startswith("torchvision") and m["family"] not in _CNN
        ],
        "torchvision segmentation": [m for k, m in models.items() if k.startswith("segmentation")],
        "timm": [m for k, m in models.items() if k.startswith("timm")],
    }
    for name, some in sets.items():
        taps, absorbed = (sum(m.get(key, 0) for m in some) for key in ("taps", "absorbed"))
        share = f"{absorbed} ({100 * absorbed / max(taps, 1):.1f}%)"
        print(f"| {name} | {sum(m.get('ok', False) for m in some)} of {len(some)} | {taps} | {share} |")
    for key, m in models.items():
        if not m.get("ok"):
            print(f"\n- {key}: {m.get('error') or m.get('failures')}")


def _shrink_table(models: dict[str, Any]) -> None:
    right = [m for m in models.values() if m.get("ok")]
    print(f"{len(right)} of {len(models)} models halved, run in both modes and equal to the masked reference.")
    others = [m["torch_pruning"] for m in models.values() if "torch_pruning" in m]
    passed = [
        m
        for m in others
        if m.get("eval") is True and m.get("train") is True and m["parameters"][1] < 0.9 * m["parameters"][0]
    ]
    print(f"Torch-Pruning: {len(passed)} of {len(others)} pruned and running in both modes.")
    both = [m for m in right if m.get("torch_pruning", {}).get("seconds")]
    if both:
        ratios = [(m["trace_seconds"] + m["shrink_seconds"]) / m["torch_pruning"]["seconds"] for m in both]
        alone = [m["shrink_seconds"] / m["torch_pruning"]["seconds"] for m in both]
        print(
            f"Time, ours / Torch-Pruning's: median {statistics.median(ratios):.2f} with tracing, {statistics.median(alone):.2f} without."
        )
    for key, m in models.items():
        if not m.get("ok"):
            print(
                f"\n- {key}: {m.get('error') or m.get('refused') or {k: m.get(k) for k in ('eval', 'train', 'difference', 'control')}}"
            )


def _shrunk_picture(model: ZooModel) -> ZooModel:
    if model.id == "torchvision:inception_v3":
        return replace(model, size=299)  # its auxiliary head needs as much in train mode
    small = model.source == "torchvision" and not model.family.startswith(_FIXED)
    return replace(model, size=_SMALL) if small else model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["narrow", "shrink", "exact", "table"])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="models whose id contains this")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per model")
    parser.add_argument("--beside", action="store_true", help="run Torch-Pruning too")
    args = parser.parse_args()
    if args.task == "exact":
        exact()
    elif args.task == "table":
        table(args.files)
    else:
        import timm  # noqa: F401  once, before the forks

        models = [
            m for m in zoo("torchvision" if args.task == "shrink" and not args.only else None) if args.only in m.id
        ]
        run_all(args.task, models, args.json, limit=args.limit, beside=args.beside)


if __name__ == "__main__":
    main()
