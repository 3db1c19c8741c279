"""A small network, a plan and a run directory with any name in them."""

from __future__ import annotations

import json
from collections import OrderedDict

import torch
from torch import nn

from indistill_fx.plan import AlignmentPlan, ModelStamp, Pair
from tests.nets import unsettle

NASTY = [
    "</script><script>window.hit=1</script>",
    "\"><img src=x onerror='window.hit=1'>",
    "<!--<script>",
    "{{7*7}}{% raw %}",
    "`a` & 'b' \\\" \u2028 é ✨🦜\x00\x1b[31m",
    "n" * 500,
    "]]> --> ```\n# heading",
]


class Stage(nn.Module):
    def __init__(self, a: int, b: int, blocks: int):
        super().__init__()
        self.down = nn.Conv2d(a, b, 3, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(b, b, 3, 1, 1) for _ in range(blocks))

    def forward(self, x):
        x = self.down(x)
        for conv in self.convs:
            x = x + torch.relu(conv(x))
        return x


def network(width: int, blocks: int) -> nn.Module:
    sizes = [(3, width), (width, 2 * width)]
    body = OrderedDict((f"layer{k + 1}", Stage(a, b, blocks)) for k, (a, b) in enumerate(sizes))
    tail = OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), fc=nn.Linear(2 * width, 5))
    return unsettle(nn.Sequential(body | tail))


def nasty_plan(name: str) -> AlignmentPlan:
    def pair(k: int) -> Pair:
        return Pair(
            teacher=f"{name}{k}",
            student=f"s{name}{k}",
            teacher_shape=(2, 8, 4, 4),
            student_shape=(2, 3, 4, 4),
            kept=(0, 2, 7),
            score=0.9,
            reason=name,
        )

    stamp = ModelStamp(name=name, fingerprint=name)
    return AlignmentPlan(teacher=stamp, student=stamp, pairs=(pair(0), pair(1)), unmatched=(f"teacher `{name}`: no",))


def leave_run(home, *, name: str = "layer1", status: str = "done", **told) -> None:
    home.mkdir(parents=True, exist_ok=True)
    story = {
        "command": ["indistill-fx", "distill", name],
        "started": "2026-01-01T00:00:00",
        "settings": {"seed": 0, name: name},
        "schedule": [f"{name}: 2 epochs, adam", "main: 3 epochs, adam"],
        "teacher_accuracy": 0.9,
        "environment": {"versions": {"torch": name}},
        "status": status,
    } | told
    (home / "run.json").write_text(json.dumps(story))
    lines = [
        {"kind": "epoch", "epochs": k + 1, "step": k, "stage": stage, "epoch": epoch, "steps": 1, "loss": 1 / (k + 1)}
        | {"learning_rate": 0.1, "seconds": 1.5, "accuracy": 0.5 + k / 10 if stage == "main" else None}
        for k, (stage, epoch) in enumerate([(name, 1), (name, 2), ("main", 1), ("main", 2), ("main", 3)])
    ]
    (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    nasty_plan(name).save(home / "plan.json")
