"""Which public models can be exported to ONNX and agree with torch there?

    python benchmarks/export_sweep.py sweep benchmarks/results/export_sweep.json [--minutes 8]    goes on where it stopped
    python benchmarks/export_sweep.py sweep FILE --only timm:swin                 those whose name contains this
    python benchmarks/export_sweep.py sweep FILE --again-failed                   failures, and what was too large before
    python benchmarks/export_sweep.py one timm:resnet10t                          one model, result on stdout
    python benchmarks/export_sweep.py table FILE [--into docs/coverage.md]        the results as Markdown

All 80 torchvision classification models, and a small model of each of the 98 timm families (module files), as zoo.py lists
them. Weights are random, and nothing is left at a neutral start value (batch-norm statistics, zero-initialised branches, layer
scales), so that a lost operation shows. Each model has a process of its own, with a time limit. Inputs are 128 x 128 where the
model permits. The order is from shallow to deep, so that a sweep cut short has seen as many models as it could.

Agreement: largest difference at most 1e-3 of the output's range, at batch sizes 1, 2, 3 and on 4 images. `depends_on_input` is by
how much two inputs differ in the output, as a share of its range; below 1e-3 the comparison would prove nothing and fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from channel_tables import folded

TOLERANCE = 1e-3
BATCHES = (1, 2, 3)
SIZE = 128
BESIDE = 100  # million parameters from which weights go to a second file, which takes less memory
DEEP = (
    "_b4",
    "_b5",
    "_b6",
    "_b7",
    "densenet1",
    "densenet2",
    "2_m",
    "2_l",
    "101",
    "152",
    "maxvit",
    "32gf",
    "128gf",
    "swin",
    "vit_",
    "wide",
)


@cache
def zoo() -> dict[str, Any]:
    """The models by spec, the deepest last."""
    import zoo as models

    entries = {entry.id: entry for entry in models.zoo() if entry.source != "segmentation"}
    deep = [name for name in entries if name.startswith("torchvision") and any(part in name for part in DEEP)]
    return {name: entries[name] for name in [*sorted(entries.keys() - set(deep), key=[*entries].index), *deep]}


def build(spec: str, *, neutral: bool) -> tuple[Any, tuple[int, int, int]]:
    """The model, in eval mode, and its input's shape; if not `neutral`, nothing in it has a neutral start value."""
    import torch

    torch.manual_seed(0)
    entry = zoo()[spec]
    options = dict(entry.options)
    if entry.source == "torchvision":
        import torchvision

        model, own, least = (
            torchvision.models.get_model(entry.name, weights=None, **options),
            (3, entry.size, entry.size),
            (3, 0, 0),
        )
    else:
        import timm

        model = timm.create_model(entry.name, **options)
        config = model.pretrained_cfg
        own = tuple(config.get("input_size", (3, 224, 224)))
        least = own if config.get("fixed_input_size") else tuple(config.get("min_input_size") or (0, 0, 0))
    model.eval()
    small = (own[0], *(max(SIZE, size) for size in least[1:]))
    shape = small if small[1] < own[1] and _runs(model, small) else own
    randomise(model, shape, neutral=neutral)
    return model, shape


def _runs(model: Any, shape: tuple[int, int, int]) -> bool:
    import torch

    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except Exception:  # it wants a size of its own, and says so in as many ways as there are models
        return False
    return True


def randomise(model: Any, shape: tuple[int, int, int], *, neutral: bool) -> None:
    """Replace what constructors leave constant: norms, zero-initialised weights, layer scales; then the statistics.

    Statistics are those of the images and of noise of their scale, which are what the proof looks at: with others the signal
    dies out on its way through a deep network, or grows until rounding decides the output, which then proves nothing.
    """
    import torch

    from indistill_fx.deploy.onnx_session import random_inputs

    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in () if neutral else model.parameters():
            first = parameter.flatten()[0]
            if parameter.is_floating_point() and bool((parameter == first).all()):
                if parameter.dim() > 1 and first == 0:
                    parameter.normal_(0, 0.02)
                elif first == 0:
                    parameter.normal_(0, 0.1)
                else:
                    parameter.uniform_(0.5, 1.5).mul_(max(abs(float(first)), 0.1))
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            if norm.weight is not None and not neutral:
                norm.weight.uniform_(0.5, 1.5)
            norm.momentum = 1.0
            norm.train()
        if norms:
            seen = images(shape)
            model(torch.cat([seen, *random_inputs([seen[:2]], len(seen), seed=2)]))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            norm.momentum = momentum
            # A channel that is nearly constant on four images would be blown up, and its rounding with it.
            norm.running_var.clamp_(min=0.05 * float(norm.running_var.mean()))


