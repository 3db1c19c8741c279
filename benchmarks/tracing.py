"""Can any model be traced, and what does it cost? The sweep over the zoo, and timings.

    python benchmarks/tracing.py sweep --json benchmarks/results/tracing.json     every model of the zoo; resumes where it stopped
    python benchmarks/tracing.py sweep --sample                     eight models, for CI
    python benchmarks/tracing.py sweep --only timm:swin             those whose name contains this
    python benchmarks/tracing.py ratio --json …                     ResNet-50 beside symbolic_trace + ShapeProp
    python benchmarks/tracing.py chain --json …                     chains of 100, 1,000 and 10,000 nodes
    python benchmarks/tracing.py start --json …                     `align` of two ResNets from the shell, beside its imports
    python benchmarks/tracing.py table benchmarks/results/tracing.json            the results as Markdown

Every model runs in a process of its own under a time limit, in eval mode (as a teacher) and train mode (as a student). The traced
graph's outputs are compared with the module's, here and not only inside `trace`: on two batch sizes, other data, same seed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from channel_tables import older
from torch import Tensor, fx, nn
from zoo import ZooModel, zoo

from indistill_fx.graph.module_state import digest, mode
from indistill_fx.passes.capture.captured import tensors
from indistill_fx.passes.capture.trace import trace
from indistill_fx.traced import Role, TracedModel

_SAMPLE = (
    "torchvision:resnet18", "torchvision:swin_t", "torchvision:googlenet", "segmentation:lraspp_mobilenet_v3_large",
    "timm:resnet10t", "timm:vit_tiny_patch16_224", "timm:pvt_v2_b0", "timm:gmlp_ti16_224",
)  # fmt: skip
_SIZES = (2, 3)


def sweep(models: list[ZooModel], path: Path | None, *, limit: float, minutes: float = 1e6) -> dict[str, Any]:
    """Trace every model in a process of its own; results that are in the file already are kept, failures tried again."""
    import timm  # noqa: F401  imported once, before the forks

    record: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    results: dict[str, Any] = record.setdefault("models", {})
    record.update(
        versions=_versions(), date=datetime.now(UTC).isoformat(timespec="seconds"), command=" ".join(sys.argv)
    )
    end = time.monotonic() + 60 * minutes
    for model in models:
        if results.get(model.id, {}).get("ok"):
            continue
        if time.monotonic() > end:
            print(f"{minutes} minutes are over; the same command goes on.")
            break
        start = time.perf_counter()
        seconds = {"seconds": round(time.perf_counter() - start, 1), "date": record["date"][:10]}
        results[model.id] = _in_process(model, limit) | seconds
        print(_line(model.id, results[model.id]), flush=True)
        if path:
            path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return record


def _in_process(model: ZooModel, limit: float) -> dict[str, Any]:
    """Forked, so that torch and timm are not imported again for every model; one thread each, for a fork takes no thread along."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(limit) else {"ok": False, "error": f"more than {limit:.0f} s"}  # type: ignore[no-any-return]
    except EOFError:
        return {"ok": False, "error": "the process died"}
    finally:
        process.kill()
        process.join()


def _send(model: ZooModel, sender: Any) -> None:
    torch.set_num_threads(1)
    try:
        sender.send(one(model))
    except Exception as error:  # also a model that cannot be built is a result
        sender.send({"ok": False, "error": f"{type(error).__name__}: {error}"[:600]})


def one(model: ZooModel) -> dict[str, Any]:
    """Trace a model as teacher and as student, and compare."""
    module = model.build()
    result: dict[str, Any] = {
        "family": model.family,
        "size": model.size,
        "parameters": sum(p.numel() for p in module.parameters()),
    }
    for name, role in (("eval", "teacher"), ("train", "student")):
        try:
            result[name] = _checked(module, model, role)  # type: ignore[arg-type]
        except Exception as error:  # a benchmark tells what happened
            result[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"[:600]}
    return {**result, "ok": all(result[name]["ok"] for name in ("eval", "train"))}


def _checked(module: nn.Module, model: ZooModel, role: Role) -> dict[str, Any]:
    before, state = digest(module), torch.get_rng_state()
    start = time.perf_counter()
    traced = trace(module, model.example(2, seed=1), role=role)
    seconds = time.perf_counter() - start
    untouched = digest(module) == before and torch.equal(state, torch.get_rng_state())
    differences = [
        _difference(module, traced, model.example(size, seed=10 + size), training=role == "student") for size in _SIZES
    ]
    report = traced.report
    return {
        "ok": untouched and max(differences) <= 1e-5,
        "difference": max(differences),
        "untouched": untouched,
        "rung": report.method,
        "refused": report.refused,
        "leaves": report.leaves,
        "leaf_share": round(leaf_share(traced), 4),
        "specialisations": len(report.specialisations),
        "nodes": len(traced.graph_module.graph.nodes),
        "taps": len(traced.aliases),
        "gmacs": round(traced.macs / 1e9, 3),
        "trace_seconds": round(seconds, 2),
    }


def _difference(module: nn.Module, traced: TracedModel, x: Tensor, *, training: bool) -> float:
    with mode(module, training=training):
        outputs = [_outputs(part, x) for part in (module, traced.graph_module)]
    if [value.shape for value in outputs[0]] != [value.shape for value in outputs[1]] or not outputs[0]:
        return float("inf")
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in zip(*outputs, strict=True))


