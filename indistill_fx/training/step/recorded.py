"""A training step that is recorded once and replayed: the arithmetic of a small network takes less time than asking for it.

Rules, in order:
  1. The first steps on batches of one form run as they are, where they will be recorded: they are steps of the run like any other, and make
     what lasts, such as the optimiser's state.
  2. The last of these are watched. A step that waits for the device, draws random numbers on the host, changes Python state of its
     modules, or computes with other numbers than the one before (a weight that follows a count) cannot be recorded: replayed, it would not
     do that again. It is named, and the stage continues unrecorded. Of what torch.compile has made the numbers are not seen.
  3. The next step is taken as it is, too. Then all is put back as it was before it, the step is recorded on a copy of the watched batch,
     which stays in its place, and replayed on this one. Where that leads elsewhere, or cannot be done (for want of memory, for example),
     what the step did as it is counts, and the stage continues unrecorded. So the device never holds the tensors of a step and of a
     recording at once, and what a recording keeps of its own batch and random numbers is found.
  4. The recording is replayed on every later batch of that form, which is copied over the last one.
  5. Batches of another form (the last one of an epoch may be smaller) run as they are. A stage whose batches have ever new forms is not
     recorded.

Nothing of it is known to be a GPU's: that is the recorder's, so that a test can put another one in its place.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from indistill_fx.training.options.settings import Settings
from indistill_fx.training.step.calls import Call, calls_noted, first_difference
from indistill_fx.training.step.host_state import changed_in, host_state
from indistill_fx.training.step.proof import Snapshot
from indistill_fx.training.step.static_batch import Form, form_of, overwrite, static_copy

WARM_UP = 3
"""Steps that run as they are before the recording."""
_MOST_FORMS = 16
"""Forms of batches; with more before any has come often enough nothing is recorded."""


class NotRecordedError(Exception):
    """A step cannot be recorded; says why."""


class Recorder(Protocol):
    """Where steps are recorded."""

    def beside(self, run: Callable[[], Tensor]) -> Tensor:
        """Run the step without recording, on the recording's stream; later work waits for it."""

    def waiting(self) -> AbstractContextManager[list[str]]:
        """Within the block, collect the places where the program waits for the device; available after the block."""

    def host_draws(self) -> object:
        """The state of the host's random number generators, for comparison with a later one."""

    def device_draws(self) -> Tensor:
        """The state of the device's random number generator."""

    def draw_again(self, state: Tensor) -> None:
        """Set the device's random number generator to an earlier state."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Record the step's work on the device without executing it; returns a function that executes it.

        Raises:
            NotRecordedError: recording failed, although no obstacle was found; the device is still usable.
            TrainError: recording failed, and the device can no longer be used.
        """


def why_not_recorded(settings: Settings, device: str, processes: int) -> str | None:
    """What is known beforehand to be in the way of recording the steps of a run; None: nothing.

    Args:
        settings: of the run.
        device: its kind.
        processes: how many train together.
    """
    if settings.graphs is False:
        return "not requested"
    if device != "cuda":
        return f"the device is a {device}"
    if processes > 1:
        return "the processes exchange gradients in every step"
    return "a step has several batches (accumulate)" if settings.accumulate > 1 else None


