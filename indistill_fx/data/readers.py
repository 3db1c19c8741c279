"""Processes that read samples from disk: alive as long as their loader, and reported when they die."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.system.random_state import OwnRandomness, seed_from
from indistill_fx.system.signals import left_to_the_parent

Key = tuple[int, int]
"""Epoch and index of a sample."""

_SECONDS_UNTIL_REPORTED = 1.0
"""Seconds for the news of a process's end to arrive."""


class Readers:
    """Reads batches of a dataset by processes that live from the first batch to the end of the run.

    What a sample draws at random follows from (seed, epoch, index): the epoch travels with the index, so it does not matter which
    process reads it, nor how long that has lived.

    Args:
        dataset: index -> (image, label); drawn randomness comes from torch's global generator.
        workers: processes; 0 reads in this one.
        seed: see above.
    """

    def __init__(self, dataset: Dataset[Any], *, workers: int, seed: int):
        self.dataset, self.workers, self.seed = dataset, workers, seed
        self._plan = _Plan()
        self._kept: DataLoader[Any] | None = None
        self._reading = False

    def read(self, plan: list[list[Key]], *, pinned: bool) -> Iterator[Any]:
        """The planned batches, or for a batch the ConfigError of its first sample that cannot be read.

        Args:
            plan: keys of the samples of each batch.
            pinned: put batches into page-locked memory, from which a GPU reads on its own.
        """
        if not self.workers or self._reading:  # a second iteration at the same time gets its own worker processes
            yield from self._loader(_Plan(plan), pinned, persistent=False)
            return
        if self._kept is None or self._kept.pin_memory != pinned:
            self._kept = self._loader(self._plan, pinned, persistent=True)
        self._plan.batches, self._reading = plan, True
        try:
            yield from self._kept
        finally:
            self._reading = False

    def _loader(self, plan: _Plan, pinned: bool, *, persistent: bool) -> DataLoader[Any]:
        return DataLoader(
            _Reseeded(self.dataset, self.seed),
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_collated,
            pin_memory=pinned,
            persistent_workers=persistent,
            worker_init_fn=left_to_the_parent,
            generator=torch.Generator(),
        )


class ByKey:
    """A DataLoader of the user's own whose reading processes live on, with randomness that follows from (seed, epoch, index).

    Torch seeds such processes once, so what they draw would depend on how many epochs they have lived.

    Args:
        loader: of a dataset with numbered samples.
        seed: see above.
    """

    def __init__(self, loader: DataLoader[Any], seed: int):
        self._sampler = _InEpoch(loader.batch_sampler, seed)
        self._loader: DataLoader[Any] = DataLoader(
            _Reseeded(loader.dataset, seed),
            batch_sampler=self._sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,
            prefetch_factor=loader.prefetch_factor,
            persistent_workers=True,
        )

    def epoch(self, epoch: int) -> DataLoader[Any]:
        """The loader, whose next iteration is that of this epoch."""
        self._sampler.epoch = epoch
        return self._loader


def reading_by_key(loader: Any, seed: int) -> ByKey | None:
    """The loader read by keys, if it is a DataLoader with processes that live on and numbered samples."""
    numbered = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if not numbered or not loader.persistent_workers or loader.batch_sampler is None:
        return None
    return ByKey(loader, seed)


class _InEpoch:
    """A batch sampler whose indices carry the epoch; its order follows from (seed, epoch)."""

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def __iter__(self) -> Iterator[list[Key]]:
        with OwnRandomness(seed_from(self.seed, self.epoch)).lent():
            batches = list(self.sampler)
        return iter([[(self.epoch, index) for index in indices] for indices in batches])

    def __len__(self) -> int:
        return len(self.sampler)


class _Plan:
    """A batch sampler that gives what was last set."""

    def __init__(self, batches: list[list[Key]] | None = None):
        self.batches = batches or []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Reseeded(Dataset[Any]):
    """A dataset whose sample i is read with random states (torch, numpy, random) that follow from (seed, epoch, i)."""

    def __init__(self, dataset: Dataset[Any], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: Key) -> Any:
        with OwnRandomness(seed_from(self.seed, *key)).lent():
            return self.dataset[key[1]]


def _collated(samples: list[Any]) -> Any:
    failed = next((sample for sample in samples if isinstance(sample, ConfigError)), None)
    if failed is not None:
        return failed
    images, labels = zip(*samples, strict=True)
    return torch.stack(images), None if labels[0] is None else torch.tensor(labels)


@contextmanager
def leaving_signals_to_us(loader: Any) -> Iterator[None]:
    """Within the block, the processes that a DataLoader of the user's own starts leave signals to this one."""
    if not isinstance(loader, DataLoader) or not loader.num_workers:
        yield
        return
    user_init = loader.worker_init_fn
    loader.worker_init_fn = _LeavingSignals(user_init)
    try:
        yield
    finally:
        loader.worker_init_fn = user_init


class _LeavingSignals:
    """The user's `worker_init_fn`, after `left_to_the_parent`; a class, because processes may be started afresh."""

    def __init__(self, user_init: Callable[[int], None] | None):
        self.own = user_init

    def __call__(self, number: int) -> None:
        left_to_the_parent()
        if self.own is not None:
            self.own(number)


@contextmanager
def noticing_dead_readers() -> Iterator[None]:
    """Within the block, the end of a process that reads data is reported as such.

    Torch reports it by an exception out of a signal's handler, at whatever place the program is then: reading a batch, but also
    in the middle of a step or of writing a checkpoint.

    Raises:
        TrainError: a reading process ended.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        reported = str(_of_a_worker(error)).strip()
        if not re.search(r"DataLoader worker \(pid", reported):
            raise
        raise TrainError(
            f"A process that reads the data has died: {reported.splitlines()[0]}",
            where="data",
            hint="The usual cause is a lack of memory: use fewer workers or smaller batches. The last checkpoint is intact: continue with "
            "resume=True (--resume).",
        ) from error


def _of_a_worker(error: Exception) -> Exception:
    """What torch says of a process that has died, where the first thing seen of it was its connection that ended.

    Better said here than while a run's end is being written.
    """
    if isinstance(error, RuntimeError):
        return error
    try:
        time.sleep(_SECONDS_UNTIL_REPORTED)
    except RuntimeError as later:
        return later
    return error
