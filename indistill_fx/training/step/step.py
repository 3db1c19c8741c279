"""What is done with a batch: forward, backward, and the optimiser's update. Nothing in it asks the device for a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from indistill_fx.batch import stand_in
from indistill_fx.training.parallel.processes import weighted


class Step:
    """The steps of one stage.

    Args:
        accelerator: the run's.
        module: batch → scalar loss, as Accelerate prepared it.
        optimizer: likewise.
        clip_norm: L2 norm that gradients are scaled down to; None: they stay as they are.
        after_update: called after every update: the moving average.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        *,
        clip_norm: float | None = None,
        after_update: Callable[[], None] | None = None,
    ):
        self.accelerator, self.module, self.optimizer = accelerator, module, optimizer
        self._clip_norm, self._after_update = clip_norm, after_update

    def learn(self, batch: Any, samples: int) -> Tensor:
        """Add the gradients of a batch to those there are; returns its loss.

        Args:
            batch: on the device.
            samples: how many it has; a process that has none still takes part with a stand-in.
        """
        loss: Tensor = self.module(batch if samples or self.accelerator.num_processes == 1 else stand_in(batch))
        loss = weighted(self.accelerator, loss, samples)
        self.accelerator.backward(loss)
        return loss.detach()

    def update(self, batches: int = 1) -> None:
        """Take the optimiser's step by the mean gradient of so many batches, and forget the gradients."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if batches > 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(batches)
        if self._clip_norm is not None:
            self.accelerator.clip_grad_norm_(parameters, self._clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._after_update is not None:
            self._after_update()
