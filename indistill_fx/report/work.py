"""How fast a phase went, and how much memory it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from indistill_fx.report import numbers


@dataclass(frozen=True, slots=True)
class Work:
    """What an epoch's line says; None: an earlier version, or a device, does not.

    Attributes:
        seconds: spent training.
        samples: learnt from.
        waiting: seconds, of those, in which the run waited for batches.
        memory: the most bytes held.
    """

    seconds: float | None = None
    samples: float | None = None
    waiting: float | None = None
    memory: float | None = None

    @staticmethod
    def of_all(epochs: Iterable[Work]) -> Work:
        """The sum over the epochs that record samples; for memory, the maximum."""
        known = [epoch for epoch in epochs if epoch.samples is not None and epoch.seconds is not None]
        if not known:
            return Work()
        return Work(
            sum(epoch.seconds or 0.0 for epoch in known),
            sum(epoch.samples or 0.0 for epoch in known),
            sum(epoch.waiting or 0.0 for epoch in known),
            max((epoch.memory for epoch in known if epoch.memory is not None), default=None),
        )

    def __str__(self) -> str:
        """In words; empty where nothing is known.

        >>> str(Work(10.0, 1200.0, 0.5, 2**30)), str(Work(10.0))
        ('120 samples/s, 5% of the time waiting for data, memory up to 1.0 GiB', '')
        """
        if not self.samples or not self.seconds:
            return ""
        waiting = f", {min((self.waiting or 0.0) / self.seconds, 1):.0%} of the time waiting for data"
        memory = f", memory up to {numbers.size(self.memory)}" if self.memory is not None else ", memory not available"
        return f"{self.samples / self.seconds:.3g} samples/s{waiting}{memory}"


NO_WORK = Work()
