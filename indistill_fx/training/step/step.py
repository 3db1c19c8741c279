"""What is done with a batch: forward, backward, and the optimiser's update. Nothing in it asks the device for a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from indistill_fx.system.nested import stand_in
from indistill_fx.training.parallel.processes import weighted
from indistill_fx.training.step.proof import Snapshot, state_of
from indistill_fx.training.step.recorded import RecordedStep, Recorder


class Step:
    """The steps of one stage.

    Attributes:
        module: batch → scalar loss, as Accelerate prepared it.
        optimizer: likewise.
        rate: its learning rate, as it was last set.
        recorded: all of a step at once, which is recorded as soon as it can be; None: nothing is recorded.

    Args:
        accelerator: the run's.
        module: see above.
        optimizer: see above.
        clip_norm: L2 norm that gradients are scaled down to; None: they stay as they are.
        after_update: called after every update: the moving average.
        average: what that changes.
        recorder: where to record steps; None: they run as they are.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: Any,
        *,
        clip_norm: float | None = None,
        after_update: Callable[[], None] | None = None,
        average: nn.Module | None = None,
        recorder: Recorder | None = None,
    ):
        self.accelerator, self.module, self.optimizer = accelerator, module, optimizer
        self._clip_norm, self._after_update, self._average = clip_norm, after_update, average
        self.rate: float | None = None
        self.recorded: RecordedStep | None = None
        if recorder is not None:
            self.recorded = RecordedStep(self.whole, recorder, module, self._undo, self._snapshot)

    def set_rate(self, rate: float) -> None:
        """Set the next update's learning rate. A rate stored on the device, for a recording, is overwritten in place."""
        if rate == self.rate:
            return
        self.rate = rate
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def whole(self, batch: Any) -> Tensor:
        """Learn from a batch in a single process and update; returns the loss. Gradients are cleared."""
        loss = self.learn(batch, 1)
        self.update()
        return loss

    def _undo(self) -> None:
        """Clean up after a failed step: clear the gradients and the scaler's count."""
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler._per_optimizer_states.clear()  # it is created again on demand; torch has no public call for this

    def _snapshot(self) -> Snapshot:
        return Snapshot(state_of(self.module, self.optimizer, self._average), self.accelerator.scaler)

    def learn(self, batch: Any, samples: int) -> Tensor:
        """Add the gradients of a batch to the existing ones; returns its loss.

        Args:
            batch: on the device.
            samples: how many it has; a process that has none still takes part with a stand-in.
        """
        loss: Tensor = self.module(batch if samples or self.accelerator.num_processes == 1 else stand_in(batch))
        loss = weighted(self.accelerator, loss, samples)
        self.accelerator.backward(loss)
        return loss.detach()

    def update(self, batches: int = 1) -> None:
        """Take an optimiser step with the mean gradient of `batches` batches, and clear the gradients."""
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
