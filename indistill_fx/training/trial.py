"""The first batch, before anything trains: whether a loss can be computed at all, however late in a run it comes."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError, IndistillError
from indistill_fx.graph.module_state import evaluating
from indistill_fx.losses.task import Task
from indistill_fx.stages.stage import Stage
from indistill_fx.system.nested import to_device
from indistill_fx.system.shortage import is_out_of_memory
from indistill_fx.traced import TracedModel


def users_own(main: object, task: Task) -> bool:
    """Whether a main loss or a task is the user's own code."""
    return not (isinstance(main, str) and ":" not in main) or not type(task).__module__.startswith("indistill_fx.")


def require_loss(module: nn.Module, batch: Any, name: str) -> str:
    """Compute a stage's loss of the first batch in eval mode, and leave everything as it was.

    Args:
        module: batch → loss.
        batch: the first.
        name: of the loss, for messages.

    Returns:
        A remark on weights that the loss reads and nothing trains; otherwise nothing.

    Raises:
        ConfigError: the loss fails, or is not a scalar that follows from what trains.
    """
    anchor = next((parameter for parameter in module.parameters() if parameter.requires_grad), None)
    if anchor is None or type(anchor) not in (Tensor, nn.Parameter):
        return ""  # nothing trains, or it is sharded, which needs all processes to run
    batch, trained = to_device(batch, anchor.device), {id(parameter) for parameter in module.parameters()}
    with evaluating(module), torch.enable_grad():
        try:
            loss = module(batch)
        except Exception as error:
            if isinstance(error, IndistillError) or is_out_of_memory(error):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise ConfigError(
                f"{name} fails on the first batch: {type(error).__name__}: {str(error).partition(chr(10))[0].rstrip('.')} "
                f"({last.filename}:{last.lineno}).",
                where=name,
                got=type(error).__name__,
                hint="Call it on a batch in Python first, to see what fails.",
            ) from error
    if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ConfigError(
            f"{name} returns {shown}, not one number.",
            where=name,
            got=shown,
            expected="a tensor of shape ()",
            hint="Let it return a mean or a sum over the batch.",
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"{name} returns a number that does not depend on the student, so it would train nothing.",
            where=name,
            expected="a tensor with a gradient",
            hint="Compute it from the student's outputs, without detach or item.",
        )
    strangers = [leaf for leaf in _leaves(loss) if id(leaf) not in trained]
    if not strangers:
        return ""
    shapes = ", ".join("x".join(map(str, leaf.shape)) or "scalar" for leaf in strangers[:3])
    return (
        f"{name} reads weights that are not trained ({shapes}{', …' if strangers[3:] else ''}): to train weights of its own, let it be a"
        " module that makes them in its __init__, or freeze them (requires_grad_(False))"
    )


def untrained(student: TracedModel, stages: Sequence[Stage]) -> list[str]:
    """A remark on parameters that make an output of the student, such as a second head, which no stage's loss reads."""
    reached = {id(parameter) for stage in stages for parameter in stage.student.parameters()}
    used = {id(parameter) for parameter in student.graph_module.parameters()} - reached
    names = [
        name
        for name, parameter in student.module.named_parameters()
        if id(parameter) in used and parameter.requires_grad
    ]
    if not names:
        return []
    shown = f"{', '.join(names[:4])}{', …' if names[4:] else ''}"
    return [f"not trained: {shown}. They make an output that no loss reads, and keep the values they have"]


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that a loss has gradients for."""
    found: list[Tensor] = []
    todo, seen = [loss.grad_fn], {loss.grad_fn}
    while todo:
        node = todo.pop()
        if node is None:
            continue
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        new = [source for source, _ in node.next_functions if source not in seen]
        seen.update(new)
        todo += new
    return found
