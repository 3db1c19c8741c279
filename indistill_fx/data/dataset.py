"""A data set, ready to train and test on, and what it was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.normalisation import Figures, Normalisation


@dataclass(frozen=True, slots=True)
class Data:
    """A data set, ready to train and test on.

    Attributes:
        train: shuffled and augmented.
        train_plain: the training set unaugmented and in a fixed order, whose first samples stand for all (from class folders, one of
            each class in turn): the database of retrieval, the data of calibration.
        test: the test set in order.
        classes: their names by label; empty where a user's loaders do not say.
        input_size: of one sample: (channels, height, width).
        normalisation: mean and std per channel of values in [0, 1]; None where a user's loaders do not say.
        labelled: whether the test set has labels, so that accuracy can be measured.
        notes: what was decided or changed on the way, in sentences.
    """

    train: EpochLoader
    train_plain: EpochLoader
    test: EpochLoader
    classes: tuple[str, ...]
    input_size: tuple[int, ...]
    normalisation: Normalisation | None
    labelled: bool = True
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """What `open_data` was asked for; see there."""

    batch_size: int
    workers: int
    seed: int
    limit: int | None
    size: tuple[int, int] | None
    model_size: tuple[int, int] | None
    channels: int | None
    mean: Figures | None
    std: Figures | None
    cache: Path | None
    download: bool
    augment: bool
    randaugment: int | None
    with_indices: bool
    progress: bool
