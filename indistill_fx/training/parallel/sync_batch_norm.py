"""Batch norm over the batches of all processes together, so that a run does not depend on how many there are.

torch's own SyncBatchNorm is another class of module, and refuses CPUs; here the student's own layers do it, for as long
as they are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(slots=True)
class Share:
    """What one process has of the batch at hand.

    Attributes:
        counts: whether its samples do: False for a sample of zeros that stands for none.
    """

    counts: bool = True


@contextmanager
def batch_norms_synced(module: nn.Module) -> Iterator[Share]:
    """Within the block, every batch norm in train mode takes its statistics over all processes' inputs.

    All processes must call the module alike. In eval mode nothing is exchanged.

    Args:
        module: its batch norms are changed back when the block ends.

    Yields:
        To be set, before every call: whether this process's samples count.
    """
    norms, share = [part for part in module.modules() if _can_sync(part)], Share()
    for norm in norms:
        norm.forward = partial(_synced_batch_norm, norm, share)
    try:
        yield share
    finally:
        for norm in norms:
            del norm.forward


def unsynced_batch_norms(module: nn.Module, *, without: nn.Module | None = None) -> int:
    """How many batch norms of a stage are computed by other code than torch.nn's, which `batch_norms_synced` leaves alone.

    Args:
        module: the stage.
        without: a part of it that does not count: the teacher, whose norms are in eval mode.
    """
    left_out = set(without.modules()) if without is not None else set()
    parts = [part for part in module.modules() if part not in left_out]
    unsynced = [part for part in parts if isinstance(part, _BatchNorm) and not _can_sync(part)]
    graphs = [part.graph for part in parts if isinstance(part, fx.GraphModule)]
    calls = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return len(unsynced) + sum("batch_norm" in str(getattr(node.target, "__name__", node.target)) for node in calls)


def _can_sync(part: nn.Module) -> bool:
    return isinstance(part, _BatchNorm) and type(part).forward is _BatchNorm.forward


def _synced_batch_norm(norm: Any, share: Share, x: Tensor) -> Tensor:
    if not norm.training:
        return _BatchNorm.forward(norm, x)
    norm._check_input_dim(x)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    local_count = torch.full((1,), share.counts * x.numel() // x.shape[1], dtype=wide.dtype, device=x.device)
    own_mean = wide.mean(axes) if x.numel() else wide.sum(axes)
    totals = _summed(torch.cat((own_mean * local_count, local_count)))
    count, mean = totals[-1], totals[:-1] / totals[-1]
    # Squared deviations from the common mean: plain sums of squares would lose the digits of a small variance.
    variance = _summed(share.counts * (wide - mean.view(shape)).square().sum(axes)) / count
    _remember(norm, mean.detach(), variance.detach(), count.detach())
    scale = torch.rsqrt(variance + norm.eps)
    out = (wide - mean.view(shape)) * scale.view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


@torch.no_grad()
def _remember(norm: Any, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update the running statistics, as torch does."""
    if norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    share = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    unbiased = variance * (count / (count - 1).clamp(min=1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """The sum over all processes; in the backward pass, the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _summed(value: Tensor) -> Tensor:
    summed: Tensor = _Sum.apply(value)
    return summed
