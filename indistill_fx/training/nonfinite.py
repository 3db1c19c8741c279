"""Where a loss that is not finite comes from: the batch, or the first layer of teacher or student that gives such a value."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.batch import split
from indistill_fx.errors import TrainError
from indistill_fx.graph.edit import layer_of
from indistill_fx.stages.stage import Stage


def first_not_finite(stage: nn.Module, batch: Any) -> str:
    """Run a stage's graphs once more, layer by layer, and say where the first value that is not finite appears.

    Args:
        stage: a `Stage`, or any module batch → loss, of which nothing but the batch is looked at.
        batch: the one that failed.

    Returns:
        Words such as `first in the student at blocks.1`; empty where nothing was found.
    """
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    if any(_bad(entry) or _bad(-entry) for entry in entries if isinstance(entry, Tensor) and entry.is_floating_point()):
        return "the batch itself holds values that are not finite"
    if not isinstance(stage, Stage):
        return ""
    for role, graph in (("teacher", stage.teacher), ("student", stage.student)):
        if graph is not None:
            watch = _Watch(graph)
            with torch.no_grad(), suppress(_FoundError):
                watch.run(*split(batch, stage.inputs, stage=stage.name).inputs)
            if watch.found:
                return f"first in the {role} at `{watch.found}`"
    return ""


def not_finite_error(where: str, what: str, *, kept: bool) -> TrainError:
    """The error that stops a run.

    Args:
        where: stage, epoch and step.
        what: is not finite.
        kept: whether there is a checkpoint from before.
    """
    return TrainError(
        f"Training stopped in {where}: {what}.",
        where=where,
        got=what,
        expected="a finite number",
        hint="Lower the learning rate, set clip_norm, or look at the batch for values that are not finite."
        + (" The last checkpoint is good." if kept else ""),
    )


class _FoundError(Exception):
    """Ends the run at the first value."""


class _Watch(fx.Interpreter):
    """Runs a graph until a value is not finite."""

    found = ""

    def run_node(self, n: fx.Node) -> Any:
        """The node's value."""
        value = super().run_node(n)
        if n.op not in ("placeholder", "get_attr", "output") and _bad(value):
            self.found = layer_of(n) if n.op == "call_module" else n.name
            raise _FoundError
        return value


def _bad(value: Any) -> bool:
    """NaN or infinity; minus infinity is what attention masks are made of."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return bool((value.isnan() | value.isposinf()).any())
