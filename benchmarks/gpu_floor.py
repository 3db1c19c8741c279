"""How far a stage is from what its card can do: operations and bytes counted, ceilings measured.

The floor of a step is the time of its convolutions and matrix products, each at the larger of two times: its operations at the card's best
rate, its bytes (what it reads and writes) at the card's best bandwidth. Everything else is taken to cost nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Row = dict[str, Any]


def sync(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def best_of(run: Callable[[], Any], device: str, count: int) -> float:
    """The least seconds of so many runs."""
    best = float("inf")
    for _ in range(count):
        sync(device)
        start = time.perf_counter()
        run()
        sync(device)
        best = min(best, time.perf_counter() - start)
    return best


def ceilings(device: str, dtype: torch.dtype, tiny: bool) -> Row:
    """Operations a second of one large matrix product in that dtype, and bytes a second of one large copy."""
    side, length = (256, 1 << 20) if tiny else (8192, 1 << 28)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(length, device=device)
    target = torch.empty_like(source)
    return {
        "operations a second": 2 * side**3 / best_of(lambda: a @ b, device, 10),
        "bytes a second": 2
        * source.numel()
        * source.element_size()
        / best_of(lambda: target.copy_(source), device, 10),
    }


class _Counted(TorchDispatchMode):
    """Operations and bytes of every call that torch's counter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            size = sum(t.numel() * t.element_size() for t in tensors.values())
            self.calls.append((count(*args, **(kwargs or {}), out_val=result), size))
        return result


def floor(loss_of: nn.Module, x: Tensor, dtype: torch.dtype, limits: Row) -> Row:
    """The floor of a training step, in milliseconds, and what was counted."""
    with _Counted() as counted:
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(x)
        loss.backward()
    loss_of.zero_grad(set_to_none=True)
    times = [max(o / limits["operations a second"], b / limits["bytes a second"]) for o, b in counted.calls]
    return {
        "floor ms": 1e3 * sum(times),
        "operations": sum(o for o, _ in counted.calls),
        "bytes": sum(b for _, b in counted.calls),
    }
