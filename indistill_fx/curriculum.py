"""The warm-up's schedule: which pair is distilled when, and for how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from indistill_fx.errors import ConfigError

Unit = Literal["epochs", "steps"]


@dataclass(frozen=True, slots=True)
class Budget:
    """How long one stage trains: a number of epochs or of optimiser steps."""

    length: int
    unit: Unit = "epochs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """Layer after layer, shallow to deep; layer l of 1..L gets `a + l` epochs.

    Source: Sarridis et al., "InDistill", arXiv:2205.10003, section 3.3 (`a = 2`, Adam, learning rate 1e-3, mean squared error).
    Deviation: one optimiser per stage; the authors' code makes a new one every epoch.

    Attributes:
        a: epochs added to every layer's number.
        lengths: explicit length of every stage instead of `a + l`.
        unit: whether lengths are epochs or steps.
        loss: the feature loss, by name (`mse`, `cosine`, `at`, `pkt`).
        learning_rate: of the stages' optimisers.

    >>> [budget.length for budget in Curriculum().schedule(3)]
    [3, 4, 5]
    """

    a: int = 2
    lengths: Sequence[int] | None = None
    unit: Unit = "epochs"
    loss: str = "mse"
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.a < 0 or (self.lengths is not None and any(n < 0 for n in self.lengths)):
            raise ConfigError(f"A curriculum cannot have stages of negative length (a={self.a}, lengths={self.lengths}).", where="curriculum")

    def schedule(self, count: int) -> tuple[Budget, ...]:
        """The budgets of `count` stages, shallow to deep.

        Raises:
            ConfigError: `lengths` has another number of stages.
        """
        lengths = [self.a + layer for layer in range(1, count + 1)] if self.lengths is None else list(self.lengths)
        if len(lengths) != count:
            raise ConfigError(
                f"The curriculum gives {len(lengths)} lengths for {count} pairs.", where="curriculum", hint="Give one length per pair, or none."
            )
        return tuple(Budget(length, self.unit) for length in lengths)
