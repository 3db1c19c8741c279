"""Data held on a device: the same bits as on the CPU, by the code of a GPU run on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from indistill_fx.data import loaders
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.held import HeldImages
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.system.random_state import generator_from

CPU = torch.device("cpu")


def pictures(count: int = 50, dtype: torch.dtype = torch.uint8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, 3, 9, 7), generator=generator, dtype=torch.int32).to(dtype)


def loader(dtype: torch.dtype = torch.uint8, **options) -> MemoryLoader:
    images = pictures(dtype=dtype)
    given = {"batch_size": 8, "shuffle": True, "augment": FlipAndCrop(2), "with_indices": True, **options}
    return MemoryLoader(images, torch.arange(len(images)) % 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), **given)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("shift", [FlipAndCrop(4), FlipAndCrop(0), FlipAndCrop(2, flip=False)])
def test_one_gather_gives_the_bits_of_padding_shifting_and_mirroring(dtype, shift):
    images = pictures(dtype=dtype)
    held = HeldImages(images, None, CPU, shift)
    for number in range(5):
        samples = torch.randperm(len(images), generator=generator_from(number))[:20]
        draws = shift.draw(20, generator_from(7, number))
        expected = shift.apply(images.int()[samples], draws)
        found = held.pictures(samples, draws)
        assert torch.equal(found.int(), expected) and found.is_contiguous()
        assert found.dtype == (torch.uint8 if dtype == torch.uint8 else torch.int32)


def test_pictures_that_are_not_augmented_are_read_as_they_are():
    images = pictures()
    held = HeldImages(images, None, CPU, None)
    assert torch.equal(held.pictures(torch.tensor([3, 1]), None), images[[3, 1]])


def device_batches(own: MemoryLoader, epoch: int, skipped: int = 0) -> list[tuple[Tensor, ...]]:
    """As on a GPU: held, places and draws sent for many batches at once."""
    shift = own.augment if isinstance(own.augment, FlipAndCrop) else None
    own.set_epoch(epoch)
    return list(own._on_device(HeldImages(own.images, own.labels, CPU, shift), skipped))


@pytest.mark.parametrize(
    "options",
    [{}, {"augment": None}, {"shuffle": False}, {"with_indices": False}, {"dtype": torch.uint16, "peak": 65535.0}],
)
@pytest.mark.parametrize("at_once", [1, 4, 64])
def test_batches_made_on_a_device_have_the_bits_of_those_made_here(options, at_once, monkeypatch):
    monkeypatch.setattr(loaders, "_AT_ONCE", at_once)
    for epoch in range(2):
        own = loader(**options)
        own.set_epoch(epoch)
        expected, found = list(own), device_batches(loader(**options), epoch)
        assert len(found) == len(expected) == own.length
        for one, other in zip(found, expected, strict=True):
            assert len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_skipped_and_shared_batches_are_the_same_there():
    own = loader()
    own.set_epoch(1)
    own.skip(3)
    for one, other in zip(device_batches(loader(), 1, 3), list(own), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for rank in range(2):
        part = loader().shard(rank, 2)
        part.set_epoch(0)
        for one, other in zip(device_batches(loader().shard(rank, 2), 0), list(part), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_held_where(monkeypatch):
    """On a device that is none: `meta` has no values, but lies elsewhere."""
    meta = torch.device("meta")
    own = loader()
    there = own.to(meta)
    assert there.device == meta and set(own._held) == {meta} and own.to("cpu") is own
    assert there.to(meta) is there and own._held[meta].images.shape == (50, 3, 13, 11)
    monkeypatch.setattr(HeldImages, "fit", staticmethod(lambda *_: False))
    own = loader()
    images, labels, indices = next(iter(own.to(meta)))  # made here, sent there
    assert own._held == {} and (images.device, labels.device, indices.device) == (meta, meta, CPU)


def test_room_is_counted_with_the_margin(monkeypatch):
    images, cuda = pictures(), torch.device("cuda")
    whole = 50 * 3 * 13 * 11
    for free, fits in ((2 * whole, True), (2 * whole - 2, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10 * free))
        assert HeldImages.fit(cuda, images, FlipAndCrop(2)) is fits
    assert HeldImages.fit(CPU, images, FlipAndCrop(2))
