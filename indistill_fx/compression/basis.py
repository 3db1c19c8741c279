"""What a student is made from: the teacher, traced so that it keeps, where possible, what its code does in train mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np

from indistill_fx.errors import FrontendError
from indistill_fx.graph.computed_weights import is_computed, left_behind, write_out_weights
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import Analysis, analyse
from indistill_fx.traced import TracedModel


def in_both_modes(
    teacher: TracedModel, logits: str | int | None = None, say: Callable[[str], None] = lambda text: None
) -> TracedModel:
    """The teacher traced as a student is, so that what its code does by `self.training` stays in what is made of it.

    Rules, in order:
      1. Weights that are recomputed at every call (weight norm, spectral norm, masks) become parameters of their present value.
      2. Where the two modes cannot be brought together, or where train mode keeps work from going that eval mode lets go, it is the teacher
         as it was traced: in eval mode.

    Args:
        teacher: as it was traced.
        logits: key or index of the main output.
        say: called with a line where rule 2 holds.
    """
    module = teacher.module
    if any(map(is_computed, module.modules())):
        module = copy.deepcopy(module, left_behind(module))
        write_out_weights(module)
        say(
            "Weights that the teacher recomputes at every call (weight norm, spectral norm, masks) become plain parameters of the student."
        )
    try:
        found = trace(module, teacher.example, role="student", logits=logits)
    except FrontendError:
        why = "the teacher's code for train mode cannot be traced"
    else:
        apart = "the teacher's train mode and eval mode do not fit into one graph"
        why = apart if found.report.lacks_eval_mode else ""
        if not why and _fixed_macs(analyse(found)) <= _fixed_macs(analyse(teacher)):
            return found
        why = why or "operations that it only does in train mode would keep channels from being removed"
    say(f"In train mode, too, the student computes what the teacher computes in eval mode, because {why}.")
    return teacher


def train_as(teacher: TracedModel, student: TracedModel) -> None:
    """Set which parameters of a student, made of a teacher, are trained.

    Rules, in order:
      1. All, where the teacher trains none: it was frozen to be a teacher.
      2. What the teacher does not train stays as it is if nothing of it was removed: fixed filters, a fixed scale.
      3. All others: the rest of a layer has to make up for what was removed.
    """
    given = dict(teacher.graph_module.named_parameters())
    some = any(parameter.requires_grad for parameter in given.values())
    for name, parameter in student.graph_module.named_parameters():
        kept = name in given and not given[name].requires_grad and given[name].shape == parameter.shape
        parameter.requires_grad_(parameter.is_floating_point() and not (some and kept))


def _fixed_macs(known: Analysis) -> int:
    """Multiply-accumulates of the layers that cannot be reduced."""
    stay = np.zeros(len(known.classes.scores), dtype=bool)
    stay[[*known.classes.reasons]] = True
    return known.cost.macs(stay)
