"""Whole ways of training by name: arguments of `distill`, and of the run that makes an assistant.

ifx.distill(teacher, student, loader, **RECIPES["paper"].student)

And `default_curriculum`: the warm-up that is used if none is requested.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from indistill_fx.curriculum import PAIRS, Budget, Curriculum
from indistill_fx.graph.ops import op_name
from indistill_fx.plan import MADE, AlignmentPlan
from indistill_fx.system.files import read_json
from indistill_fx.traced import TracedModel


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
"""Where a warm-up is asked for, but not which: what paid best for KD on the paper's pair, early on and in the end (docs/results.md)."""

RECIPES: dict[str, Recipe] = {
    "default": Recipe(
        "The warm-up that pays for such a pair, then KD; an assistant learns by KD alone.",
        student={"main": "kd", "epochs": 20, "curriculum": None},
        assistant={"curriculum": NO_WARMUP},
    ),
    # The best schedule for PKT on the paper's pair, at equal total epochs and at equal main epochs (docs/results.md).
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
    # For a student made from the teacher: all pairs at once, then KD (docs/compress.md).
    "compress": Recipe(
        "For a student made from the teacher: 6 epochs of MSE for all pairs at once, then KD for 14, cosine.",
        student={
            "main": "kd",
            "epochs": 14,
            "curriculum": Curriculum(together=True, lengths=6),
            "schedule": "cosine",
        },
        assistant={"curriculum": NO_WARMUP},
    ),
    # Source: Sarridis et al., "InDistill", arXiv:2205.10003, section 4, and the authors' code: 60 epochs at 1e-3 and 10 at
    # 1e-4, including the warm-up's 12; batches of 128. Here the warm-up takes 3 + 4 + … epochs, one term per pair, before the
    # main stage's 58. For what else differs see `Curriculum`.
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


_LEAST_STEPS_MADE, _LEAST_STEPS_NEW = 20, 90
"""Optimiser steps from which on a warm-up has paid, for students made from the teacher and for those with new weights: on CIFAR-10 these
lost with 15 to 60 steps and gained with 90 (on digits they gained with 40 already; docs/results.md)."""
_SMALL = 0.2
"""With new weights and less than this share of the teacher's MACs, a warm-up was not seen to pay on CIFAR-10."""


def default_curriculum(
    teacher: TracedModel,
    student: TracedModel,
    plan: AlignmentPlan,
    main: Budget,
    batches: int | None,
    task: str = "classification",
) -> tuple[Curriculum, str]:
    """The warm-up that pays for such a pair, by the map of docs/results.md.

    A student of the teacher's own kind (the same convolutions, linear layers and attentions in the same order, in any widths) can
    hold the teacher's features, and learns all pairs at once for half as long as the main stage; one of another kind cannot, and has
    none. Nor has one of another task than classification, unless it was made from the teacher: there a warm-up was not seen to pay
    (docs/tasks.md).

    Args:
        teacher: traced.
        student: traced.
        plan: their pairs.
        main: length of the main stage.
        batches: of an epoch; None: not known.
        task: its name.

    Returns:
        The curriculum, and a line that says why.
    """
    share = student.macs / max(teacher.macs, 1)
    length = main.length // 2
    steps = length if main.unit == "steps" else length * batches if batches is not None else None
    made = any(pair.reason == MADE for pair in plan.pairs)
    least = least_steps(share, made=made)
    size = f"{100 * share:.2g}% of the teacher's MACs"
    if not plan.pairs:
        return NO_WARMUP, "no warm-up: the two have no layers that can be paired"
    if not made and _work(teacher) != _work(student):
        # the MACs of a black box are unknown
        return NO_WARMUP, "no warm-up: the student is of another kind" + (f", with {size}" if share <= 1 else "")
    if not made and task != "classification":
        return NO_WARMUP, f"no warm-up: it was measured to pay for classification, and the task is {task}"
    if least is None:
        return NO_WARMUP, f"no warm-up: the student has new weights and {size}, which was measured to be too few"
    if length == 0:
        return (
            NO_WARMUP,
            f"no warm-up: the main stage is {Budget(main.length, main.unit)}, too short for a warm-up of half its length",
        )
    if steps is not None and steps < least:
        whose = "made of the teacher" if made else "with new weights"
        return (
            NO_WARMUP,
            f"no warm-up: half of the main stage is {steps} steps, but for a student {whose} it pays only from {least} steps on",
        )
    kind = "was made of the teacher" if made else "is of the teacher's kind"
    return Curriculum(together=True, lengths=length, unit=main.unit), f"warm-up: the student {kind}"


def least_steps(share: float, *, made: bool) -> int | None:
    """How many optimiser steps a warm-up needs to pay, for a student with this share of the teacher's MACs; None: it was not seen to.

    Args:
        share: of the teacher's MACs.
        made: the student was made from the teacher; else it has new weights.
    """
    return _LEAST_STEPS_MADE if made else _LEAST_STEPS_NEW if share >= _SMALL else None


def _work(model: TracedModel) -> list[str]:
    """The arithmetic operations in order, without dropout and the like, which depend on the mode."""
    nodes = model.graph_module.graph.nodes
    return [op_name(node) for node in nodes if node.name in model.facts and model.facts[node.name].macs]


def kept_curriculum(run_dir: Path) -> tuple[Curriculum, str] | None:
    """What `default_curriculum` had chosen for the run in a directory; None where that cannot be read."""
    try:
        phases = read_json(run_dir / "run.json", 1 << 26)["phases"]
        lengths = {phase["name"]: (phase["length"], phase["unit"]) for phase in phases if not phase["main"]}
        if not lengths:
            return NO_WARMUP, ""
        length, unit = lengths[PAIRS]
        return Curriculum(together=True, lengths=length, unit=unit), ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
