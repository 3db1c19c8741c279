"""Data by spec: what comes out, that every epoch can be re-created, and what is said when something is wrong."""

import itertools
import random
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import indistill_fx as ifx
from indistill_fx.data import open_folder
from indistill_fx.data.augment import FlipAndCrop, ShiftAndRandAugment
from indistill_fx.data.dataset import Data
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.data.foreign import ForeignLoader
from indistill_fx.data.image_folders import list_splits, rank_in_class, spread
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.data.open import open_data
from indistill_fx.errors import ConfigError


def write_images(
    folder: Path, *, size=(8, 8), classes=("ant", "bee", "cow"), train=6, test=3, mode="RGB", suffix="png"
):
    rng = np.random.default_rng(0)
    shape = (size[0], size[1], 3) if mode == "RGB" else size
    for split, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
                image.save(folder / split / name / f"{i}.{suffix}")
    return folder


@pytest.fixture
def small(tmp_path):
    return write_images(tmp_path / "small")


def listed(loader):
    return [tuple(part.clone() for part in batch) for batch in loader]


def equal(a, b):
    return len(a) == len(b) and all(
        len(x) == len(y) and all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def memory(**options):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (50, 3, 8, 8), generator=g).to(torch.uint8)
    defaults = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "batch_size": 8, "shuffle": True, "augment": FlipAndCrop(2)}
    return MemoryLoader(images, torch.arange(50) % 5, **(defaults | options))


def disk(folder, **options):
    loader = open_data(f"imagefolder:{folder}", batch_size=4, size=80, **options).train
    assert isinstance(loader, DiskLoader)
    return loader


def foreign(seed=0, **options):
    """A user's DataLoader whose data set draws from all three global generators."""

    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.rand(()) + random.random() + np.random.rand(), y

    dataset = Noisy(torch.zeros(30, 2, dtype=torch.float64), torch.arange(30))
    return ForeignLoader(DataLoader(dataset, batch_size=8, shuffle=True, **options), seed=seed)


@pytest.fixture(
    params=["memory", "disk", "memory by RandAugment", "disk by RandAugment", "foreign", "foreign with a generator"]
)
def make(request, small):
    return {
        "memory": memory,
        "disk": lambda **options: disk(small, **options),
        "memory by RandAugment": lambda **options: memory(augment=ShiftAndRandAugment(9), **options),
        "disk by RandAugment": lambda **options: disk(small, randaugment=9, **options),
        "foreign": foreign,
        "foreign with a generator": lambda **options: foreign(generator=torch.Generator(), **options),
    }[request.param]


def test_an_epoch_can_be_recreated_and_entered_in_the_middle(make):
    first = make(seed=3)
    whole = {}
    for epoch in range(3):
        first.set_epoch(epoch)
        whole[epoch] = listed(first)
    again = make(seed=3)
    again.set_epoch(1)
    assert equal(listed(again), whole[1])
    for k in range(len(again) + 1):
        again.set_epoch(2)
        again.skip(k)
        assert equal(listed(again), whole[2][k:])
    assert equal(listed(again), whole[2]), "skip holds for one iteration"
    assert len(again) == len(whole[0])
    assert not equal(whole[0], whole[1])
    other = make(seed=4)
    assert not equal(listed(other), whole[0])


