"""Which output of each model holds the logits, where models were trained or exported with one named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from indistill_fx.batch import call_of
from indistill_fx.evaluation.outputs import outputs_of
from indistill_fx.graph.main_output import entries
from indistill_fx.graph.module_state import evaluating
from indistill_fx.loading.load import Source
from indistill_fx.system.model_inputs import Inputs

Entry = str | int | None


def logits_of_each(
    asked: Entry, teachers: Sequence[Source], student: Source, example: Any
) -> tuple[list[Entry], Entry]:
    """The teachers' and the student's, each as asked, else as the model keeps it.

    A student that keeps none uses a teacher's name if one of its outputs has that name.

    Args:
        asked: for all of them.
        teachers: in order.
        student: the model to train.
        example: inputs as the student takes them.
    """
    if asked is not None:
        return [asked] * len(teachers), asked
    kept = [teacher.logits for teacher in teachers]
    names = [name for name in kept if isinstance(name, str)]
    if student.logits is not None or not names:
        return kept, student.logits
    call = call_of(example, Inputs.of(student.module), where="The student")
    with evaluating(student.module), torch.no_grad():
        known = entries(outputs_of(student.module, call)) or {}
    return kept, next((name for name in names if name in known), None)
