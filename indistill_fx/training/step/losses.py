"""The losses of a run's batches, read from the device now and then: reading one at once would wait for everything before it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Arriving = Callable[[bool], list[float] | None]
"""Asked whether to wait; the values, or None as long as they are under way."""

_EVERY = 50


class Losses:
    """Losses in the order of their batches.

    On a CPU, which is never behind, every one is known at once. Elsewhere so many are sent to the host together, and taken when they have
    arrived; only `rest` waits.

    Args:
        device: where the losses are.
        every: so many are sent together.
        send: begins to bring values (count,) to the host.
    """

    def __init__(self, device: torch.device, *, every: int = _EVERY, send: Callable[[Tensor], Arriving] | None = None):
        self._every = 1 if device.type == "cpu" else every
        self._send = send or (_sent_beside if device.type == "cuda" else _read)
        self._kept: list[Tensor] = []
        self._sent: list[tuple[int, Arriving]] = []

    @property
    def unread(self) -> int:
        """How many losses have not arrived yet."""
        return len(self._kept) + sum(count for count, _ in self._sent)

    def add(self, loss: Tensor) -> list[float]:
        """Store a batch's loss (); returns the losses that have arrived since the last call, oldest first."""
        self._kept.append(loss.detach())
        if len(self._kept) >= self._every:
            self._send_kept()
        return self._arrived(wait=False)

    def rest(self) -> list[float]:
        """Wait for all losses that have not arrived yet; returns them, oldest first."""
        self._send_kept()
        return self._arrived(wait=True)

    def _send_kept(self) -> None:
        if self._kept:
            self._sent.append((len(self._kept), self._send(torch.stack(self._kept))))
            self._kept.clear()

    def _arrived(self, *, wait: bool) -> list[float]:
        found: list[float] = []
        while self._sent:
            values = self._sent[0][1](wait)
            if values is None:
                break
            found += values
            self._sent.pop(0)
        return found


def _read(values: Tensor) -> Arriving:
    known: list[float] = values.tolist()
    return lambda wait: known


def _sent_beside(values: Tensor) -> Arriving:
    """Start a copy into page-locked memory, which the GPU makes asynchronously."""
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def arriving(wait: bool) -> list[float] | None:
        if wait:
            done.synchronize()
        elif not done.query():
            return None
        known: list[float] = host.tolist()
        return known

    return arriving
