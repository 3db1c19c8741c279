"""A moving average of the student's weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_average(student: nn.Module, decay: float, device: torch.device) -> AveragedModel | None:
    """A copy of the student that follows its weights and its norms' statistics.

    After every update it is decay * itself + (1 - decay) * them; the first update copies them. Torch's own (`torch.optim.swa_utils`).

    Args:
        student: it stays as it is.
        decay: 0: no average is wanted.
        device: where the copy lies.
    """
    if not decay:
        return None
    return AveragedModel(student, device=device, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
