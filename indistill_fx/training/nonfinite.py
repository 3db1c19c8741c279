"""Where a loss that is not finite comes from: the batch, or the first layer of teacher or student that gives such a value."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from indistill_fx.batch import split
from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.graph.edit import layer_of
from indistill_fx.graph.interpret import run_looking
from indistill_fx.stages.stage import Stage
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import tensors_of

IN_BATCH = "the batch itself holds values that are not finite"


def require_finite(model: nn.Module, role: str) -> None:
    """Refuse a model that cannot compute anything: weights that are not finite, or buffers that hold NaN.

    Infinite buffers are meant where they are masks, or the bounds of an observer that has seen nothing; the statistics of norms are not.

    Args:
        model: whose tensors are looked at.
        role: teacher or student, for the message.

    Raises:
        ConfigError: it is one; names the tensors.
    """
    found = [
        f"{prefix}{'.' if prefix else ''}{name}"
        for prefix, part in model.named_modules()
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
        if _unusable(tensor, all_finite=isinstance(tensor, nn.Parameter) or hasattr(part, "track_running_stats"))
    ]
    if found:
        more = f" and {len(found) - 3} more" if found[3:] else ""
        names = ", ".join(f"`{name}`" for name in found[:3])
        raise ConfigError(
            f"The {role}'s {names}{more} {'is' if len(found) == 1 else 'are'} not finite, so its outputs would be meaningless.",
            where=found[0],
            got="NaN or infinity",
            expected="finite numbers",
            hint="Load other weights, or check how these were converted (float16 ends at 65504).",
        )


def _unusable(tensor: Tensor, *, all_finite: bool) -> bool:
    if is_lazy(tensor) or tensor.is_quantized or tensor.is_meta:
        return False
    if not tensor.is_floating_point() and not tensor.is_complex():
        return False
    values = tensor.detach().coalesce().values() if tensor.is_sparse else tensor.detach()
    return not bool(values.isfinite().all()) if all_finite else bool(values.isnan().any())


def first_not_finite(stage: nn.Module, batch: Any) -> str:
    """Run a stage's graphs once more, layer by layer, and say where the first value that is not finite appears.

    Args:
        stage: a `Stage`, or any module batch → loss, of which nothing but the batch is looked at.
        batch: the one that failed.

    Returns:
        Words such as `first in the student at blocks.1`; empty where nothing was found.
    """
    if any(_bad(entry) or _bad(-entry) for entry in tensors_of(batch) if entry.is_floating_point()):
        return IN_BATCH
    if not isinstance(stage, Stage):
        return ""
    for role, graph in (("teacher", stage.teacher), ("student", stage.student)):
        if graph is not None and (found := _first_bad(graph, batch)):
            return f"first in the {role} at `{found}`"
    return ""


def not_finite_error(where: str, problem: str, *, kept: bool) -> TrainError:
    """The error that stops a run.

    Args:
        where: stage, epoch and step.
        problem: which value is not finite.
        kept: whether there is a checkpoint from before.
    """
    return TrainError(
        f"Training stopped in {where}: {problem}.",
        where=where,
        got=problem,
        expected="a finite number",
        hint=(
            "Correct or leave out its samples."
            if problem.endswith(IN_BATCH)
            else "Lower the learning rate, or set clip_norm (--clip-norm)."
        )
        + (" The last checkpoint is intact." if kept else ""),
    )


class _FoundError(Exception):
    """Ends the layer-by-layer run at the first value that is not finite."""


def _first_bad(graph: fx.GraphModule, batch: Any) -> str:
    found: list[str] = []

    def look(node: fx.Node, value: Any) -> None:
        if node.op not in ("placeholder", "get_attr", "output") and _bad(value):
            found.append(layer_of(node) if node.op == "call_module" else node.name)
            raise _FoundError

    inputs = Inputs.of(graph)
    given = split(batch, inputs, where="The graph").calls[0].by_name(inputs.names)
    with torch.no_grad(), suppress(_FoundError):
        run_looking(graph, look, *given.values())
    return found[0] if found else ""


def _bad(value: Any) -> bool:
    """Whether there is NaN or plus infinity; minus infinity is allowed, because attention masks use it."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return bool((value.isnan() | value.isposinf()).any())
