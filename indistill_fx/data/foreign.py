"""Users' own loaders, wrapped so that an epoch can be repeated and each process gets its share once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
import torch.distributed
from torch.utils.data import DataLoader, IterableDataset

from indistill_fx.data.loaders import EpochLoader
from indistill_fx.data.readers import leaving_signals_to_us, reading_by_key
from indistill_fx.errors import ConfigError
from indistill_fx.system.nested import count_of, map_tensors, samples_of, tensors_of
from indistill_fx.system.random_state import OwnRandomness, seed_from


def repeatable(loader: Iterable[Any], seed: int, name: str) -> EpochLoader:
    """The loader itself if its epochs can be repeated, or a wrapper whose epochs can.

    Raises:
        ConfigError: it can be iterated only once, or has no batches.
    """
    if isinstance(loader, EpochLoader):
        return loader
    _require_anew(loader, name)
    wrapped = ForeignLoader(loader, seed=seed)
    if wrapped.length == 0:
        raise ConfigError(f"The {name} has no batches.", where=name, got=0, expected="at least 1")
    return wrapped


def _require_anew(loader: object, name: str) -> None:
    if hasattr(loader, "__next__") or not hasattr(loader, "__iter__"):
        raise ConfigError(
            f"The {name} is a {type(loader).__name__}, which cannot be iterated once per epoch.",
            where=name,
            got=type(loader).__name__,
            expected="an iterable that starts anew each time",
            hint="Give a torch.utils.data.DataLoader, a list of batches, or a loader of ifx.data.open_data.",
        )


def require_whole(loader: Iterable[Any] | None, name: str) -> None:
    """Refuse a loader that gives this process only a share: the first process validates on all samples, and after every epoch.

    Raises:
        ConfigError: its sampler shares the samples out among several processes, or it can be iterated only once.
    """
    if loader is not None:
        _require_anew(loader, name)
    loader = loader.loader if isinstance(loader, ForeignLoader) else loader
    if (shares := _shares(loader)) is not None and shares > 1:
        raise ConfigError(
            f"The {name} divides its samples among {shares} processes, but only one process validates, and it would see only its share.",
            where=name,
            got=f"a sampler for {shares} processes",
            hint="Give a loader without a distributed sampler.",
        )


class ForeignLoader(EpochLoader):
    """A user's own loader made repeatable: its randomness (torch, numpy, random) is seeded by (seed, epoch).

    Skipped batches are read and dropped. A shard is cut out of each whole batch, unless the loader shares its samples out already
    (a DistributedSampler, Accelerate's loaders, streams that split by process). Processes that live on over epochs
    (`persistent_workers`) draw for each sample what follows from (seed, epoch, index).

    Args:
        loader: anything that can be iterated again and again.
        seed: of its randomness.
    """

    def __init__(self, loader: Iterable[Any], *, seed: int = 0):
        super().__init__(seed=seed)
        self.loader = loader
        self._shared = False
        self._by_key = reading_by_key(loader, seed)

    @property
    def length(self) -> int | None:
        """As the loader states; None for a stream in torch's DataLoader, whose length is only a guess."""
        if isinstance(self.loader, DataLoader) and isinstance(self.loader.dataset, IterableDataset):
            return None
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return None

    def shard(self, rank: int, world: int) -> Self:
        """See `EpochLoader`; a loader that already shares its samples among processes stays unchanged.

        Raises:
            ConfigError: it shares them among another number of processes.
        """
        part = super().shard(rank, world)
        part._shared = world > 1 and self._shares_already(world)
        if part._shared:
            part.remarks = (*self.remarks, "The train loader divides its samples among the processes by itself.")
        return part

    def _shares_already(self, world: int) -> bool:
        shares = _shares(self.loader)
        if shares is not None and shares > 1:
            if shares != world:
                raise ConfigError(
                    f"The train loader divides its samples among {shares} processes, but the run has {world}.",
                    where="train loader",
                    got=shares,
                    expected=world,
                    hint="Let its sampler count the processes of this run, or give the loader without a distributed sampler.",
                )
            return True
        if isinstance(self.loader, DataLoader) and not isinstance(self.loader.dataset, IterableDataset):
            return False
        return _first_batches_differ(self)

    def _batches(self, skipped: int) -> Iterator[Any]:
        randomness = OwnRandomness(seed_from(self.seed, self.epoch))
        loader = self._of_this_epoch()
        with randomness.lent(), leaving_signals_to_us(loader):
            iterator = iter(loader)
        number, expected, before = 0, self.length, self.left_out
        while expected is None or number < expected:
            with randomness.lent():
                batch = next(iterator, _END)
            if batch is _END:
                break
            number += 1
            count = count_of(batch) * (self.world if self._shared else 1)
            # In a batch shared between processes, this process may have no part.
            empty = not count and not self._shared and bool(tensors_of(batch))
            if empty or 0 < count < self.least:
                self.left_out += 1
                continue
            if skipped:
                skipped -= 1
                continue
            unshared = self.world == 1 or self._shared
            yield batch if unshared else samples_of(batch, slice(self.rank, None, self.world))
        else:
            if self.epoch == 0:
                with randomness.lent():
                    self.longer = "" if next(iterator, _END) is _END else _LONGER.format(expected)
        if number and self.left_out - before == number:
            raise self.too_small()
        if number < (expected or 1):
            raise ConfigError(
                f"The loader says it has {expected} batches and ended after {number}."
                if expected
                else "The loader has no batches.",
                where="loader",
                got=number,
                expected=expected or "at least 1",
                hint="Let its __len__ say how many batches an epoch has." if expected else "",
            )

    def _of_this_epoch(self) -> Iterable[Any]:
        for set_epoch in (getattr(part, "set_epoch", None) for part in _parts(self.loader)):
            if set_epoch is not None:
                set_epoch(self.epoch)
        for number, part in enumerate(_parts(self.loader)):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed_from(self.seed, self.epoch, number))
        if self._by_key is not None:
            return self._by_key.epoch(self.epoch)
        if getattr(self.loader, "persistent_workers", False):
            # Worker processes of a stream would continue from where they stopped.
            fresh: Any = copy.copy(self.loader)
            fresh._iterator = None
            return fresh  # type: ignore[no-any-return]
        return self.loader


