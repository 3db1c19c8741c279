"""Teacher and student of a run, traced with inputs from the loader's first batch; the teacher with its view of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from indistill_fx.batch import call_of, split
from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import device_of, uncompiled
from indistill_fx.graph.view import View
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.ensemble import is_ensemble
from indistill_fx.plan import AlignmentPlan
from indistill_fx.stages.teacher_view import known_view
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import samples_of
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
    say: Callable[[str], None] = lambda line: None,
) -> tuple[TracedModel, TracedModel]:
    """Both models traced, with inputs from the loader's first batch if no others are given.

    A plain teacher without a view sees images as its weights are known to want them, where the loader says how its own are normalised.

    Args:
        teacher: traced, or a plain module.
        student: likewise.
        loader: of the batches.
        example_inputs: as the student takes them.
        logits: see `trace`.
        view: what the teacher sees.
        say: called with what is known, and what is not, of images that teacher and loader know.

    Raises:
        ConfigError: the loader's batches hold no inputs, or the two share what is to be trained.
        FrontendError: a model cannot be traced.
    """
    modules = [model.module if isinstance(model, TracedModel) else model for model in (teacher, student)]
    require_apart(*modules)
    examples: Sequence[Any] = (example_inputs, example_inputs)
    if example_inputs is None and not (isinstance(teacher, TracedModel) and isinstance(student, TracedModel)):
        examples = examples_of(loader, teacher, student)
    if view is None and not isinstance(teacher, TracedModel) and not is_ensemble(teacher):
        call = call_of(examples[0], Inputs.of(uncompiled(teacher)), where="The teacher")
        view, notes = known_view(uncompiled(teacher), call, getattr(loader, "figures", None))
        for note in notes:
            say(note)
    first = as_traced(teacher, examples[0], role="teacher", logits=logits, view=view)
    first = replace(first, view=View.combined(view, first.view))
    return first, as_traced(student, examples[1], role="student", logits=logits)


def examples_of(loader: Iterable[Any], *models: nn.Module | TracedModel) -> Sequence[Call]:
    """A few samples of the first batch as each model takes them."""
    inputs = [model.inputs if isinstance(model, TracedModel) else Inputs.of(model) for model in models]
    plain = [taken for taken in inputs if not taken.by_number]
    parts = split(samples_of(next(iter(loader)), slice(4)), *plain, where="The training")
    read = iter(parts.calls)
    calls = [Call((torch.arange(2),)) if taken.by_number else next(read) for taken in inputs]
    modules = [model.module if isinstance(model, TracedModel) else model for model in models]
    return [call.to(device_of(module)) for call, module in zip(calls, modules, strict=True)]


def require_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a student whose training would change its teacher.

    Raises:
        ConfigError: a parameter of the student that is trained is the teacher's too.
    """
    tensors = {
        p.untyped_storage().data_ptr(): name for name, p in teacher.named_parameters() if p.numel() and not p.is_meta
    }
    trained = [(name, p) for name, p in student.named_parameters() if p.requires_grad and p.numel() and not p.is_meta]
    for name, parameter in trained:
        known = tensors.get(parameter.untyped_storage().data_ptr())
        if known is not None:
            raise ConfigError(
                f"`{name}` of the student is `{known}` of the teacher, so that training would change the teacher.",
                where=name,
                hint="Give the student a copy (copy.deepcopy), or freeze what the two share (requires_grad_(False)).",
            )
