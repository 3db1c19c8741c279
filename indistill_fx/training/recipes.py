"""Whole ways of training by name: arguments of `distill`, and of the run that makes an assistant.

ifx.distill(teacher, student, loader, **RECIPES["paper"].student)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from indistill_fx.curriculum import Curriculum


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a student is trained, and before it an assistant, where there is one.

    Attributes:
        summary: what it is, in a line.
        student: arguments of `distill`.
        assistant: those that differ for teacher → assistant.
    """

    summary: str
    student: Mapping[str, Any]
    assistant: Mapping[str, Any]


NO_WARMUP = Curriculum(lengths=[])
DEFAULT_CURRICULUM = Curriculum(lengths=1, penultimate=3)

RECIPES: dict[str, Recipe] = {
    # The penultimate vectors, and short stages: what paid best for KD on the paper's pair, early on and in the end (docs/results.md).
    "default": Recipe(
        "An epoch of MSE a pair and three for the penultimate vectors, then KD; an assistant learns by KD alone.",
        student={"main": "kd", "epochs": 20, "curriculum": DEFAULT_CURRICULUM},
        assistant={"curriculum": NO_WARMUP},
    ),
    # What paid best for PKT on the paper's pair, at equal epochs in all and at equal main epochs (docs/results.md).
    "retrieval": Recipe(
        "For features that are compared: 12 epochs of MSE on the penultimate vectors, then PKT, 18 epochs at 1e-3 and 3 at 1e-4.",
        student={
            "main": "pkt",
            "epochs": 21,
            "curriculum": Curriculum(lengths=[], penultimate=12),
            "schedule": "step",
            "milestones": [18],
            "gamma": 0.1,
        },
        assistant={"curriculum": NO_WARMUP, "epochs": 33, "milestones": [30]},
    ),
    # For a student made of the teacher: all pairs at once, then KD (docs/compress.md).
    "compress": Recipe(
        "For a student made of the teacher: 6 epochs of MSE for all pairs at once, then KD for 14, cosine.",
        student={
            "main": "kd",
            "epochs": 14,
            "curriculum": Curriculum(together=True, lengths=6),
            "schedule": "cosine",
        },
        assistant={"curriculum": NO_WARMUP},
    ),
    # Source: Sarridis et al., "InDistill", arXiv:2205.10003, section 4, and the authors' code: 60 epochs at 1e-3 and 10 at
    # 1e-4, the warm-up's 12 counted; batches of 128. Deviations: the curriculum's own (see there), and the warm-up takes
    # 3 + 4 + … epochs of however many pairs there are before the 58.
    "paper": Recipe(
        "The paper's: 3, 4, 5, … epochs of MSE, then PKT for 48 epochs at 1e-3 and 10 at 1e-4; an assistant by 50 of PKT.",
        student={
            "main": "pkt",
            "epochs": 58,
            "curriculum": Curriculum(a=2, loss="mse", learning_rate=1e-3, optimizer="adam"),
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "weight_decay": 0.0,
            "schedule": "step",
            "milestones": [48],
            "gamma": 0.1,
        },
        assistant={"curriculum": NO_WARMUP, "epochs": 50, "schedule": "constant", "milestones": []},
    ),
}
