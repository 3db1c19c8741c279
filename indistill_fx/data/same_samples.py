"""What is kept of a data set's samples needs samples that do not change."""

from __future__ import annotations

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.errors import ConfigError


def same_samples(loader: EpochLoader, what: str) -> EpochLoader:
    """The loader with sample indices in its batches.

    Args:
        loader: of a training set.
        what: who needs samples that are the same in every epoch, as a sentence begins.

    Raises:
        ConfigError: they may differ from epoch to epoch.
    """
    if loader.randomness is not None:
        raise ConfigError(
            f"{what} needs samples that are the same in every epoch, and {loader.randomness}.",
            where=what.lower().removeprefix("the "),
            got=loader.randomness,
            expected="data without random transforms",
            hint="Turn augmentation off (--no-augment, open_data(augment=False)), or do without.",
        )
    return loader.indexed()