def _outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    torch.manual_seed(7)
    with torch.no_grad():
        result = [value.double() for value in tensors(module(x))]
        for buffer, value in buffers:
            buffer.copy_(value)
    return result


def leaf_share(traced: TracedModel) -> float:
    """The share of the work in modules that hold modules (or recurrent ones) and yet are one node."""
    kept = 0
    for node in traced.graph_module.graph.nodes:
        if node.op == "call_module":
            part = traced.graph_module.get_submodule(str(node.target))
            if any(True for _ in part.children()) or isinstance(part, nn.RNNBase):
                names = (
                    [node.name, *(user.name for user in node.users)] if node.name not in traced.facts else [node.name]
                )
                kept += sum(traced.facts[name].macs for name in names if name in traced.facts)
    return kept / max(traced.macs, 1)


def ratio() -> dict[str, Any]:
    """Time of trace + facts of ResNet-50 over that of symbolic_trace + ShapeProp, side by side, the median of five."""
    from torch.fx.passes.shape_prop import ShapeProp
    from torchvision.models import resnet50

    module = resnet50().eval()
    found: dict[str, Any] = {}
    for batch in (1, 2, 8):
        x = torch.randn(batch, 3, 224, 224)

        def plain(x: Tensor = x) -> None:
            graph_module = fx.symbolic_trace(module)
            with torch.no_grad():
                ShapeProp(graph_module).propagate(x)

        pairs = [(_seconds(plain), _seconds(lambda x=x: trace(module, x))) for _ in range(6)][1:]  # the first warms up
        theirs, ours = (sorted(times)[2] for times in zip(*pairs, strict=True))
        found[f"batch {batch}"] = {
            "symbolic_trace+ShapeProp": round(theirs, 3),
            "trace+facts": round(ours, 3),
            "ratio": round(ours / theirs, 2),
        }
        print(batch, found[f"batch {batch}"], flush=True)
    return found


def start() -> dict[str, Any]:
    """Seconds of the processor that a fresh process takes, the median of three: for `align`, and for the imports it cannot do without."""
    commands = {
        "import torch": ["-c", "import torch"],
        "import torch, torchvision": ["-c", "import torch, torchvision"],
        "align": ["-m", "indistill_fx", "align", "torchvision:resnet50", "torchvision:resnet18"],
    }
    found = {}
    for name, arguments in commands.items():
        times = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[name] = round(sorted(times)[1], 2)
        print(name, found[name], flush=True)
    return found


def chain(lengths: tuple[int, ...] = (100, 1_000, 10_000)) -> dict[str, Any]:
    """Time of tracing chains of operations, per node; by kind of chain, since each goes through other code."""
    found: dict[str, Any] = {}
    for name, build in _CHAINS.items():
        rows = {}
        for length in lengths:
            module = build(length)
            rows[str(length)] = round(
                min(_seconds(lambda module=module: trace(module, torch.randn(2, 4))) for _ in range(2)), 3
            )
        per_node = {length: round(1e3 * seconds / int(length), 4) for length, seconds in rows.items()}
        found[name] = {"seconds": rows, "ms_per_node": per_node}
        print(name, found[name], flush=True)
    return found


