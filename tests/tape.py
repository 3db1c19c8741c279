"""A stand-in for CUDA graphs on a CPU: what is recorded are torch's operations and the memory they read and write, and no Python.

Recording leaves everything as it was; a replay runs the same operations over the same memory. So what a real graph would do wrong, going on
with values of its recording, this one does wrong too.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[Any, Any, Any, Any], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.note(func, args, kwargs or {}, result)
        return result


class Tape:
    """A recorder of steps (`training.step.recorded.Recorder`).

    Attributes:
        eager: how many steps ran as they are where they would be recorded.
        recordings: how many there are.
        replays: how often one was replayed.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.eager = self.recordings = self.replays = 0

    def beside(self, run: Callable[[], Tensor]) -> Tensor:
        self.eager += 1
        return run()

    @contextmanager
    def waiting(self) -> Iterator[list[str]]:
        """On a GPU these read a value: here they are named by their operation."""
        found: list[str] = []

        def note(func, args, kwargs, result) -> None:
            if func is torch.ops.aten._local_scalar_dense.default:
                found.append("own.py:7")

        with _Operations(note):
            yield found

    def host_draws(self) -> object:
        """Torch's generator of the CPU is the device's own here."""
        return random.getstate(), repr(np.random.get_state(legacy=False))

    def device_draws(self) -> Tensor:
        return torch.get_rng_state()

    def draw_again(self, state: Tensor) -> None:
        torch.set_rng_state(state)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        operations: list[tuple[Any, ...]] = []

        def note(*operation: Any) -> None:
            assert operation[0] is not torch.ops.aten._local_scalar_dense.default, "read in a recording"
            operations.append(operation)

        living = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
        before = [
            (value, value.detach().clone())
            for value in living
            if value.layout is torch.strided and 0 not in value.stride()
        ]
        state = torch.get_rng_state()
        try:
            with _Operations(note):
                run()
        finally:
            with torch.no_grad():
                for value, saved in before:
                    value.detach().copy_(saved)
            torch.set_rng_state(state)
        return lambda: self._replay(operations)

    @torch.no_grad()
    def _replay(self, operations: list[tuple[Any, ...]]) -> None:
        self.replays += 1
        for func, args, kwargs, result in operations:
            found = func(*args, **kwargs)
            for own, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                if isinstance(own, Tensor) and own.data_ptr() != new.data_ptr():
                    own.copy_(new)