def test_the_global_random_state_is_left_alone_and_does_not_matter(make):
    loader = make(seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = listed(loader)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(2)
    random.seed(2)
    assert equal(first, listed(loader))


def test_shards_together_are_the_batch(make):
    loader = make(seed=3)
    whole = listed(loader)
    parts = [listed(loader.shard(rank, 2)) for rank in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for i, value in enumerate(batch):
            assert torch.equal(value[0::2], halves[0][i])
            assert torch.equal(value[1::2], halves[1][i])
    assert equal(listed(loader), whole)


def test_workers_change_nothing(small):
    assert equal(listed(disk(small, workers=2, with_indices=True)), listed(disk(small, with_indices=True)))


def test_an_epoch_is_a_permutation_less_the_incomplete_batch():
    loader = memory(with_indices=True)
    indices = torch.cat([batch[2] for batch in loader])
    assert len(loader) == 6
    assert len(indices.unique()) == 48
    labels = torch.cat([batch[1] for batch in loader])
    assert torch.equal(labels, indices % 5)
    assert len(memory(batch_size=64)) == 1, "a set smaller than a batch is not dropped"
    assert len(memory(shuffle=False)) == 7


def test_values_are_normalised_as_torchvision_does():
    from torchvision.transforms import v2

    loader = memory(augment=None, shuffle=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
    torch.testing.assert_close(torch.cat([images for images, _ in loader]), reference(loader.images))


@settings(max_examples=30, deadline=None)
@given(
    padding=st.integers(0, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    flip=st.booleans(),
    seed=st.integers(0, 999),
)
def test_flip_and_crop_is_padding_slicing_and_mirroring(padding, height, width, flip, seed):
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(1, 256, (5, 2, height, width), generator=g).to(torch.uint8)
    augment = FlipAndCrop(padding, flip)
    draws = augment.draw(5, g)
    assert flip or not draws[:, 2].any()
    found = augment.apply(images, draws)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    for i, (row, column, mirrored) in enumerate(draws.tolist()):
        expected = padded[i, :, row : row + height, column : column + width]
        assert np.array_equal(found[i].numpy(), expected[:, :, ::-1] if mirrored else expected)


def test_randaugment_is_what_torchvision_does_with_the_seed_of_the_image():
    from torchvision.transforms import v2

    images = torch.randint(256, (6, 3, 12, 12), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    augment = ShiftAndRandAugment(9)
    draws = augment.draw(6, torch.Generator().manual_seed(1))
    found = augment.apply(images, draws)
    shifted = FlipAndCrop().apply(images, draws[:, :3])
    with torch.random.fork_rng([]):
        for image, seed, own in zip(shifted, draws[:, 3].tolist(), found, strict=True):
            torch.manual_seed(seed)
            assert torch.equal(v2.RandAugment(magnitude=9)(image), own)
    assert not torch.equal(found, shifted)
    assert torch.equal(augment.apply(images[1::2], draws[1::2]), found[1::2])


def test_randaugment_is_part_of_what_a_run_is(small):
    spec = f"imagefolder:{small}"
    plain, strong = open_data(spec).train, open_data(spec, randaugment=5).train
    assert plain.randomness == "training images are augmented by FlipAndCrop(padding=4, flip=True)"
    assert "magnitude=5" in strong.randomness and open_data(spec, randaugment=5).train_plain.randomness is None
    assert "magnitude 5" in open_data(spec, randaugment=5, size=80).train.randomness
    assert not equal(listed(plain), listed(strong))


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("digits", {}, "the digits are left as they are"),
        ("{folder}", {"augment": False}, "no image is to be augmented"),
        ("{folder}", {"randaugment": 31}, "it must be from 0 to 30. Give 0 to 30; 9 is usual."),
        ("own.py:make_loaders", {}, "your own loaders prepare images themselves"),
    ],
)
def test_randaugment_that_cannot_be_is_refused(spec, more, message, small):
    with pytest.raises(ConfigError) as refused:
        open_data(spec.format(folder=f"imagefolder:{small}"), **({"randaugment": 9} | more))
    assert message in str(refused.value)


def test_augmentation_draws_for_every_image():
    draws = FlipAndCrop(4).draw(5000, torch.Generator().manual_seed(0))
    assert draws[:, :2].unique().tolist() == list(range(9))
    assert 0.4 < draws[:, 2].float().mean() < 0.6
    assert len(draws.unique(dim=0)) == 162


def test_digits():
    data = open_data("digits", batch_size=64)
    assert (data.input_size, len(data.classes)) == ((1, 8, 8), 10)
    images, labels = (torch.cat(parts) for parts in zip(*data.train_plain, strict=True))
    test_labels = torch.cat([y for _, y in data.test])
    assert len(labels) + len(test_labels) == 1797
    share = torch.bincount(test_labels) / (torch.bincount(labels) + torch.bincount(test_labels))
    assert share.tolist() == pytest.approx([0.2] * 10, abs=0.01)
    assert images.mean().item() == pytest.approx(0, abs=1e-3)
    assert images.std().item() == pytest.approx(1, abs=1e-3)
    raw = images * data.normalisation[1][0] + data.normalisation[0][0]
    assert raw.min().item() == pytest.approx(0, abs=1e-6)
    assert raw.max().item() == pytest.approx(1, abs=1e-6)
    train, _ = next(iter(data.train))
    assert train.shape == (64, 1, 8, 8)


@pytest.mark.parametrize(("size", "suffix"), [((8, 8), "png"), ((10, 6), "png"), ((8, 8), "bmp")])
def test_small_images_are_held_in_memory(tmp_path, size, suffix):
    folder = write_images(tmp_path / "x", size=size, suffix=suffix)
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    data = open_data(f"imagefolder:{folder}", batch_size=4)
    assert isinstance(data.train, MemoryLoader)
    assert data.classes == ("ant", "bee", "cow")
    assert data.input_size == (3, *size)
    images, labels = (torch.cat(parts) for parts in zip(*data.test, strict=True))
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in data.normalisation)
    expected = np.asarray(Image.open(folder / "test" / "bee" / f"1.{suffix}")).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(images[4] * std + mean, expected, atol=1e-6)
    assert (len(data.train), len(data.train_plain)) == (4, 5)


def test_large_images_are_read_from_disk(tmp_path):
    folder = write_images(tmp_path / "x", size=(90, 70), train=3, test=2, suffix="jpg")
    data = open_data(f"imagefolder:{folder}", batch_size=4, with_indices=True)
    images, labels, indices = next(iter(data.train))
    assert images.shape == (4, 3, 224, 224)
    assert torch.equal(labels, indices // 3)
    assert data.input_size == (3, 224, 224)
    assert next(iter(data.test))[0].shape == (4, 3, 224, 224)
    assert equal(listed(data.train_plain), listed(data.train_plain))
    plain = open_data(f"imagefolder:{folder}", batch_size=4, augment=False).train
    assert equal(listed(plain)[:1], listed(plain)[:1])


def test_a_small_set_too_big_for_memory_is_read_from_disk_alike(small, monkeypatch):
    held = open_data(f"imagefolder:{small}", batch_size=4)
    monkeypatch.setattr(open_folder, "MEMORY", 10)
    read = open_data(f"imagefolder:{small}", batch_size=4)
    assert isinstance(read.train, DiskLoader)
    for (a, x), (b, y) in zip(held.test, read.test, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(x, y)
    assert next(iter(read.train))[0].shape == (4, 3, 8, 8)


def test_the_cache_serves_until_a_file_changes(small, tmp_path, monkeypatch):
    spec, cache = f"imagefolder:{small}", tmp_path / "cache"
    first = open_data(spec, cache=cache)
    kept = sorted(cache.glob("*.safetensors"))
    assert len(kept) == 2
    with monkeypatch.context() as patch:
        patch.setattr("indistill_fx.data.decoding._decoded", lambda *_, **__: pytest.fail("decoded again"))
        second = open_data(spec, cache=cache)
    assert torch.equal(first.train.images, second.train.images)
    Image.new("RGB", (8, 8), (255, 0, 0)).save(small / "test" / "ant" / "0.png")
    assert open_data(spec, cache=cache).test.images[0, 0].eq(255).all()
    for file in kept:
        file.write_bytes(b"broken")
    again = open_data(spec, cache=cache)
    assert torch.equal(first.train.images, again.train.images)
    (damaged, figures) = again.notes
    assert "damaged" in damaged and "decoded anew" in damaged
    assert open_data(spec, cache=cache).notes == (figures,)


def test_limit_spreads_over_the_classes_whatever_the_seed(small):
    data = open_data(f"imagefolder:{small}", limit=7, seed=1)
    assert torch.bincount(data.train.labels).tolist() == [3, 2, 2]
    assert torch.bincount(data.test.labels).tolist() == [3, 2, 2]
    other = open_data(f"imagefolder:{small}", limit=7, seed=2)
    assert torch.equal(data.train.images, other.train.images)
    assert torch.bincount(open_data("digits", limit=100).train.labels).tolist() == [10] * 10


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 45))
def test_spread_is_as_even_as_can_be(labels, count):
    labels = torch.tensor(labels)
    kept = torch.bincount(labels[spread(labels, count)], minlength=5)
    assert int(kept.sum()) == min(count, len(labels))
    cut = kept < torch.bincount(labels, minlength=5)
    assert not cut.any() or int(kept.max()) <= int(kept[cut].min()) + 1
    ranks = rank_in_class(labels).tolist()
    assert ranks == [labels[:i].tolist().count(int(label)) for i, label in enumerate(labels)]


def test_files_that_are_not_read_are_mentioned(small):
    clean = open_data(f"imagefolder:{small}").notes
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (small / "train" / "ant" / name).write_bytes(b"x")
    assert open_data(f"imagefolder:{small}").notes == clean
    Image.new("RGB", (8, 8)).save(small / "train" / "ant" / "moving.GIF")
    (small / "test" / "bee" / "a").mkdir()
    for name in ("a/x.heic", "y.heic", "LICENCE"):
        (small / "test" / "bee" / name).write_bytes(b"x")
    ends = "images end in .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp."
    assert open_data(f"imagefolder:{small}").notes == (
        f"{small / 'train'}: 1 file was not read, because of its name (.gif); {ends}",
        f"{small / 'test'}: 3 files were not read, because of their names (.heic, LICENCE); {ends}",
        *clean,
    )


def test_bad_folders_are_named(small, tmp_path):
    def refused(folder, match):
        with pytest.raises(ConfigError, match=match) as caught:
            open_data(f"imagefolder:{folder}")
        assert "\n" not in str(caught.value)

    refused(tmp_path / "absent", "There is no folder .*absent")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"has no train/; it contains nothing")
    refused(small / "train", r"has no train/; it contains ant, bee, cow")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    refused(tmp_path / "bare", "has no class folders")
    (tmp_path / "bare" / "train" / "ant").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "train" / "ant" / "0.png")
    refused(tmp_path / "bare", r"has no test/; it contains train")
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "train" / "1.png")
    refused(tmp_path / "bare", r"has images outside of the class folders, such as '1.png'")
    (small / "train" / "dog").mkdir()
    refused(small, "dog' has no images")
    Image.new("RGB", (8, 8)).save(small / "train" / "dog" / "0.png")
    refused(small, "differ in their classes; only one has dog")


