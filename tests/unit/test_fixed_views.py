"""Fixed views of augmented pictures: the same ones again, the teacher computed once for each, every step's loss the uncached one's."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.data.image_folders import ImageFiles, Listing
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.data.open import open_data
from indistill_fx.errors import ConfigError
from tests.nets import unsettle

SAMPLES, VIEWS = 24, 3


def loader(*, views: int = VIEWS, seed: int = 0, **more) -> MemoryLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, 8, 8), generator=generator, dtype=torch.uint8)
    made = MemoryLoader(
        images, torch.arange(SAMPLES) % 5, mean=(0.5,) * 3, std=(0.3,) * 3,
        batch_size=8, seed=seed, shuffle=True, augment=FlipAndCrop(), **more,
    )  # fmt: skip
    return made.in_views(views) if views else made


def pictures(own: MemoryLoader | DiskLoader, epoch: int) -> Tensor:
    """Those of an epoch in the samples' own order."""
    own = own.indexed()
    own.set_epoch(epoch)
    images, _, indices = (torch.cat(parts) for parts in zip(*own, strict=True))
    return images[indices.argsort()]


class Net(nn.Module):
    """Counts the samples that it has computed."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deep(self.stem(x)).mean((2, 3)))


def net(width: int = 8) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        return unsettle(Net(width)).eval()


def test_views_come_again_and_differ_from_one_another():
    seen = [pictures(loader(), epoch) for epoch in range(2 * VIEWS)]
    for view in range(VIEWS):
        assert torch.equal(seen[view], seen[view + VIEWS])
        assert not torch.equal(seen[view], seen[(view + 1) % VIEWS])
    orders = [torch.cat([batch[2] for batch in own]) for own in _epochs(loader().indexed(), 0, VIEWS)]
    assert not torch.equal(*orders)  # in another order
    anew = [pictures(loader(views=0), epoch) for epoch in (0, VIEWS)]
    assert not torch.equal(*anew)


def _epochs(own, *epochs: int):
    for epoch in epochs:
        own.set_epoch(epoch)
        yield own


def test_shards_see_what_one_process_sees():
    whole = pictures(loader(), 1)
    parts = [loader().indexed().shard(rank, 2) for rank in range(2)]
    for own in parts:
        own.set_epoch(1)
    images, _, indices = (torch.cat(part) for part in zip(*(batch for own in parts for batch in own), strict=True))
    assert torch.equal(images[indices.argsort()], whole)


def test_indices_by_view_count_all_views():
    own = loader().indexed().by_view()
    own.set_epoch(VIEWS + 2)
    numbers = torch.cat([indices for _, _, indices in own]).sort().values
    assert torch.equal(numbers, torch.arange(SAMPLES) + 2 * SAMPLES)


def test_the_data_of_other_views_are_other_data():
    digests = {own.fingerprint() for own in (loader(), loader(views=2), loader(seed=1), loader(views=0))}
    assert len(digests) == 4 and loader().fingerprint() == loader().fingerprint()


def train(student: nn.Module, *, cache=None, main: str = "kd", **more):
    curriculum = Curriculum(lengths=2)
    teacher = net()
    teacher.count = 0
    record = ifx.distill(
        teacher, student.train(), loader(), curriculum=curriculum, main=main, epochs=2 * VIEWS + 1, feature_cache=cache,
        log_every_steps=1, device="cpu", **more,
    )  # fmt: skip
    return record


@pytest.mark.parametrize("main", ["kd", "crd"])
def test_every_steps_loss_is_the_uncached_ones(main, tmp_path):
    losses = []
    for name, cache in (("plain", None), ("cached", tmp_path / "cache")):
        run = tmp_path / name
        train(net(4), cache=cache, main=main, run_dir=run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "step" in line and "loss" in line])
    assert len(losses[0]) == len(losses[1]) > 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_teacher_is_computed_once_for_every_view(tmp_path, monkeypatch):
    from indistill_fx.training import feature_cache

    counted, run = [], feature_cache._run
    monkeypatch.setattr(
        feature_cache, "_run", lambda graph, batch, *rest: counted.append(len(batch[0])) or run(graph, batch, *rest)
    )
    train(net(4), cache=tmp_path / "cache")
    first = 8  # one batch, by which sizes are told
    assert sum(counted) == SAMPLES * VIEWS + first
    counted.clear()
    train(net(4), cache=tmp_path / "cache")
    assert counted == []


def test_a_run_with_cached_views_goes_on_to_the_same_bits(tmp_path):
    whole = train(net(4), cache=tmp_path / "cache", run_dir=tmp_path / "whole")
    student = net(4)
    stopped = tmp_path / "stopped"
    more = {
        "curriculum": Curriculum(lengths=2),
        "feature_cache": tmp_path / "cache",
        "device": "cpu",
        "run_dir": stopped,
    }
    ifx.distill(net(), student.train(), loader(), epochs=VIEWS, **more)
    resumed = ifx.distill(net(), net(4).train(), loader(), epochs=2 * VIEWS + 1, resume=True, **more)
    assert resumed.digest == whole.digest


def test_pictures_on_disk_have_views_too(tmp_path):
    from PIL import Image
    from torchvision.transforms import v2

    for number in range(4):
        pixels = torch.randint(0, 256, (12, 12, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    listing = Listing(tmp_path, tuple(map(str, sorted(tmp_path.glob("*.png")))), torch.arange(4), ("a",) * 4)
    transform = v2.Compose([v2.PILToTensor(), v2.RandomCrop(8), v2.ToDtype(torch.float32)])
    files = ImageFiles(listing, transform, randomness="pictures are cropped")
    own = DiskLoader(files, batch_size=2, shuffle=True).in_views(2)
    seen = [pictures(own, epoch) for epoch in range(4)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0], seen[1])
    assert own.randomness == "pictures are cropped in 2 fixed views"


def test_views_of_what_does_not_vary_are_refused():
    with pytest.raises(ConfigError, match="nothing is drawn at random"):
        open_data("digits", views=4)
    with pytest.raises(ConfigError, match="there cannot be 0 of them"):
        loader().in_views(0)
    with pytest.raises(ConfigError, match="it is not known whether a TensorDataset draws at random"):
        DiskLoader(torch.utils.data.TensorDataset(torch.zeros(4, 3))).in_views(2)
    with pytest.raises(ConfigError, match="take fixed views"):
        ifx.distill(net(), net(4).train(), loader(views=0), curriculum=Curriculum(lengths=[]), feature_cache="cache")
