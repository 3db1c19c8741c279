"""Loaders of the user's own: streams, shared ones, small last batches, labels of any width; and readers that live on."""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import indistill_fx as ifx
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.data.foreign import ForeignLoader, repeatable
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.errors import ConfigError


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((3, 8, 8), float(i)), i % 5) for i in range(10)])


def net(*, norm=False):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(192, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 5)]
    return nn.Sequential(*layers)


def test_a_stream_without_a_length_trains_every_batch():
    loader = DataLoader(Stream(), batch_size=4)
    record = ifx.train(
        net(),
        loader,
        val_loader=repeatable(loader, 0, "test loader"),
        epochs=2,
        accumulate=2,
        device="cpu",
        progress=False,
    )
    assert record.steps == 4, "batches of 4, 4 and 2; the last one ends a group of one"
    assert repeatable(loader, 0, "train loader").length is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loader_may_fill_the_same_tensors_again(accumulate):
    """One batch was read ahead, so that every step saw the next batch."""
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(3)]

    class Refilled(list):
        def __iter__(self):
            images, labels = torch.empty(4, 3, 8, 8), torch.empty(4, dtype=torch.int64)
            for batch in batches:
                images.copy_(batch[0])
                labels.copy_(batch[1])
                yield images, labels

    options = {"epochs": 2, "accumulate": accumulate, "device": "cpu", "progress": False}
    assert ifx.train(net(), Refilled(batches), **options).digest == ifx.train(net(), batches, **options).digest


def test_batches_that_are_all_too_small_are_refused():
    """All of them were left out, and the run ended as if it had trained."""
    batches = [(torch.randn(1, 3, 8, 8), torch.tensor([0]))] * 3
    with pytest.raises(ConfigError, match="No batch has 2 samples"):
        ifx.train(net(norm=True), batches, epochs=1, device="cpu", progress=False)
    still = net(norm=True)
    still[2].eval()
    assert ifx.train(still, batches, epochs=1, device="cpu", progress=False).steps == 3


def test_validation_batches_can_be_had_after_every_epoch():
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    with pytest.raises(
        ConfigError, match="The validation loader is a generator, which cannot be iterated once per epoch"
    ):
        ifx.train(net(), batches, val_loader=(batch for batch in batches), epochs=1, device="cpu", progress=False)


class Understated(list):
    """Has more batches than it says."""

    def __len__(self):
        return 3


def test_a_loader_with_more_batches_than_it_says_is_noticed(tmp_path, capsys):
    said = "the loader says it has 3 batches, but it has more: every epoch ends after 3. If all are meant, let its __len__ count them"
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    for count, notes in ((5, (said,)), (3, ())):
        run = tmp_path / str(count)
        record = ifx.train(net(), Understated([batch] * count), epochs=2, device="cpu", run_dir=run)
        assert record.steps == 6 and record.stages[0].notes == notes
        assert (f"main: {said}" in capsys.readouterr().err.splitlines()) == bool(notes)


class Endless(IterableDataset):
    def __iter__(self):
        for i in itertools.count():
            yield torch.full((3, 8, 8), float(i % 7)), i % 5


def test_a_stream_without_an_end_is_trained_for_so_many_steps(tmp_path, capsys):
    """In epochs it would never come to its first end."""
    stream = DataLoader(Endless(), batch_size=4)
    options = {"device": "cpu", "run_dir": tmp_path, "checkpoint_every_steps": 2}
    record = ifx.train(net(), stream, main_steps=5, **options)
    assert record.steps == 5 and [stage.name for stage in record.stages] == ["main"]
    assert "main: 5 steps" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="main_steps is 5 there and 6 here"):
        ifx.train(net(), stream, main_steps=6, resume=True, **options)
    teacher, student = (
        nn.Sequential(nn.Conv2d(3, n, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 5))
        for n in (8, 4)
    )
    short = ifx.Curriculum(lengths=2, unit="steps")
    record = ifx.distill(teacher, student, stream, curriculum=short, main_steps=3, device="cpu", progress=False)
    assert [stage.steps for stage in record.stages] == [2] * (len(record.stages) - 1) + [3]


def test_of_a_stream_without_a_length_epochs_are_explained(tmp_path):
    ifx.train(net(), DataLoader(Stream(), batch_size=4), epochs=1, device="cpu", progress=False, run_dir=tmp_path)
    assert "--main-steps" in (tmp_path / "run.json").read_text()


