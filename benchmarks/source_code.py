"""Networks as source code: every family, shrunk and whole, against its graph.

    python benchmarks/source_code.py torchvision:resnet18 timm:vit_tiny_patch16_224 … --out benchmarks/results/source_code.json
    python benchmarks/source_code.py --zoo --out benchmarks/results/source_code.json         one of every family (minutes)
    python benchmarks/source_code.py SPEC --add --out benchmarks/results/source_code.json    these again, the others as they are there
    python benchmarks/source_code.py --table benchmarks/results/source_code.json             as Markdown

For each: outputs in eval mode and outputs and gradients in train mode, to the bit; lines, beside those of the original's own model file.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import sys
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import IndistillError
from indistill_fx.loading.load import load_source

ZOO = [
    *(f"torchvision:{name}" for name in (
        "alexnet vgg11_bn squeezenet1_1 densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 regnet_y_400mf efficientnet_b0 "
        "efficientnet_v2_s mnasnet0_5 convnext_tiny resnet18 resnext50_32x4d wide_resnet50_2 googlenet inception_v3 vit_b_32 swin_t "
        "swin_v2_t maxvit_t"
    ).split()),
    *(f"timm:{name}" for name in (
        "vit_tiny_patch16_224 resnet10t mobilenetv3_small_050 convnext_atto efficientvit_b0 ghostnet_050 repvgg_a0 mixer_s32_224 "
        "levit_128s poolformer_s12 deit_tiny_patch16_224 edgenext_xx_small hrnet_w18_small dla34 cspresnet50 res2net50_14w_8s gcresnet50t "
        "seresnet18"
    ).split()),
]  # fmt: skip
SMALL = {"vit_b_32": 224, "maxvit_t": 224, "inception_v3": 96}
"""Sizes of pictures where torchvision's other families take 64."""


def check(spec: str, ratio: float | None) -> dict[str, Any]:
    """One network."""
    source = load_source(spec)
    channels, full, _ = source.input_size or (3, 224, 224)
    name = spec.partition(":")[2]
    size = full if spec.startswith("timm:") else SMALL.get(name, 64)
    torch.manual_seed(0)
    model = ifx.trace(source.module, (torch.randn(2, channels, size, size),), role="teacher")
    model = model if ratio is None else ifx.shrink(model, ratio=ratio).value
    began = time.perf_counter()
    written = source_of(model)
    row: dict[str, Any] = {"spec": spec, "ratio": ratio, "seconds": round(time.perf_counter() - began, 2)}
    row["lines"] = len(written.text.splitlines())
    file = inspect.getsourcefile(type(source.module))
    row["original lines"] = len(Path(file).read_text().splitlines()) if file else None
    x = torch.randn(4, channels, size, size)
    sides = [results(copy.deepcopy(m), x) for m in (model.graph_module, written.build())]
    row["equal"] = [len(sides[0]) == len(sides[1]), *(torch.equal(a, b) for a, b in zip(*sides, strict=False))]
    row["ok"] = all(row["equal"])
    row["equal"] = sum(row["equal"]) - 1
    return row


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output in eval mode; output and gradients in train mode, ordered by shape and sum."""
    found: list[Tensor] = []
    for training in (False, True):
        for part in module.modules():
            part.training = training
        own = x.clone().requires_grad_(training)
        for parameter in module.parameters():
            parameter.requires_grad_(training)
        torch.manual_seed(1)
        with torch.set_grad_enabled(training):
            output = module(own)
        output = (
            output
            if isinstance(output, Tensor)
            else next(iter(output.values() if isinstance(output, dict) else output))
        )
        found.append(output.detach())
        if training:
            output.float().square().sum().backward()
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            found += [own.grad, *sorted(grads, key=lambda g: (tuple(g.shape), float(g.double().sum())))]
    return found


def table(record: dict[str, Any]) -> str:
    """The results as Markdown: one line for each network, halved."""
    rows = record["rows"]
    lines = [
        f"{sum(row['ok'] for row in rows)} of {len(rows)} are bit-identical, at full width or halved: outputs in both modes, gradients.",
        "",
        "| network, halved | equal tensors | lines | its original's file |",
        "|---|---|---|---|",
    ]
    for row in rows:
        if row["ratio"]:
            told = (
                f"{row['equal']} | {row['lines']} | {row['original lines'] or '-'}"
                if row["ok"]
                else f"{row.get('error', 'differs')} | |"
            )
            lines.append(f"| {row['spec']} | {told} |")
    return "\n".join(
        [*lines, "", f"({record['date'][:10]}; {', '.join(f'{k} {v}' for k, v in record['versions'].items())})"]
    )


def main() -> None:
    """Check, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("specs", nargs="*")
    parser.add_argument("--zoo", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--add", action="store_true", help="keep the rows of other networks that are in the file")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    if options.add:
        rows = [row for row in json.loads(Path(options.out).read_text())["rows"] if row["spec"] not in options.specs]
    for spec in [*options.specs, *(ZOO if options.zoo else [])]:
        for ratio in (0.5, None):
            try:
                row = check(spec, ratio)
            except IndistillError as error:
                row = {"spec": spec, "ratio": ratio, "ok": False, "error": str(error)}
            rows.append(row)
            print(row, flush=True)
            if options.out:
                names = ("torch", "torchvision", "timm", "indistill-fx")
                told = {"versions": {name: version(name) for name in names}, "command": sys.argv}
                told["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                Path(options.out).write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} right")


if __name__ == "__main__":
    main()
