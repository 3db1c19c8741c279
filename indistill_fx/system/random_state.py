"""Randomness that is a function of place: step k draws the same numbers whether or not the run was interrupted."""

from __future__ import annotations

import hashlib
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import numpy as np
import torch

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState


class OwnRandomness:
    """A private state for the global generators, put in place only while foreign code runs."""

    def __init__(self, seed: int):
        before = random_states()
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        self._states = random_states()
        set_random_states(before)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Within the block, the global generators continue from these states; afterwards they are restored."""
        before = random_states()
        set_random_states(self._states)
        try:
            yield
        finally:
            self._states = random_states()
            set_random_states(before)


def seed_from(*parts: int) -> int:
    """A 32-bit seed that follows from all parts."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def generator_from(*parts: int) -> torch.Generator:
    """A CPU generator seeded by `seed_from`."""
    return torch.Generator().manual_seed(seed_from(*parts))


_GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_rng_state, torch.set_rng_state),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
)


def random_states() -> list[Any]:
    """The states of the global generators of torch, Python and numpy."""
    return [get() for get, _ in _GENERATORS]


def set_random_states(states: list[Any]) -> None:
    """Put back what `random_states` gave."""
    for (_, put), state in zip(_GENERATORS, states, strict=True):
        put(state)


def is_generator(value: object) -> TypeGuard[Generator]:
    """Whether a value is a random generator with a state of its own, be it torch's, Python's or numpy's."""
    return isinstance(value, Generator) and not isinstance(value, random.SystemRandom)


def python_generators() -> list[Generator]:
    """The objects behind the functions of `random` and `numpy.random`."""
    return [random.getstate.__self__, np.random.get_state.__self__]  # type: ignore[attr-defined]


def state_of(generator: Generator) -> bytes:
    """A generator's state: to be compared, or put back by `set_state_of`."""
    if isinstance(generator, torch.Generator):
        return pickle.dumps(generator.get_state().numpy())
    if isinstance(generator, np.random.RandomState):
        return pickle.dumps(generator.get_state())
    return pickle.dumps(generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state)


def set_state_of(generator: Generator, state: bytes) -> None:
    """Put back what `state_of` gave."""
    value = pickle.loads(state)
    if isinstance(generator, torch.Generator):
        generator.set_state(torch.from_numpy(value))
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(value)
    elif isinstance(generator, random.Random):
        generator.setstate(value)
    else:
        generator.bit_generator.state = value


def seed_torch(value: int) -> None:
    """Seed torch's generators, those of devices too."""
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # torch.manual_seed visits every kind of device, which takes longer than a small model's optimiser step
        torch.default_generator.manual_seed(value)


def reseed(*key: int) -> None:
    """Seed torch (every device), numpy and random by a key.

    Args:
        key: for example (seed, epoch, batch, process). Different keys give unrelated numbers.
    """
    value = int.from_bytes(hashlib.blake2b(struct.pack(f"{len(key)}q", *key), digest_size=8).digest()) >> 1
    seed_torch(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


@contextmanager
def randomness_kept() -> Iterator[None]:
    """After the block the global generators, also those of devices in use, are as they were."""
    before = random_states()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        set_random_states(before)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Within the block the global generators are seeded; after it they are as they were."""
    with randomness_kept():
        reseed(seed)
        yield