class RecordedStep:
    """The step of one stage.

    Args:
        work: batch → loss (): forward, backward and update. It leaves no gradients.
        recorder: where it is recorded.
        watched: the modules that it runs.
        undo: lets go of what `work` leaves where it breaks off: its gradients.
        snapshot: copies the state that `work` changes; None: it changes none.

    Attributes:
        reason: why it is not recorded; empty as long as it may be.
        others: how many steps ran as they are after the recording, their batches being of another form.
    """

    def __init__(
        self,
        work: Callable[[Any], Tensor],
        recorder: Recorder,
        watched: nn.Module,
        undo: Callable[[], None] = lambda: None,
        snapshot: Callable[[], Snapshot] = lambda: Snapshot({}),
    ):
        self._work, self._recorder, self._watched, self._undo = work, recorder, watched, undo
        self._snapshot = snapshot
        self._form: Form | None = None
        self._ran: dict[Form, int] = {}
        self._calls: dict[Form, list[Call]] = {}
        self._seen: dict[Form, tuple[Any, Tensor]] = {}
        self._static: Any = None
        self._loss: Tensor | None = None
        self._replay: Callable[[], None] | None = None
        self.reason, self.others = "", 0

    @property
    def note(self) -> str:
        """The result of recording, in words."""
        if self.reason:
            return f"not recorded as a CUDA graph: {self.reason}"
        if self._replay is None:
            return "not recorded as a CUDA graph: it had too few steps"
        count = f"{self.others} step{'s' if self.others > 1 else ''}"
        more = f"; {count} on batches of another shape ran without a recording" if self.others else ""
        return f"recorded as a CUDA graph after {WARM_UP} steps{more}"

    def __call__(self, batch: Any) -> Tensor:
        """Take the step; returns the batch's loss () in a new tensor."""
        if self.reason:
            return self._work(batch)
        form = form_of(batch)
        if self._replay is not None and form == self._form:
            return self._replayed(batch)
        if self._replay is not None:
            self.others += 1
            return self._work(batch)
        return self._recorded(batch, form) if self._ran.get(form, 0) >= WARM_UP else self._warmed_up(batch, form)

    def _replayed(self, batch: Any) -> Tensor:
        """Rule 4."""
        overwrite(self._static, batch)
        assert self._replay is not None and self._loss is not None
        self._replay()
        return self._loss.clone()

    def _recorded(self, batch: Any, form: Form) -> Tensor:
        """Rule 3."""
        before, draws = self._snapshot(), self._recorder.device_draws()
        loss = self._run_beside(batch)
        after, drawn = self._snapshot(), self._recorder.device_draws()
        before.restore()
        self._form, (self._static, others) = form, self._seen.pop(form)
        self._recorder.draw_again(others)
        try:
            self._replay = self._recorder.record(self._work_on_static)
            self._recorder.draw_again(draws)
            replayed = self._replayed(batch)
            same = torch.isclose(replayed, loss, rtol=1e-3, atol=1e-6, equal_nan=True)
            differs = before.first_difference(after) if same else "loss"
            if differs is None:
                self._seen.clear()
                return replayed
            self.reason = f"its replay gave another result, first in the {differs}"
        except NotRecordedError as error:
            self.reason = f"recording failed: {error}"
        self._static = self._replay = None
        self._seen.clear()
        gc.collect()  # the error of a failed recording holds all tensors of the step
        self._undo()
        after.restore()
        self._recorder.draw_again(drawn)
        return loss

    def _work_on_static(self) -> None:
        assert self._loss is not None
        self._loss.copy_(self._work(self._static))

    def _warmed_up(self, batch: Any, form: Form) -> Tensor:
        """Rules 1 and 2."""
        self._ran[form] = self._ran.get(form, 0) + 1
        if len(self._ran) > _MOST_FORMS:
            self.reason = "the shapes of the batches keep changing, or the batches hold values that are not tensors"
            return self._work(batch)
        if self._ran[form] < WARM_UP - 1:
            return self._run_beside(batch)
        noting = nullcontext(list[Call]()) if hasattr(self._watched, "_orig_mod") else calls_noted()
        if self._ran[form] < WARM_UP:
            with noting as self._calls[form]:
                return self._run_beside(batch)
        state, draws = host_state(self._watched), self._recorder.host_draws()
        self._seen[form] = static_copy(batch), self._recorder.device_draws()
        with self._recorder.waiting() as waits, noting as calls:
            loss = self._run_beside(batch)
        differs = first_difference(self._calls.pop(form), calls)
        changed = changed_in(state, host_state(self._watched))
        if waits:
            self.reason = f"the step waits for the device, at {waits[0]}"
        elif self._recorder.host_draws() != draws:
            self.reason = "the step draws random numbers on the host"
        elif changed:
            more = f" and {len(changed) - 1} more" if changed[1:] else ""
            self.reason = f"the step changes Python state: `{changed[0]}`{more}"
        elif differs is not None:
            self.reason = f"the step uses other constants each time, first in `{differs}`"
        return loss

    def _run_beside(self, batch: Any) -> Tensor:
        loss = self._recorder.beside(lambda: self._work(batch))
        self._loss = torch.zeros_like(loss)
        return loss