class _Chain(nn.Module):
    """A chain written in Python; `decide` makes the symbolic method fail, so that the code is run and recorded."""

    def __init__(self, length: int, *, decide: bool = False):
        super().__init__()
        self.length, self.decide = length, decide
        self.scale = nn.ParameterList([nn.Parameter(torch.ones(4)) for _ in range(length // 2)])

    def forward(self, x: Tensor) -> Tensor:
        if self.decide and x.shape[1] != 4:
            return x
        for scale in self.scale:
            x = (x * scale).tanh()
        return x


_CHAINS: dict[str, Callable[[int], nn.Module]] = {
    "modules": lambda n: nn.Sequential(*[nn.Linear(4, 4) if k % 2 else nn.Tanh() for k in range(n)]),
    "in place": lambda n: nn.Sequential(nn.Linear(4, 4), *[nn.ReLU(inplace=True) for _ in range(n - 1)]),
    "functions": _Chain,
    "recorded": lambda n: _Chain(n, decide=True),
}


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the processor, one thread: others may use the machine at the same time."""
    torch.set_num_threads(1)
    start = time.process_time()
    work()
    return time.process_time() - start


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in ("torch", "torchvision", "timm")}}


def _line(name: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"FAIL {name}: {result['error']}"
    parts = [
        f"{key} {result[key]['rung']} {result[key]['difference']:.0e}"
        if "rung" in result[key]
        else f"{key} {result[key]['error']}"
        for key in ("eval", "train")
    ]
    return f"{'ok  ' if result['ok'] else 'FAIL'} {name} ({result.get('seconds', '-')} s): {'; '.join(parts)}"


def table(record: dict[str, Any]) -> str:
    """The sweep and the timings as Markdown: one line per source, then every model that needed more than symbolic tracing."""
    lines = [
        "| source | traced | eval methods | train methods | leaf share ≤ 20% | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    models: dict[str, Any] = record["models"]
    for source in ("torchvision", "segmentation", "timm"):
        rows = [row for name, row in models.items() if name.startswith(f"{source}:")]
        good = [row for row in rows if row["ok"]]
        rungs = [
            ", ".join(f"{rung} {count}" for rung, count in _counts([row[key]["rung"] for row in good]))
            for key in ("eval", "train")
        ]
        light = sum(max(row[key]["leaf_share"] for key in ("eval", "train")) <= 0.2 for row in good)
        worst = max((row[key]["difference"] for row in good for key in ("eval", "train")), default=0.0)
        lines.append(f"| {source} | {len(good)} of {len(rows)} | {rungs[0]} | {rungs[1]} | {light} | {worst:.1e} |")
    failed = [f"- `{name}`: {_line(name, row).partition(': ')[2]}" for name, row in models.items() if not row["ok"]]
    lines += ["", *(["Not traced:", "", *failed] if failed else ["None failed."])]
    lines += ["", "| beyond symbolic tracing | eval | train | leaf share | specialisations |", "|---|---|---|---|---|"]
    for name, row in models.items():
        parts = [row[key] for key in ("eval", "train")] if row["ok"] else []
        if any(part["rung"] != "symbolic" for part in parts):
            share = max(part["leaf_share"] for part in parts)
            special = max(part["specialisations"] for part in parts)
            lines.append(f"| `{name}` | {parts[0]['rung']} | {parts[1]['rung']} | {share:.1%} | {special} |")
    return "\n".join([*lines, older(record), *_timings(record)])


def _timings(record: dict[str, Any]) -> list[str]:
    """What tracing costs, where it was measured."""
    lines = []
    if "ratio" in record:
        lines += ["", "| ResNet-50 at 224 | symbolic_trace + ShapeProp | trace + facts | ratio |", "|---|---|---|---|"]
        for batch, row in record["ratio"].items():
            theirs, ours = row["symbolic_trace+ShapeProp"], row["trace+facts"]
            lines.append(f"| {batch} | {theirs:.2f} s | {ours:.2f} s | {row['ratio']} |")
    if "chain" in record:
        lengths = list(next(iter(record["chain"].values()))["ms_per_node"])
        lines += ["", f"| chain of | {' | '.join(f'{n} nodes' for n in lengths)} |", "|---" * (len(lengths) + 1) + "|"]
        for name, row in record["chain"].items():
            lines.append(f"| {name} | {' | '.join(f'{ms:.2f} ms a node' for ms in row['ms_per_node'].values())} |")
    if "start" in record:
        told = ", ".join(f"`{name}` {seconds:.1f} s" for name, seconds in record["start"].items())
        lines += ["", f"A fresh process, seconds of the processor: {told}."]
    return lines


def _counts(values: list[str]) -> list[tuple[str, int]]:
    return [(value, values.count(value)) for value in ("symbolic", "shapes", "leaves", "export") if value in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "one", "ratio", "chain", "start", "table"))
    parser.add_argument("name", nargs="?", help="model of `one`, file of `table`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--order", type=Path, help="an earlier record: what took least there comes first")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no more models after that")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds per model")
    options = parser.parse_args()
    if options.what == "one":
        model = next(model for model in zoo() if model.id == options.name)
        print("RESULT", json.dumps(one(model)))
        return 0
    if options.what == "table":
        print(table(json.loads(Path(options.name).read_text())))
        return 0
    if options.what == "sweep":
        chosen = [model for model in zoo() if options.only in model.id and (not options.sample or model.id in _SAMPLE)]
        if options.order:
            took = {
                name: row.get("seconds", 0.0) for name, row in json.loads(options.order.read_text())["models"].items()
            }
            chosen.sort(key=lambda model: took.get(model.id, 1e6))
        record = sweep(chosen, options.json, limit=options.limit, minutes=options.minutes)
        run = [model.id for model in chosen if model.id in record["models"]]
        bad = [name for name in run if not record["models"][name]["ok"]]
        print(f"{len(run) - len(bad)} of {len(run)} traced" + (f"; not: {', '.join(bad)}" if bad else ""))
        return 1 if bad else 0
    measured = {"ratio": ratio, "chain": chain, "start": start}[options.what]()
    if options.json:
        record = json.loads(options.json.read_text()) if options.json.exists() else {}
        record.update({options.what: measured, "versions": _versions()})
        options.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
