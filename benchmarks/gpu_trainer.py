"""The trainer's own pace on the paper's pair, with pictures of CIFAR-10's size in memory: steps a second, and the paper's 70 epochs."""

from __future__ import annotations

import time
from itertools import groupby
from typing import Any

import torch

import indistill_fx as ifx
from benchmarks.gpu_ways import Row, paper
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.training.recipes import RECIPES

_MAIN = 58
"""Epochs of the paper's main stage; its warm-up has 3, 4 and 5."""
_LONGEST = 40.0
"""The 70 epochs are run where they are reckoned to take no more seconds."""


def loader(tiny: bool) -> MemoryLoader:
    """As many random pictures as CIFAR-10 has, augmented as usual, in batches of 128."""
    torch.manual_seed(0)
    count = 256 if tiny else 50_000
    images, labels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,))
    return MemoryLoader(images, labels, mean=(0.5,) * 3, std=(0.25,) * 3, shuffle=True, augment=FlipAndCrop())


def trainer(device: str, tiny: bool) -> Row:
    """`distill` in few epochs, recorded and not, and the recipe reckoned from the last epoch of each stage; validation is not counted."""
    found: Row = {}
    short = {"schedule": "constant", "milestones": [], "curriculum": ifx.Curriculum(lengths=1 if tiny else 3)}
    for graphs in ("auto", False):
        record = distilled(device, tiny, graphs=graphs, **short, epochs=1 if tiny else 3)
        first, last = ({}, {})
        for name, epochs in groupby(record.epochs, key=lambda epoch: epoch.stage):
            own = list(epochs)
            first[name], last[name] = own[0], own[-1]
        lengths = [*range(3, len(last) + 2), _MAIN]
        found["recorded" if graphs == "auto" else "as they are"] = {
            "steps a second": {name: epoch.steps / epoch.seconds for name, epoch in last.items()},
            "share of time waiting for data": {name: epoch.waiting / epoch.seconds for name, epoch in last.items()},
            "peak MiB": {name: (epoch.peak_memory or 0) / 2**20 for name, epoch in last.items()},
            "losses": {name: epoch.loss for name, epoch in last.items()},
            "70 epochs, reckoned seconds": sum(
                first[name].seconds + (length - 1) * last[name].seconds
                for name, length in zip(last, lengths, strict=True)
            ),
            "notes": {stage.name: list(stage.notes) for stage in record.stages},
        }
    return found


def recipe(device: str, tiny: bool, reckoned: float) -> Row | None:
    """The paper's recipe as it stands, recorded where it can be: seconds of its 70 epochs; None: it is reckoned to take too long."""
    if reckoned > _LONGEST:
        return None
    began = time.monotonic()
    record = distilled(device, tiny, graphs="auto")
    taken = time.monotonic() - began
    return {"epochs": len(record.epochs), "seconds": record.seconds, "seconds with everything": taken}


def distilled(device: str, tiny: bool, **options: Any) -> ifx.RunRecord:
    """A run by the paper's recipe, but for these options."""
    torch.manual_seed(0)
    arguments = {**RECIPES["paper"].student, **options}
    return ifx.distill(*paper(), loader(tiny), progress=False, device=device, **arguments)