@pytest.mark.parametrize("size", [8, 80])  # in memory and on disk
def test_the_first_samples_of_the_plain_loader_are_of_all_classes(tmp_path, size):
    """Calibration takes the first; class by class, they would all be ants."""
    for split, label in itertools.product(("train", "test"), range(3)):
        folder = tmp_path / split / ("ant", "bee", "cow")[label]
        folder.mkdir(parents=True)
        for number in range(4 + label):
            Image.new("RGB", (8, 8), (80 * label + number, 0, 0)).save(folder / f"{number}.png")
    data = open_data(f"imagefolder:{tmp_path}", batch_size=6, size=size)
    batches = list(data.train_plain)
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1, 2] * 4 + [1, 2, 2]
    assert torch.cat([labels for _, labels in data.test]).tolist() == [0] * 4 + [1] * 5 + [2] * 6
    reds = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    expected = [80 * label + number for number in range(6) for label in range(3) if number < 4 + label]
    assert reds.argsort().tolist() == torch.tensor(expected).argsort().tolist()
    some = open_data(f"imagefolder:{tmp_path}", batch_size=6, size=size, limit=6)
    assert next(iter(some.train_plain))[1].tolist() == [0, 1, 2, 0, 1, 2]


def test_images_without_labels_are_mixed_for_calibration(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(50):
            Image.new("L", (8, 8), 5 * number).save(tmp_path / split / f"{number:02}.png")
    first, again = (open_data(f"imagefolder:{tmp_path}", batch_size=50, seed=seed) for seed in (0, 1))
    values = [next(iter(data.train_plain))[0][:, 0, 0, 0] for data in (first, again)]
    assert torch.equal(*values) and not torch.equal(values[0], values[0].sort().values)
    assert torch.equal(values[0].sort().values, next(iter(first.test))[0][:, 0, 0, 0])


def test_accents_may_be_encoded_either_way(tmp_path):
    """As one character or, by macOS, as two; which would also sort otherwise: é after z, e with an accent before f."""
    for split, form in (("train", "NFC"), ("test", "NFD")):
        for label, name in enumerate(("ez", "\u00e9a", "zoo")):
            folder = tmp_path / split / normalize(form, name)
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (100 * label, 0, 0)).save(folder / "0.png")
    data = open_data(f"imagefolder:{tmp_path}", batch_size=3)
    assert data.classes == ("ez", "zoo", "\u00e9a")
    for loader in (data.train_plain, data.test):
        images, labels = next(iter(loader))
        assert images[labels.argsort(), 0, 0, 0].diff().sign().tolist() == [1, -1]
    (tmp_path / "train" / normalize("NFD", "\u00e9a")).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "train" / normalize("NFD", "\u00e9a") / "0.png")
    with pytest.raises(ConfigError, match="two class folders called '\u00e9a'"):
        open_data(f"imagefolder:{tmp_path}")
    with pytest.raises(ConfigError, match="needs a folder"):
        open_data("imagefolder")


