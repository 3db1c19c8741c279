"""Teacher and student traced, with inputs from the data where no others are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from indistill_fx.batch import Call, Inputs, samples_of, split
from indistill_fx.graph.view import View
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.plan import AlignmentPlan
from indistill_fx.traced import TracedModel


def view_of(asked: View | None, plan: AlignmentPlan | None) -> View | None:
    """The teacher's view that was asked for, else the plan's."""
    return asked if asked is not None or plan is None else plan.view


def traced_pair(
    teacher: nn.Module | TracedModel,
    student: nn.Module | TracedModel,
    loader: Iterable[Any],
    *,
    example_inputs: Any = None,
    logits: str | int | None = None,
    view: View | None = None,
) -> tuple[TracedModel, TracedModel]:
    """Both models traced, with inputs from the loader's first batch if no others are given.

    Raises:
        ConfigError: the loader's batches hold no inputs.
        FrontendError: a model cannot be traced.
    """
    examples: Sequence[Any] = (example_inputs, example_inputs)
    if example_inputs is None and not (isinstance(teacher, TracedModel) and isinstance(student, TracedModel)):
        examples = examples_of(loader, teacher, student)
    first = as_traced(teacher, examples[0], role="teacher", logits=logits, view=view)
    first = replace(first, view=View.combined(view, first.view))
    return first, as_traced(student, examples[1], role="student", logits=logits)


def examples_of(loader: Iterable[Any], *models: nn.Module | TracedModel) -> Sequence[Call]:
    """A few samples of the first batch as each model takes them."""
    inputs = [model.inputs if isinstance(model, TracedModel) else Inputs.of(model) for model in models]
    plain = [own for own in inputs if not own.by_number]
    parts = split(samples_of(next(iter(loader)), slice(4)), *plain, where="The training")
    read = iter(parts.calls)
    calls = [Call((torch.arange(2),)) if own.by_number else next(read) for own in inputs]
    modules = [model.module if isinstance(model, TracedModel) else model for model in models]
    devices = [next((p.device for p in module.parameters()), torch.device("cpu")) for module in modules]
    return [call.to(device) for call, device in zip(calls, devices, strict=True)]
