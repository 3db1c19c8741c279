"""Randomness that is a function of place: step k draws the same numbers whether or not the run was interrupted."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def reseed(*key: int) -> None:
    """Seed torch (every device), numpy and random by a key.

    Args:
        key: for example (seed, epoch, batch, process). Different keys give unrelated numbers.
    """
    value = int.from_bytes(hashlib.blake2b(struct.pack(f"{len(key)}q", *key), digest_size=8).digest()) >> 1
    if torch.accelerator.is_available():
        torch.manual_seed(value)
    else:  # torch.manual_seed asks every kind of device, which takes longer than a small model's optimiser
        torch.default_generator.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


@contextmanager
def own_randomness(seed: int) -> Iterator[None]:
    """Within the block the global generators are seeded; after it they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            reseed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
