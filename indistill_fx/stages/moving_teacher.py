"""A stage's teacher is the user's teacher as it is now, or the stage refuses to run.

A stage has folded copies of some of the teacher's weights and shares the others. If the teacher changes after the stages were compiled (a
moving average of the student, a load), the copies are computed anew before the next step. Weights that were sliced for the student's
widths are not: which channels are the best may have changed with them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError
from indistill_fx.passes.pipeline import Half
from indistill_fx.traced import TracedModel

_PROBES = 3
"""So many of the teacher's smallest weights are compared before every step: writes through `.data` raise no version."""
_EVERY = 50
"""On other devices than a CPU, where comparing waits for the device, only before every so manieth step."""


class Watch:
    """Notices that a teacher has changed.

    Args:
        teacher: the user's own, as the stages are compiled from it.
    """

    def __init__(self, teacher: nn.Module):
        self._tensors = _tensors(teacher)
        self._seen = {name: (_version(tensor), _checksum(tensor)) for name, tensor in self._tensors.items()}
        floating = [n for n, tensor in self._tensors.items() if tensor.is_floating_point() and tensor.numel() > 1]
        self._probes = sorted(floating, key=lambda name: self._tensors[name].numel())[:_PROBES]

    def hook(self, traced: TracedModel, make: Callable[[], Half]) -> Callable[[nn.Module, Any], None]:
        """A forward pre-hook for the teacher's half of one stage.

        Args:
            traced: what the half is made from.
            make: makes the half, from the weights as they are when it is called.

        Returns:
            The hook. If the teacher has changed, it brings the half's tensors up to date; where that cannot be, it raises a ConfigError
            that names the first weight that is other than it was. What torch.compile has compiled does not call it, nor does a recorded
            step; `distill` compares the whole teacher at its end.
        """
        own = {_memory(tensor) for tensor in self._tensors.values()}
        held = (t for t in _tensors(traced.graph_module).values() if t.is_floating_point())
        follows = all(_memory(tensor) in own for tensor in held)
        seen, steps = dict(self._seen), count()

        def check(half: nn.Module, inputs: Any) -> None:
            if torch.compiler.is_compiling() or must_not_wait():
                return
            suspects = [name for name, tensor in self._tensors.items() if _version(tensor) != seen[name][0]]
            # A step that is watched for a recording must do what the one before it did.
            if next(steps) % _EVERY == 0 or all(self._tensors[name].device.type == "cpu" for name in self._probes):
                suspects += self._probes
            now = {name: (_version(self._tensors[name]), _checksum(self._tensors[name])) for name in suspects}
            changed = [name for name in now if now[name][1] != seen[name][1]]
            if changed and not (follows and _update(half, make().value)):
                raise _changed(changed[0])
            seen.update(now)

        return check


@torch.no_grad()
def _update(half: nn.Module, made: nn.Module) -> bool:
    """Give a half the values of one that was made anew; returns whether the two have the same tensors."""
    old, new = _tensors(half), _tensors(made)
    if {name: tensor.shape for name, tensor in old.items()} != {name: tensor.shape for name, tensor in new.items()}:
        return False
    for name, tensor in old.items():
        if _memory(tensor) != _memory(new[name]):
            tensor.copy_(new[name])
    return True


def must_not_wait() -> bool:
    """Whether a CUDA graph is being recorded, or a step is checked for what would prevent recording."""
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() > 0
    )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return dict(every)


def _memory(tensor: Tensor) -> tuple[int, int]:
    plain = tensor.layout is torch.strided and not tensor.is_nested
    return (tensor.data_ptr(), tensor.numel()) if plain else (id(tensor), -1)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _checksum(tensor: Tensor) -> str:
    """The checksum as text, because not-a-number would not be equal to itself."""
    if tensor.is_meta or tensor.is_complex() or tensor.is_quantized or tensor.layout is not torch.strided:
        return ""
    wide = tensor.detach().to(torch.float64) if tensor.device.type != "mps" else tensor.detach().float()
    return f"{float(wide.sum())!r} {float(wide.square().sum())!r}"


def _changed(name: str) -> ConfigError:
    return ConfigError(
        f"The teacher's weights have changed since the stage was compiled, among them `{name}`. The stage holds parts of some weights that "
        "were chosen by their old values, and shares others, so only part of the stage would see the change.",
        where=name,
        hint="Compile the stages again after every change, or give `compile_stages` a copy that does not change (copy.deepcopy(teacher)).",
    )
