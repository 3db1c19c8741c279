"""A stage's teacher is what it was when the stage was compiled, or the stage refuses to run.

A stage has folded and narrowed weights of its own beside some that it shares with the user's teacher. Were the teacher to change afterwards
(a moving average of the student, a load), the ones would follow and the others stand still.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.errors import ConfigError

_PROBES = 3
"""So many of the teacher's smallest weights are compared before every step: writes through `.data` raise no version."""
_EVERY = 50
"""On other devices than a CPU, where comparing waits for the device, only before every so manieth step."""


def refuse_changes(teacher: nn.Module) -> Callable[[nn.Module, Any], None]:
    """A forward pre-hook for the teacher's half of a stage.

    Args:
        teacher: the user's own, as the stage was compiled from it.

    Returns:
        The hook. It raises a ConfigError that names the first weight that is other than it was. What torch.compile has compiled does not
        call it, nor does a recorded step; `distill` compares the whole teacher at its end.
    """
    tensors = {name: tensor for name, tensor in (*teacher.named_parameters(), *teacher.named_buffers())}
    seen = {name: (_version(tensor), _checksum(tensor)) for name, tensor in tensors.items()}
    floating = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1]
    probes = sorted(floating, key=lambda name: tensors[name].numel())[:_PROBES]
    calls = Counter[int]()  # by stage: a step that is watched for a recording must do what the one before it did

    def check(half: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling() or must_not_wait():
            return
        moved = [name for name, tensor in tensors.items() if _version(tensor) != seen[name][0]]
        if calls[id(half)] % _EVERY == 0 or all(tensors[name].device.type == "cpu" for name in probes):
            moved += probes
        calls[id(half)] += 1
        for name in moved:
            now = _checksum(tensors[name])
            if now != seen[name][1]:
                raise _changed(name)
            seen[name] = (_version(tensors[name]), now)

    return check


def must_not_wait() -> bool:
    """Whether a CUDA graph is being recorded, or a step is checked for what would prevent recording."""
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing() or torch.cuda.get_sync_debug_mode() > 0
    )


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
        f"The teacher's weights have changed since the stage was compiled, among them `{name}`. The stage has folded copies of some and "
        "shares others, so only part of the stage would see the change.",
        where=name,
        hint="Compile the stages again after every change, or give `compile_stages` a copy that does not change (copy.deepcopy(teacher)).",
    )
