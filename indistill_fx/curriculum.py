"""The warm-up's schedule: which pair is distilled when, for how long, and how."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from indistill_fx.errors import ConfigError, nearest
from indistill_fx.system.arguments import require_options

Unit = Literal["epochs", "steps"]
AUTO: Literal["auto"] = "auto"
SEGMENTS, PAIRS = "all segments", "all pairs"
"""Names of the one stage in which the teacher feeds all segments, or in which the student learns all pairs; no layer can have them."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How long, and how, one stage trains.

    Attributes:
        length: number of epochs or of optimiser steps; with `patience` the most it may take.
        unit: which of the two.
        learning_rate: of this stage's optimiser; None: the run's.
        optimizer: by name; None: the run's.
        patience: the stage ends early after so many epochs without progress; None: never.
        progress: the least relative fall of an epoch's loss that counts as progress.
    """

    length: int
    unit: Unit = "epochs"
    learning_rate: float | None = None
    optimizer: str | None = None
    patience: int | None = None
    progress: float = 0.01

    def spent(self, epochs: int, steps: int) -> bool:
        """Whether a stage with so many epochs and optimiser steps behind it has had its length."""
        return (epochs if self.unit == "epochs" else steps) >= self.length

    def __str__(self) -> str:
        unit = self.unit if self.length != 1 else self.unit.removesuffix("s")
        most = f"at most {self.length} {unit}" if self.patience else f"{self.length} {unit}"
        early = f", ends after {self.patience} without {self.progress:.3g} relative progress" if self.patience else ""
        optimizer = f", {self.optimizer}" if self.optimizer else ""
        rate = f", learning rate {self.learning_rate:g}" if self.learning_rate is not None else ""
        return f"{most}{optimizer}{rate}{early}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Curriculum:
    """The warm-up's schedule: layer after layer, shallow to deep; layer l of 1..L is trained for `a + l` epochs.

    A sequence has one entry per pair of the plan, shallow to deep, even if `layers` names only some. One additional learning rate
    or optimiser is used for the penultimate vectors, which otherwise use the last one given.

    Source: Sarridis et al., "InDistill", arXiv:2205.10003, section 3.3 (`a = 2`, Adam, learning rate 1e-3, mean squared
    error). Deviation: one optimiser per stage; the authors' code makes a new one every epoch.

    Attributes:
        a: epochs added to every layer's number.
        lengths: explicit length of every stage instead of `a + l`, or one number for all; 0 leaves a stage out, and `[]` all of
            them. `auto`: `distill` chooses the stages that were measured to help such a pair, as it does without a curriculum.
        unit: whether lengths are epochs or steps.
        loss: the feature loss, by name (`mse`, `cosine`, `at`, `pkt`).
        learning_rate: of the stages' optimisers: one for all, or one per pair.
        optimizer: `adam`, `adamw` or `sgd`: one for all, or one per pair.
        patience: plateau rule: a stage ends early when its epoch loss has not fallen by `progress` (relative) for this many epochs;
            None: every stage runs for its whole length.
        progress: see `patience`.
        layers: student taps to warm up, in this order; None: every pair, shallow to deep.
        penultimate: length of a last stage for the penultimate vectors (the plan's `embedding`); 0: none, as in the paper.
        feed: the input of a segment between two pairs: `student`: the student's own features, so that pairs are trained one after
            the other. `teacher`: the teacher's narrowed ones, so that all segments are independent and train in one stage of
            `a + 1` epochs, or of the one length given.
        together: with `feed="student"`: also train all pairs in one stage of that length; each pair's loss is divided by that of the
            teacher's mean feature, so that no pair dominates.
        keep: weight of the penultimate vectors' feature loss in the main stage, in units of the main loss (`MainLoss.unit`);
            0: the main loss alone, as in the paper.
        keep_features: likewise of the feature loss of all pairs, which is relative, as with `together`, and a mean over the pairs.

    Raises:
        ConfigError: a number is out of range, or a name is unknown.

    Examples:
        >>> import indistill_fx as ifx
        >>> [budget.length for budget in ifx.Curriculum().schedule(3)]
        [3, 4, 5]
        >>> print(ifx.Curriculum(lengths=[1, 2], learning_rate=0.01).describe(["layer1", "layer2"]))
        layer1: 1 epoch, adam, learning rate 0.01
        layer2: 2 epochs, adam, learning rate 0.01
    """

    a: int = 2
    lengths: Sequence[int] | int | Literal["auto"] | None = None
    unit: Unit = "epochs"
    loss: str = "mse"
    learning_rate: float | Sequence[float] = 1e-3
    optimizer: str | Sequence[str] = "adam"
    patience: int | None = None
    progress: float = 0.01
    layers: Sequence[str] | None = None
    penultimate: int = 0
    keep: float = 0.0
    keep_features: float = 0.0
    feed: Literal["student", "teacher"] = "student"
    together: bool = False

    def __post_init__(self) -> None:
        require_options(
            {name: getattr(self, name) for name in Curriculum.__slots__ if name != "loss"}, Curriculum, of="Curriculum"
        )
        if isinstance(self.lengths, str) and self.lengths != AUTO:
            raise _wrong(f"A curriculum's lengths are {self.lengths!r}.", hint="Give numbers, or 'auto'.")
        lengths = self._explicit or []
        if min((self.a, self.penultimate, *lengths)) < 0:
            given = f"a={self.a}, lengths={self.lengths}, penultimate={self.penultimate}"
            raise _wrong(f"A curriculum cannot have stages of negative length ({given}).", hint="Give 0 or more.")
        if self.unit not in ("epochs", "steps"):
            raise _wrong(f"A curriculum's unit is {self.unit!r}.", hint="Choose from: epochs, steps.")
        if self.unit == "steps" and self.lengths is None:
            raise _wrong("A curriculum in steps needs lengths: only epochs have defaults.", hint="Give lengths=[…].")
        if self.patience is not None and (self.patience < 1 or self.unit == "steps"):
            raise _wrong(
                f"patience={self.patience} with unit={self.unit!r}: the plateau rule compares epochs, at least 1.",
                hint="Give lengths in epochs.",
            )
        rates = [self.learning_rate] if isinstance(self.learning_rate, (int, float)) else self.learning_rate
        if any(not (math.isfinite(rate) and rate > 0) for rate in rates):
            raise _wrong(f"A curriculum's learning rate is {self.learning_rate}.", hint="Give numbers above 0.")
        if self.feed not in ("student", "teacher"):
            raise _wrong(f"A curriculum's feed is {self.feed!r}.", hint="Choose from: student, teacher.")
        if not (math.isfinite(self.keep) and self.keep >= 0):
            raise _wrong(f"A curriculum's keep is {self.keep}.", hint="Give 0, or a small weight such as 0.3.")
        if not (math.isfinite(self.keep_features) and self.keep_features >= 0):
            raise _wrong(
                f"A curriculum's keep_features is {self.keep_features}.", hint="Give 0, or a weight such as 10."
            )

    @property
    def wants_pairs(self) -> bool:
        """Whether any pair is warmed up. If none is, the models need no corresponding layers."""
        return self.lengths is None or any(self._explicit or [])

    @property
    def _explicit(self) -> Sequence[int] | None:
        if isinstance(self.lengths, int):
            return [self.lengths]
        return None if isinstance(self.lengths, str) else self.lengths

    def schedule(self, count: int, *, penultimate: bool = False) -> tuple[Budget, ...]:
        """The budgets of `count` stages, shallow to deep.

        Args:
            count: how many pairs there are.
            penultimate: add the budget of the stage for the penultimate vectors.

        Returns:
            One budget per stage.

        Raises:
            ConfigError: a sequence has another number of entries, or the lengths are `auto`.
        """
        if isinstance(self.lengths, str):
            raise _wrong(
                "A curriculum with lengths='auto' has no stages of its own: only `distill` chooses them.",
                hint="Give numbers, such as lengths=1 for one epoch per pair.",
            )
        if isinstance(self.lengths, int):
            lengths = [self.lengths] * count
        else:
            stage_lengths = (
                [self.a + layer for layer in range(1, count + 1)] if self.lengths is None else list(self.lengths)
            )
            lengths = stage_lengths or [0] * count
        self._check_count("lengths", lengths, count)
        lengths += [self.penultimate] if penultimate else []
        one_rate = isinstance(self.learning_rate, (int, float))
        rates: list[Any] = [self.learning_rate] * len(lengths) if one_rate else list(self.learning_rate)  # type: ignore[arg-type]
        named = isinstance(self.optimizer, str)
        optimizers: list[Any] = [self.optimizer] * len(lengths) if named else list(self.optimizer)
        for noun, values in (("learning rates", rates), ("optimisers", optimizers)):
            values += values[-1:] if penultimate and len(values) == count else []
            self._check_count(noun, values, len(lengths))
        return tuple(
            Budget(length, self.unit, float(rate), optimizer, self.patience, self.progress)
            for length, rate, optimizer in zip(lengths, rates, optimizers, strict=True)
        )

    def _check_count(self, noun: str, values: Sequence[Any], count: int) -> None:
        if len(values) != count:
            subject = f"the one stage of {self.one_stage}" if self.one_stage else f"{count} pairs"
            raise _wrong(
                f"The curriculum gives {len(values)} {noun} for {subject}.",
                hint="Give one." if self.one_stage else "Give one per pair, or none.",
            )

    @property
    def one_stage(self) -> str | None:
        """The name of the single stage that trains all pairs; None if each pair has its own stage."""
        return SEGMENTS if self.feed == "teacher" else PAIRS if self.together else None

    def chosen(self, layers: Sequence[str], penultimate: str | None = None) -> dict[str, Budget]:
        """The budgets of the layers that are trained at all, in the order of training; or that of `one_stage`.

        Args:
            layers: the student's taps of all pairs, shallow to deep.
            penultimate: the student's tap of the penultimate vectors, if there are such and no pair has them.

        Returns:
            Name of the stage → budget.

        Raises:
            ConfigError: `layers` of the curriculum names one that is in no pair, or a sequence has another number of entries.
        """
        last = penultimate if self.penultimate else None
        order = list(self.order(layers))
        if self.one_stage:
            layers = order = [self.one_stage] if order else []
        schedule = self.schedule(len(layers), penultimate=last is not None)
        budgets = dict(zip((*layers, *([last] if last is not None else [])), schedule, strict=True))
        order += [last] if last is not None else []
        return {layer: budgets[layer] for layer in order if budgets[layer].length}

    def order(self, known: Sequence[str]) -> Sequence[str]:
        """Which of the student's taps are warmed up, in the order of training.

        Args:
            known: the student's taps of all pairs, shallow to deep.

        Returns:
            Some or all of them.

        Raises:
            ConfigError: `layers` names one that is in no pair, or one twice.
        """
        if self.layers is None:
            return known
        for layer in self.layers:
            if layer not in known:
                raise _wrong(f"The curriculum names `{layer}`, which is in no pair.", hint=nearest(layer, known))
        if len(set(self.layers)) < len(self.layers):
            raise _wrong(f"The curriculum names a layer twice: {', '.join(self.layers)}.", hint="Name each layer once.")
        return self.layers

    def describe(self, layers: Sequence[str]) -> str:
        """The schedule in words.

        Args:
            layers: the student's taps of the plan's pairs, shallow to deep.

        Returns:
            One line per stage.

        Raises:
            ConfigError: as `chosen`.

        Examples:
            >>> print(Curriculum(layers=["b", "a"]).describe(["a", "b"]))
            b: 4 epochs, adam, learning rate 0.001
            a: 3 epochs, adam, learning rate 0.001
        """
        return "\n".join(f"{layer}: {budget}" for layer, budget in self.chosen(layers).items())


def _wrong(message: str, *, hint: str = "") -> ConfigError:
    return ConfigError(message, where="curriculum", hint=hint)
