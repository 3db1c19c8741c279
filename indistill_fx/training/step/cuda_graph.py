"""Recording steps as CUDA graphs. This is all of the recorded step that needs a GPU, and so all of it that a CPU's tests never run.

Memory: what a recorded step makes on its way is in a pool of its own as long as the graph lives, and every replay overwrites it.
Streams: steps run and are recorded on one stream beside torch's current one; each waits for the other, so that nothing overtakes.
Random numbers: torch hands seed and offset of the device's generator to every replay, so a seed set before one counts as for a step that
runs as it is.
"""

from __future__ import annotations

import gc
import linecache
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from indistill_fx.errors import TrainError
from indistill_fx.training.step.recorded import NotRecordedError

_WAITS = "called a synchronizing CUDA operation"
"""How torch's warning begins."""


class CudaRecorder:
    """Records on one GPU.

    Args:
        device: which; it must be torch's current one.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream = torch.cuda.Stream(self._device)

    def beside(self, run: Callable[[], Tensor]) -> Tensor:
        """See `Recorder`. Autograd binds its nodes to the stream of their first use, which must be the recording's."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), warnings.catch_warnings():
                # The optimiser is made for recording, and warns when it runs without one.
                warnings.filterwarnings("ignore", ".*capturable=True")
                found = run()
        finally:
            current.wait_stream(self._stream)
        # tells the allocator that this stream reads the tensor, before its memory is reused
        found.record_stream(current)
        return found

    @contextmanager
    def waiting(self) -> Iterator[list[str]]:
        """See `Recorder`. Uses torch's sync debug mode, which detects most operations that wait, but not all."""
        found: list[str] = []
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
        found += [_place(warning) for warning in caught if str(warning.message).startswith(_WAITS)]

    def host_draws(self) -> object:
        """See `Recorder`."""
        numpy = np.random.get_state(legacy=False)
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(numpy)

    def device_draws(self) -> Tensor:
        """See `Recorder`."""
        return torch.cuda.get_rng_state(self._device)

    def draw_again(self, state: Tensor) -> None:
        """See `Recorder`."""
        torch.cuda.set_rng_state(state, self._device)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`.

        Other threads, such as those that pin memory for data, may continue; only this thread must follow the rules of a recording.
        """
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        fresh, first = torch.Generator(self._device), list[BaseException]()
        gc.collect()
        collecting = gc.isenabled()
        gc.disable()  # a collection could free another recording's memory
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    run()
                except BaseException as error:
                    first.append(error)  # ending a failed recording raises a second error; keep the first
                    raise
        except BaseException as error:
            self._leave(current, fresh)
            cause = first[0] if first else error
            if not isinstance(cause, Exception):
                raise cause from None
            full = isinstance(cause, torch.OutOfMemoryError)
            text = "the GPU has too little memory for it" if full else " ".join(str(cause).split())[:300]
            raise NotRecordedError(text) if self._usable() else _failed(text) from cause
        finally:
            if collecting:
                gc.enable()
        return graph.replay

    def _usable(self) -> bool:
        """Whether the device can still compute and draw random numbers."""
        try:
            torch.cuda.manual_seed(0)  # every training step sets the seed again
            return bool(torch.rand(2, device=self._device).add(1).sum() > 0)
        except RuntimeError:
            return False

    def _leave(self, current: torch.cuda.Stream, fresh: torch.Generator) -> None:
        """Clean up after a failed recording: torch still uses its stream as the current one, and its generator cannot be seeded."""
        torch.cuda.set_stream(current)
        torch.cuda.default_generators[self._device.index].graphsafe_set_state(fresh.graphsafe_get_state())


def _place(warning: warnings.WarningMessage) -> str:
    """The place that waits, with the source line, because the line of a graph is in no file."""
    line = linecache.getline(warning.filename, warning.lineno).partition(";")[0].strip()
    return f"{warning.filename}:{warning.lineno}{f' (`{line}`)' if line else ''}"


def _failed(text: str) -> TrainError:
    return TrainError(
        f"The step could not be recorded as a CUDA graph, and the GPU does not respond any more: {text}",
        where="graphs",
        hint="Run without (graphs=False, --no-graphs); with resume=True (--resume) the run continues from the last checkpoint.",
    )
