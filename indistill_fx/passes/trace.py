"""Trace a module into a graph whose every node is known, and prove that the graph computes the same.

Rules, in order:
  1. Teachers are traced in eval mode, students in train mode; every flag is put back whatever happens.
  2. The rungs of the ladder are tried in turn; a refused rung and its reason are in the report.
  3. In-place operations are made out of place, so that a later one cannot overwrite a tensor that a tap holds.
  4. The graph is compared with the module on two batch sizes before it is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graphs import mode, shadow
from indistill_fx.passes.facts import infer_facts
from indistill_fx.passes.functionalize import functionalize
from indistill_fx.passes.names import name_taps
from indistill_fx.passes.symbolic import Captured, capture_symbolic
from indistill_fx.traced import Role, TracedModel, TraceReport

Rung = Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Sequence[str]], Captured]
_RUNGS: dict[str, Rung] = {"symbolic": capture_symbolic}


def trace(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Any],
    *,
    role: Role = "teacher",
    example_kwargs: Mapping[str, Any] | None = None,
    leaves: Sequence[str] = (),
    logits: str | int | None = None,
) -> TracedModel:
    """Trace `module` into a graph.

    Args:
        module: any PyTorch model. It is not changed.
        example_inputs: a tensor or a sequence of positional arguments, batch first; shapes are taken from it.
        role: `teacher` (eval mode, shares tensors but no flags with the module) or `student` (train mode, the graph calls the
            module's own leaf modules, so that training the graph trains the module).
        example_kwargs: keyword arguments of the forward call.
        leaves: paths of submodules to keep as one node.
        logits: key or index of the main output, for models that return several.

    Returns:
        The traced model.

    Raises:
        FrontendError: no rung of the ladder can trace it, or its forward fails on the example input.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    kwargs = dict(example_kwargs or {})
    training = role == "student"
    refused: list[str] = []
    with mode(module, training=training), torch.random.fork_rng(devices=[]):
        subject = module if training else shadow(module, training=False)
        for rung, capture in _RUNGS.items():
            try:
                captured = functionalize(capture(subject, inputs, kwargs, leaves))
                known = infer_facts(captured.graph_module, subject, inputs, kwargs, logits=logits)
            except FrontendError as error:
                refused.append(f"{rung}: {error.message}")
                if error.where == "forward":
                    raise
                continue
            report = TraceReport(
                rung=rung,
                refused=tuple(refused),
                leaves=captured.leaves,
                specialisations=captured.specialisations,
                checked=known.checked,
                notes=(*captured.notes, *known.notes),
            )
            return TracedModel(
                graph_module=captured.graph_module,
                facts=known.facts,
                aliases=name_taps(captured, known.facts),
                report=report,
                role=role,
                module=module,
                example_inputs=inputs,
                example_kwargs=kwargs,
                logits=known.logits,
            )
    raise FrontendError(
        f"{type(module).__name__} cannot be traced. " + " ".join(refused),
        where=type(module).__name__,
        hint="Keep the part that stops the trace as one node with leaves=[its path].",
    )
