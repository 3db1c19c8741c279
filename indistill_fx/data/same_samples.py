"""What is stored for each sample of a data set requires samples that do not change."""

from __future__ import annotations

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.errors import ConfigError


def same_samples(loader: EpochLoader, requester: str, *, views: bool = False) -> EpochLoader:
    """The loader with sample indices in its batches.

    Args:
        loader: of a training set.
        requester: what needs samples that are the same in every epoch, as the beginning of a sentence.
        views: whether fixed views of every sample do too; then indices count the samples of all views.

    Raises:
        ConfigError: they may differ from epoch to epoch.
    """
    if views and loader.views:
        return loader.indexed().by_view()
    if loader.randomness is not None:
        if not loader.numbered:
            raise ConfigError(
                f"{requester} needs samples that have numbers and are the same in every epoch, which cannot be known of a loader of "
                "your own.",
                where=requester.lower().removeprefix("the "),
                got=type(loader).__name__,
                expected="a loader of open_data without random transforms",
                hint="Use data that open_data reads (a folder of images, cifar10, digits), or leave the option out.",
            )
        others = ", take fixed views (--views 4, open_data(views=4))" if views else ""
        raise ConfigError(
            f"{requester} needs samples that are the same in every epoch, but {loader.randomness}.",
            where=requester.lower().removeprefix("the "),
            got=loader.randomness,
            expected="data without random transforms",
            hint=f"Turn augmentation off (--no-augment, open_data(augment=False)){others}, or leave the option out.",
        )
    return loader.indexed()