@pytest.mark.parametrize("broken", ["truncated", "text", "empty"])
@pytest.mark.parametrize("size", [8, 90])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path, broken, size, workers):
    folder = write_images(tmp_path / "x", size=(size, size), suffix="jpg", train=2, test=2)
    file = folder / "test" / "cow" / "1.jpg"
    file.write_bytes({"truncated": file.read_bytes()[:-200], "text": b"hello", "empty": b""}[broken])
    with pytest.raises(ConfigError, match=r"cow/1.jpg' cannot be read") as caught:
        listed(open_data(f"imagefolder:{folder}", workers=workers).test)
    assert str(file) in caught.value.where


def test_bad_options_are_refused(small):
    with pytest.raises(ConfigError, match=r"'cifar' is not a data set. Nearest: cifar10"):
        open_data("cifar")
    with pytest.raises(ConfigError, match="seed is -1"):
        open_data("digits", seed=-1)
    with pytest.raises(ConfigError, match="batch size is 0"):
        open_data("digits", batch_size=0)
    with pytest.raises(ConfigError, match="limit is 0"):
        open_data("digits", limit=0)
    with pytest.raises(ConfigError, match="takes no 'x'"):
        open_data("digits:x")


def test_a_path_alone_is_refused_with_what_to_write(tmp_path):
    with pytest.raises(ConfigError, match=rf"a folder, .* write imagefolder:{tmp_path}\."):
        open_data(str(tmp_path))
    with pytest.raises(ConfigError, match=r"^mine\.py is a file of code, .* mine\.py:make_loaders\.$"):
        open_data("mine.py")
    with pytest.raises(ConfigError, match="'absent'"):
        open_data("absent")