def images(shape: tuple[int, int, int], count: int = 4) -> Any:
    """Random images that differ in colour, contrast and coarse structure; plain noise looks alike to a pooled network."""
    import torch

    generator = torch.Generator().manual_seed(1)
    coarse = torch.nn.functional.interpolate(
        torch.randn(count, shape[0], 4, 4, generator=generator), size=shape[1:], mode="bicubic"
    )
    colour, contrast = torch.randn(2, count, shape[0], 1, 1, generator=generator)
    return coarse * contrast.exp() + colour + 0.3 * torch.randn(count, *shape, generator=generator)


def run_one(spec: str) -> dict[str, Any]:
    """Export one model and compare; never raises for what the model does.

    A few networks amplify rounding without limit once nothing in them is neutral (torch in float32 is then off from
    torch in float64 as well); they are tried again with the weights as constructed, and the row says so.
    """
    start = time.perf_counter()
    row = _attempt(spec, neutral=False)
    if row["status"] == "failed" and ("amplifies rounding" in row["reason"] or "prove nothing" in row["reason"]):
        row = _attempt(spec, neutral=True) | {"with nothing neutral": row["reason"]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return row | {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2)}


def _attempt(spec: str, *, neutral: bool) -> dict[str, Any]:
    import torch

    from indistill_fx.deploy.export_onnx import export_onnx
    from indistill_fx.errors import IndistillError

    row: dict[str, Any] = {"status": "failed", "weights": "as constructed" if neutral else "nothing neutral"}
    try:
        model, shape = build(spec, neutral=neutral)
        x = images(shape)
        row |= {"input": list(shape), "parameters": sum(p.numel() for p in model.parameters())}
        with torch.no_grad():
            a, b = model(x[:2]).flatten(1)
        row["depends_on_input"] = float((a - b).abs().max() / (a.max() - a.min()))
        if not row["depends_on_input"] >= TOLERANCE:
            return row | {"reason": "the output hardly depends on the input, so agreement would prove nothing"}
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "m.onnx"
            report = export_onnx(
                model,
                path,
                x[:2],
                real_inputs=x,
                tolerance=TOLERANCE,
                batch_sizes=BATCHES,
                external_data=True if row["parameters"] > BESIDE * 1e6 else None,
            )
        worst = max(p.max_rel for p in (*report.parity, *report.real.parity))
    except IndistillError as error:
        return row | {"reason": str(error)}
    except Exception as error:
        return row | {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    return row | {
        "status": "agrees", "max_rel": worst, "max_abs": report.max_abs, "opset": report.opset, "size": report.size,
        "latency_ms": report.latency_ms,
    }  # fmt: skip


def run_apart(spec: str, timeout: float) -> dict[str, Any]:
    """`run_one` in a process of its own: a copy of this one, so that imports are paid for once."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(run_one(spec)))
    process.start()
    theirs.close()
    row = {"status": "not done", "reason": f"not done after {timeout:.0f} s"}
    if ours.poll(timeout):
        try:
            row = ours.recv()
        except EOFError:
            process.join()
            row["reason"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return row


def versions() -> dict[str, str]:
    import onnx
    import onnxruntime
    import onnxscript
    import timm
    import torch
    import torchvision

    modules = (torch, torchvision, timm, onnx, onnxruntime, onnxscript)
    return {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}


def millions(spec: str) -> float:
    """Parameters, counted without allocating any; 0 if the constructor computes with values."""
    import torch

    entry = zoo()[spec]
    try:
        with torch.device("meta"):
            model = entry._construct()
    except Exception:
        return 0.0
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def sweep(out: Path, *, only: str, again_failed: bool, timeout: float, minutes: float, largest: float) -> None:
    """All models not in the file yet; the file is rewritten after each."""
    import torch

    import indistill_fx.deploy.export_onnx  # noqa: F401

    # Imports and the exporter's own tables are made once, for all copies of this process.
    torch.onnx.export(torch.nn.Linear(2, 2), (torch.zeros(2, 2),), dynamo=True, verbose=False)
    versions()
    end = time.monotonic() + 60 * minutes
    record: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"rows": {}}
    for i, spec in enumerate(zoo()):
        known = record["rows"].get(spec)
        if only not in spec or (known and not (again_failed and known["status"] != "agrees")):
            continue
        if time.monotonic() > end:
            break
        size = millions(spec)
        if size > largest:
            row = {"status": "not tried", "reason": f"{size:.0f} million parameters; the limit was {largest:.0f}"}
        else:
            row = run_apart(spec, timeout)
        record["rows"][spec] = row
        record |= {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "tolerance": TOLERANCE,
        }
        draft = out.with_suffix(".tmp")
        draft.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(draft, out)
        told = row.get("reason", f"{row.get('max_rel', 0):.1e}")
        print(f"{i + 1}/{len(zoo())} {spec}: {row['status']} {told} {row.get('seconds', '')}", flush=True)
    for source in ("torchvision", "timm"):
        counts = Counter(row["status"] for spec, row in record["rows"].items() if spec.startswith(source))
        print(f"{source}: {counts['agrees']} of {counts.total()} agree")
    left = sum(spec not in record["rows"] for spec in zoo())
    print(f"{left} left")


def table(record: dict[str, Any]) -> str:
    """How many agree, of how many tried, of how many there are; then every other row with its reason."""
    lines = [
        f"By {record['date'][:10]}, with "
        + ", ".join(f"{name} {number}" for name, number in record["versions"].items())
        + ".",
        "",
        "| models | in all | tried | export and agree | fail | not done in time, or too large |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows = record["rows"]
    for source in ("torchvision", "timm"):
        counts = Counter(row["status"] for spec, row in rows.items() if spec.startswith(source))
        total = sum(spec.startswith(source) for spec in zoo())
        rest = counts["not done"] + counts["not tried"]
        lines.append(f"| {source} | {total} | {counts.total()} | {counts['agrees']} | {counts['failed']} | {rest} |")
    left = sum(spec not in rows for spec in zoo())
    if left:
        lines += [
            "",
            f"{left} models have not been tried yet: `python benchmarks/export_sweep.py sweep` goes on with them.",
        ]
    agreeing = {spec: row for spec, row in rows.items() if row["status"] == "agrees"}
    if agreeing:
        worst = max(agreeing, key=lambda spec: agreeing[spec]["max_rel"])
        lines += ["", f"Largest difference: {agreeing[worst]['max_rel']:.1e} of the output's range (`{worst}`)."]
        lines += ["", folded("Agree", sorted(agreeing))]
    others = {spec: row for spec, row in rows.items() if row["status"] != "agrees"}
    if others:
        lines += ["", "| model | | reason |", "|---|---|---|"]
        lines += [
            f"| `{spec}` | {row['status']} | {row['reason'].replace('|', '/')} |"
            for spec, row in sorted(others.items())
        ]
    return "\n".join(lines)


def write_section(file: Path, text: str) -> None:
    """Replace what stands between this sweep's marks, or add it at the end."""
    begin, end = "<!-- export sweep -->", "<!-- end of export sweep -->"
    before = file.read_text() if file.exists() else "# Coverage\n"
    head, _, rest = before.partition(begin)
    tail = rest.partition(end)[2]
    if not rest:
        head, tail = before.rstrip("\n") + "\n\n## ONNX export\n\n", "\n"
    file.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "one", "table"))
    parser.add_argument("name", help="the file of results; for `one` a model")
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--again-failed", action="store_true")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no model after so long")
    parser.add_argument(
        "--largest", type=float, default=200, metavar="MILLIONS", help="parameters; memory is 10 to 20 bytes for each"
    )
    parser.add_argument("--into", type=Path, metavar="FILE", help="for `table`: write its section of this page")
    options = parser.parse_args()
    if options.what == "one":
        print(json.dumps(run_one(options.name)))
    elif options.what == "table":
        text = table(json.loads(Path(options.name).read_text()))
        write_section(options.into, text) if options.into else print(text)
    elif options.what == "sweep":
        chosen = {name: getattr(options, name) for name in ("only", "again_failed", "timeout", "minutes", "largest")}
        sweep(Path(options.name), **chosen)


if __name__ == "__main__":
    main()
