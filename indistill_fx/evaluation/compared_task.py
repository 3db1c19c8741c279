"""The task by which a file and a model are compared on data: what both of them decide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from indistill_fx.batch import split
from indistill_fx.errors import ConfigError
from indistill_fx.evaluation.kept_task import asked_or_kept, kept_facts
from indistill_fx.evaluation.outputs import outputs_of, select_logits
from indistill_fx.graph.module_state import evaluating
from indistill_fx.loading.load import Source
from indistill_fx.losses.choose_task import choose_task, compared_input
from indistill_fx.losses.task import Task
from indistill_fx.system.model_inputs import Inputs


def task_shown(source: Source, batch: Any, asked: str | None, logits: str | int | None) -> tuple[Task | None, str]:
    """The task as asked, as the model keeps it, or as a batch shows it (None: it shows none), and in words whence it is known.

    Raises:
        ConfigError: what was asked, or is kept, does not fit the batch.
    """
    task, origin = asked_or_kept(asked, source)
    parts = split(batch, Inputs.of(source.module), where="The model")
    with evaluating(source.module), torch.no_grad():
        outputs = outputs_of(source.module, parts.calls[0])
    if parts.labels is None and task is None:
        return None, origin
    try:
        scores = select_logits(outputs, logits)
        tokens = compared_input(parts.calls[0].tensors, parts.labels)
        return choose_task(task, scores, parts.labels, tokens), origin
    except ConfigError:
        if task is not None:
            raise
        return None, origin


def decisions_of(task: Task | None) -> Callable[[Tensor], Tensor | None] | None:
    """The function that turns a model's outputs into decisions, by its task."""
    return None if task is None else lambda output: task.decisions(task.prepare(output, None)[0])


def facts_to_keep(asked: str | None, task: Task | None, source: Source) -> Mapping[str, Any] | None:
    """What a file made of a model keeps of its task: what was asked for, else what the model keeps. What was inferred is not kept.

    Args:
        asked: a name or `file.py:task`.
        task: what came of it; None: no labels were read, so it is not known.
        source: the model.
    """
    if asked is None or task is None:
        return source.task
    return kept_facts(task, asked if ":" in asked else "")
