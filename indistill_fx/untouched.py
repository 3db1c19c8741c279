"""Run somebody else's module and leave it as it was found."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@contextmanager
def weights_kept(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Put the values of all parameters back when the block ends; what it gives puts them back at once.

    Some forward passes write parameters (`self.weight.data = normalize(self.weight)`), which no version counter tells.
    """
    weights = [(weight, weight.data, weight.detach().clone()) for weight in module.parameters()]

    def put_back() -> None:
        with torch.no_grad():
            for weight, data, before in weights:
                if weight.data_ptr() != data.data_ptr() or weight.shape != before.shape:
                    weight.data = data
                if not torch.equal(weight, before):
                    weight.data.copy_(before)

    try:
        yield put_back
    finally:
        put_back()


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """Put flags, buffers, attributes and random state back when the block ends, however it ends.

    Parameters keep their identity; their values are `weights_kept`'s business. Attributes count because a forward pass
    that caches a tensor leaves a fake one behind when it is traced.

    Args:
        module: the module whose forward will run, or be traced, inside the block.
    """
    plain = (part for part in module.modules() if not _is_compiled(part))
    parts = [(part, dict(part.__dict__), [dict(part.__dict__[r]) for r in _REGISTRIES]) for part in plain]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    python_state = random.getstate()
    numpy_random: Any = getattr(sys.modules.get("numpy"), "random", None)
    numpy_state = numpy_random.get_state() if numpy_random else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        for part, own, registries in parts:
            for name, entries in zip(_REGISTRIES, registries, strict=True):
                own[name].clear()
                own[name].update(entries)
            part.__dict__.clear()
            part.__dict__.update(own)
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)


def _is_compiled(part: nn.Module) -> bool:
    """TorchScript keeps attributes where Python cannot replace them; its code does not write them in a forward pass unnoticed."""
    return isinstance(part, torch.jit.ScriptModule)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, without autograd, and untouched afterwards.

    The flags are written directly: the module of a loaded `torch.export` archive refuses `.eval()`.
    """
    with untouched(module), torch.no_grad():
        for part in module.modules():
            part.training = False
        yield