_END = object()


_LONGER = "the loader says it has {0} batches, but it has more: every epoch ends after {0}. If all are meant, let its __len__ count them"


def with_last(batches: Iterator[Any], *, known: bool = False) -> Iterator[tuple[Any, bool]]:
    """Each batch, and whether it is the last of a group: read one ahead, because a loader may not know its end.

    Args:
        batches: of an epoch. What is read ahead is copied, because a loader may fill the same tensors again and again.
        known: every batch is the last of its group, so that none is read ahead.
    """
    if known:
        yield from ((batch, True) for batch in batches)
        return
    ahead = _copied(next(batches, _END))
    while ahead is not _END:
        batch, ahead = ahead, _copied(next(batches, _END))
        yield batch, ahead is _END


def _copied(batch: Any) -> Any:
    return batch if batch is _END else map_tensors(batch, torch.clone)


def _parts(loader: Any) -> tuple[Any, ...]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return (loader, *dict.fromkeys(samplers), getattr(loader, "dataset", None))


def _shares(loader: Any) -> int | None:
    """Among how many processes the loader's samplers share the samples, if they state it."""
    for part in _parts(loader):
        for name in ("num_replicas", "num_processes"):  # the names in torch and Hugging Face, and in Accelerate
            if isinstance(count := getattr(part, name, None), int):
                return count
    return None


def _first_batches_differ(loader: ForeignLoader) -> bool:
    """Whether every process gets different samples; without a process group, no."""
    if not torch.distributed.is_initialized():
        return False
    found: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, _digest(next(iter(loader))))
    kinds = len(set(found))
    if kinds not in (1, len(found)):
        raise ConfigError(
            "Of the processes' first batches some are the same and some differ.",
            where="train loader",
            got=f"{kinds} different ones in {len(found)} processes",
            expected="the same in all, or another one in each",
            hint="Let the loader give every process all samples (it then takes its share of every batch), or each one its own part.",
        )
    return kinds > 1


def _digest(batch: Any) -> str:
    total = hashlib.sha256()
    for value in tensors_of(batch):
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