def test_a_loader_that_shares_its_samples_out_is_not_cut_again():
    data = TensorDataset(torch.arange(16))
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(data, num_replicas=2, rank=rank)
        part = ForeignLoader(DataLoader(data, batch_size=4, sampler=sampler)).shard(rank, 2)
        seen += [int(value) for (batch,) in part for value in batch]
        assert "divides its samples" in part.remarks[0]
    assert sorted(seen) == list(range(16))
    with pytest.raises(ConfigError, match="among 2 processes, but the run has 3"):
        ForeignLoader(DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))).shard(0, 3)


def test_validation_on_a_share_is_refused():
    data = TensorDataset(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64))
    share = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=0))
    with pytest.raises(ConfigError, match="divides its samples among 2 processes, but only one process validates"):
        ifx.train(net(), DataLoader(data), val_loader=share, epochs=1, device="cpu", progress=False)


def test_a_last_batch_of_one_is_left_out_where_there_are_batch_norms():
    data = TensorDataset(torch.randn(9, 3, 8, 8), torch.arange(9) % 5)
    record = ifx.train(net(norm=True), DataLoader(data, 4), epochs=1, device="cpu", progress=False)
    assert record.steps == 2
    assert record.stages[0].notes == ("batches of fewer than 2 samples are left out: batch norms need more",)
    assert ifx.train(net(), DataLoader(data, 4), epochs=1, device="cpu", progress=False).steps == 3
    ours = MemoryLoader(torch.zeros(9, 3, 8, 8).byte(), torch.zeros(9).long(), mean=(0,), std=(1,), batch_size=4)
    assert len(list(ours.at_least(2))) == 2
    with pytest.raises(ConfigError, match="No batch has 5 samples"):
        ours.at_least(5)


@pytest.mark.parametrize("change", [lambda y: y.int(), lambda y: y[:, None], lambda y: y.to(torch.uint8)])
def test_whole_number_labels_of_any_width(change):
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    found = [
        ifx.train(net(), [(x, labels)], val_loader=[(x, labels)], epochs=2, device="cpu", progress=False)
        for labels in (y, change(y))
    ]
    assert found[0].digest == found[1].digest
    assert found[0].accuracy == found[1].accuracy


def test_labels_that_are_no_classes_are_refused_before_the_first_step():
    with pytest.raises(
        ConfigError, match=r"Labels of shape \(8,\) \(float32\) .* Class numbers must be integers \(labels.long\(\)\)"
    ):
        ifx.train(net(), [(torch.randn(8, 3, 8, 8), torch.rand(8))], epochs=1, device="cpu", progress=False)


class Noisy(TensorDataset):
    randomness = "drawn"

    def __getitem__(self, index):
        draws = torch.rand(()) + random.random() + np.random.rand()
        return torch.stack([draws.float(), torch.tensor(float(os.getpid()))]), int(super().__getitem__(index)[0])


@pytest.mark.parametrize("kind", ["ours", "the user's"])
def test_readers_live_on_and_draw_the_same(kind):
    data = Noisy(torch.arange(12))

    def make():
        if kind == "ours":
            return DiskLoader(data, batch_size=4, workers=1, shuffle=True)
        loader = DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True)
        return ForeignLoader(loader)

    def epoch(loader, number):
        loader.set_epoch(number)
        values, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        return values[:, 0], set(values[:, 1].tolist()), labels

    loader = make()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert first[1] == second[1], "the same process"
    assert not torch.equal(first[0], second[0])
    again = epoch(make(), 1)
    assert torch.equal(again[0], second[0])
    assert torch.equal(again[2], second[2])


def test_batches_are_made_where_they_are_wanted_by_the_same_arithmetic():
    images, labels = torch.randint(256, (20, 3, 8, 8)).byte(), torch.arange(20)
    loader = MemoryLoader(
        images, labels, mean=(0.1,) * 3, std=(0.3,) * 3, batch_size=4, shuffle=True, augment=FlipAndCrop()
    )
    moved, there = next(iter(loader.to("meta")))
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.float32, (4, 3, 8, 8))
    assert there.device.type == "meta"
    assert loader.to("cpu") is loader
    plain = MemoryLoader(images, labels, mean=(0.1,) * 3, std=(0.3,) * 3, batch_size=20)
    mean, std = (torch.full((3, 1, 1), value) for value in (0.1, 0.3))
    assert torch.equal(next(iter(plain))[0], images.float().div_(255.0).sub_(mean).div_(std))


def test_figures_of_other_channels_than_the_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "from torch.utils.data import DataLoader, TensorDataset\nimport torch\n\n\ndef make():\n"
    source += "    loader = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 2), batch_size=4)\n"
    (tmp_path / "mine.py").write_text(
        f"{source}    return {{'train': loader, 'test': loader, 'normalisation': ((0.5,), (0.5,))}}\n"
    )
    with pytest.raises(ConfigError, match="says that its images are normalised by"):
        ifx.open_data("mine.py:make")