def test_cifar_comes_from_torchvision(tmp_path, monkeypatch):
    from torchvision import datasets

    class Fake:
        classes = ("ape", "bus")

        def __init__(self, root, *, train, download):
            self.data = np.full((6 if train else 4, 32, 32, 3), 10 if train else 20, np.uint8)
            self.targets = [0, 1] * (3 if train else 2)
            assert (root, download) == (tmp_path, False)

    monkeypatch.setattr(datasets, "CIFAR100", Fake)
    data = open_data(f"cifar100:{tmp_path}", download=False)
    assert (data.classes, data.input_size) == (("ape", "bus"), (3, 32, 32))
    assert (len(data.train.images), len(data.test.images)) == (6, 4)
    assert data.test.images.unique().tolist() == [20]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_cifar_says_where_it_was_looked_for(tmp_path, name):
    with pytest.raises(ConfigError, match=rf"is not under '{tmp_path}'.*{name}:DIR"):
        open_data(f"{name}:{tmp_path}", download=False)


USER_CODE = """
import torch
from torch.utils.data import DataLoader, TensorDataset
from indistill_fx.data import open_data

def loaders(count=20, labels=None, batch_size=5):
    y = torch.arange(count) % 4 if labels is None else labels
    return DataLoader(TensorDataset(torch.randn(count, 3, 4, 4), y), batch_size=batch_size)

def pair(batch_size):
    return loaders(batch_size=batch_size), loaders(12)

def mapping():
    return {"train": loaders(), "test": loaders(12), "train_plain": loaders(20, batch_size=20), "classes": ["a"] * 4}

def ready(seed, limit):
    return open_data("digits", seed=seed, limit=limit)

def dicts():
    batches = [{"pixels": torch.randn(2, 3, 4, 4), "labels": torch.tensor([0, 1])}]
    return batches, batches

def out_of_range():
    return {"train": loaders(), "test": loaders(12), "classes": ["a"] * 3}

def negative():
    return loaders(), loaders(3, torch.tensor([0, -1, 2]))

def words():
    return loaders(), [["a", "b"]]

def generator():
    return (batch for batch in loaders()), loaders()

def nothing():
    return [], loaders()

def single():
    return loaders()

number = 3
"""


