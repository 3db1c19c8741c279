"""A moving average of the student's weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class MovingAverage(AveragedModel):
    """Torch's own, which asks the device at every update whether it is the first; this one asks once.

    Args:
        student: it stays as it is.
        decay: of the average.
        device: where the copy is kept.
    """

    def __init__(self, student: nn.Module, decay: float, device: torch.device):
        super().__init__(student, device=device, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self._begun: bool | None = None  # None: unknown, because a checkpoint may still be loaded

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Update the average by the model's weights and buffers; the first call copies them."""
        if self._begun is None:
            self._begun = bool(self.n_averaged > 0)
        alike: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for averaged, current in zip(_tensors(self.module), _tensors(model), strict=True):
            owns, others = alike.setdefault(averaged.dtype, ([], []))
            owns.append(averaged)
            others.append(current.to(averaged.device))
        for owns, others in alike.values():
            if self._begun:
                self.multi_avg_fn(owns, others, self.n_averaged)  # type: ignore[misc]
            else:
                torch._foreach_copy_(owns, others)
        self._begun = True
        self.n_averaged += 1


def make_average(student: nn.Module, decay: float, device: torch.device) -> MovingAverage | None:
    """A copy of the student that follows its weights and its norms' statistics.

    After every update it is decay * itself + (1 - decay) * them; the first update copies them. Torch's own (`torch.optim.swa_utils`).

    Args:
        student: it stays as it is.
        decay: 0: no average is wanted.
        device: where the copy is kept.
    """
    return MovingAverage(student, decay, device) if decay else None


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
