"""What opened data are: loaders, class names, input size and normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from indistill_fx.data.loaders import EpochLoader

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Data:
    """A data set, ready to train and test on.

    Attributes:
        train: shuffled and augmented.
        train_plain: the training set in order and unaugmented: the database of retrieval, the data of calibration.
        test: the test set in order.
        classes: their names by label; empty where a user's loaders do not tell.
        input_size: of one sample: (channels, height, width).
        normalisation: mean and std per channel of values in [0, 1]; None where a user's loaders do it their way.
    """

    train: EpochLoader
    train_plain: EpochLoader
    test: EpochLoader
    classes: tuple[str, ...]
    input_size: tuple[int, ...]
    normalisation: Normalisation | None


@dataclass(frozen=True, slots=True)
class DataOptions:
    """What `open_data` was asked for."""

    batch_size: int
    workers: int
    seed: int
    limit: int | None
    size: int | None
    cache: Path | None
    download: bool
    augment: bool
    with_indices: bool
    progress: bool