def test_the_users_own_loaders(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER_CODE)
    data = open_data(f"{file}:pair", batch_size=10)
    assert isinstance(data, Data)
    assert (len(data.train), len(data.test), data.input_size, data.classes) == (2, 3, (3, 4, 4), ())
    data = open_data(f"{file}:mapping")
    assert (len(data.train_plain), len(data.classes)) == (1, 4)
    data = open_data(f"{file}:ready", seed=5, limit=50)
    assert (data.train.seed, len(data.train.labels)) == (5, 50)
    assert open_data(f"{file}:dicts").input_size == (3, 4, 4)
    for name, match in {
        "out_of_range": "label 3 is out of range",
        "negative": "label -1 is out of range",
        "words": "a batch of the test loader is a list without inputs that are tensors",
        "generator": "train loader .* is a generator, which cannot be iterated once per epoch",
        "nothing": "train loader .* has no batches",
        "single": "returned a value of type DataLoader",
        "number": "is not a function",
        "par": "has no 'par'.*pair",
    }.items():
        with pytest.raises(ConfigError, match=match):
            open_data(f"{file}:{name}")


def test_digits_are_resized_as_real_numbers():
    pixels = []
    for size in (None, 12):
        data = open_data("digits", size=size, batch_size=64)
        images, _ = next(iter(data.test))
        pixels.append(images * data.normalisation[1][0] + data.normalisation[0][0])
    expected = F.interpolate(pixels[0], size=(12, 12), mode="bilinear", antialias=True)
    torch.testing.assert_close(pixels[1], expected, rtol=0, atol=1e-5)


def _picture(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)


def test_links_to_folders_are_followed(tmp_path):
    """A link inside a class folder was passed over with all of its images, as was a class whose link leads nowhere."""
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            _picture(tmp_path / "data" / split / name / "0.png", 0)
    _picture(tmp_path / "store" / "second.day" / "1.png", 1)
    (tmp_path / "data/train/ant/more").symlink_to(tmp_path / "store")
    (tmp_path / "store/back").symlink_to(tmp_path / "data/train/ant")  # leads round in a circle
    (tmp_path / "link").symlink_to("data")
    for folder in ("data", "link"):
        train, test = list_splits(tmp_path / folder)
        place = tmp_path / folder / "train"
        assert train.files == tuple(
            str(place / name) for name in ("ant/0.png", "ant/more/second.day/1.png", "bee/0.png")
        )
        assert train.labels.tolist() == [0, 0, 1] and len(test.files) == 2
    (tmp_path / "data/train/cow").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"train/cow' is a link to '.*nowhere', where nothing is"):
        list_splits(tmp_path / "data")


def test_an_image_that_is_deleted_after_the_folder_was_listed_is_named(tmp_path):
    """It was a FileNotFoundError of the run's identity."""
    for split in ("train", "test"):
        for i in range(8):
            _picture(tmp_path / split / "ab"[i % 2] / f"{i}.png", 30 * i)
    data = open_data(f"imagefolder:{tmp_path}", batch_size=4, size=72)
    (tmp_path / "train/a/2.png").unlink()
    model = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    for use in (
        lambda: ifx.train(model, data.train, epochs=1, progress=False, device="cpu"),
        data.train_plain.fingerprint,
    ):
        with pytest.raises(ConfigError, match=r"Image '.*train/a/2\.png' cannot be read: .*No such file"):
            use()
