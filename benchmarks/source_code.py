"""Networks as source code: every family, shrunk and whole, against its graph.

    python benchmarks/source_code.py --out benchmarks/results/source_code.json               one of every family (an hour)
    python benchmarks/source_code.py --only resnet18,vit_tiny --out …                        those whose name contains one of these
    python benchmarks/source_code.py --resume --out …                                        those that are not in the file
    python benchmarks/source_code.py --table benchmarks/results/source_code.json --into docs/compress.md

(With `PYTHONPATH=.:benchmarks`.) The networks are traced as `compress` and `prune` trace them: in both modes, where these fit into one
graph. For each: outputs in eval mode and outputs and gradients in train mode, to the bit; lines, beside those of the original's own model
file. A model that `shrink` refuses, or that has a part that cannot be written, is listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import sys
import warnings
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from channel_checks import small_picture
from channels import in_process
from torch import Tensor, nn
from zoo import ZooModel, zoo

import indistill_fx as ifx
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import IndistillError

TORCHVISION = (
    "alexnet vgg11_bn squeezenet1_1 densenet121 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 regnet_y_400mf efficientnet_b0 "
    "efficientnet_v2_s mnasnet0_5 convnext_tiny resnet18 resnext50_32x4d wide_resnet50_2 googlenet inception_v3 vit_b_32 swin_t "
    "swin_v2_t maxvit_t"
).split()
"""The smallest of every family."""
BEGIN, END = "<!-- source: made by benchmarks/source_code.py --table -->", "<!-- source: end -->"


def families() -> list[ZooModel]:
    """The models to check."""
    return [*(m for m in zoo("torchvision") if m.name in TORCHVISION), *zoo("timm")]


def check(model: ZooModel) -> dict[str, Any]:
    """One network, halved and at full width."""
    warnings.simplefilter("ignore")
    model = small_picture(model)
    module = model.build()
    file = inspect.getsourcefile(type(module))
    found: dict[str, Any] = {"original lines": len(Path(file).read_text().splitlines()) if file else None}
    whole = in_both_modes(ifx.trace(module, (model.example(2),), role="teacher"))
    for key in ("halved", "full"):
        try:
            network = ifx.shrink(whole, ratio=0.5).value if key == "halved" else whole
            written = source_of(network)
        except IndistillError as error:
            found[key] = {"ok": None, "refused": str(error)}
            continue
        sides = [results(copy.deepcopy(m), model.example(4)) for m in (network.graph_module, written.build())]
        equal = [torch.equal(a, b) for a, b in zip(*sides, strict=True)]
        found[key] = {"ok": all(equal), "tensors": len(equal), "lines": len(written.text.splitlines())}
    return found


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
    networks: dict[str, Any] = record["networks"]
    both = [row[key] for row in networks.values() for key in ("halved", "full") if key in row]
    written = [one for one in both if one["ok"] is not None]
    right = sum(one["ok"] for one in written)
    halved = {name: row for name, row in networks.items() if row.get("halved", {}).get("ok") is not None}
    longest = max(row["halved"]["lines"] / row["original lines"] for row in halved.values())
    lines = [
        f"{len(networks)} of {len(families())} networks, one of each family, were tried. {right} of {len(written)} files that were "
        f"written ({len(halved)} for halved networks) are bit-identical to their graphs. The longest file, beside the original's, has "
        f"{longest:.2f} times its lines.",
        "",
        "| network, halved | equal tensors | lines | its original's file |",
        "|---|---|---|---|",
    ]
    for name, row in halved.items():
        one = row["halved"]
        told = str(one["tensors"]) if one["ok"] else "differs"
        lines.append(f"| {name} | {told} | {one['lines']} | {row['original lines']} |")
    lines += ["", *(f"- {name}: {why}" for name, row in networks.items() for why in missing(row))]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return "\n".join([*lines, "", f"({record['date'][:10]}; {versions})"])


def missing(row: dict[str, Any]) -> list[str]:
    """Why there is no file."""
    if "error" in row:
        return [row["error"]]
    return [f"{key}: {row[key]['refused'].splitlines()[0]}" for key in ("halved", "full") if row[key]["ok"] is None]


def main() -> None:
    """Check, print a line for each, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names that contain one of these, separated by commas")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the networks that are in the file")
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds for each")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--into", type=Path, help="the page whose table is replaced")
    options = parser.parse_args()
    if options.table:
        text = table(json.loads(options.table.read_text()))
        if options.into is None:
            print(text)
            return
        head, _, rest = options.into.read_text().partition(BEGIN)
        options.into.write_text(f"{head}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
        return
    import timm  # noqa: F401  imported once, before the forks

    networks = json.loads(options.out.read_text())["networks"] if options.resume and options.out.exists() else {}
    for model in families():
        if model.id in networks or not any(part in model.id for part in options.only.split(",")):
            continue
        networks[model.id] = in_process(check, model, options.limit, 16.0)
        print(model.id, networks[model.id], flush=True)
        if options.out:
            names = ("torch", "torchvision", "timm", "indistill-fx")
            told = {"versions": {name: version(name) for name in names}, "command": " ".join(sys.argv)}
            told["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            options.out.write_text(json.dumps({**told, "networks": networks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
