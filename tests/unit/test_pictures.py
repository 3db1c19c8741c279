"""Pictures as files hold them: every mode and depth, turned or grey, hidden or unlabelled, and what is said of them."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from indistill_fx.data import open_folder
from indistill_fx.data.dataset import Data
from indistill_fx.data.disk_loader import DiskLoader
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.data.normalisation import PUBLISHED
from indistill_fx.data.open import open_data
from indistill_fx.data.pictures import read_head, read_picture
from indistill_fx.errors import ConfigError

LARGE = (80, 70)


def saved(folder: Path, draw, *, classes=("ant", "bee"), train=3, test=2, suffix="png", **options):
    """A folder of pictures `draw(label, number)`, each a PIL image or the bytes of a file."""
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                picture, path = draw(label, number), folder / split / name / f"{number}.{suffix}"
                path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path, **options)
    return folder


def noise(seed, *shape, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def coloured(size=(8, 8)):
    return lambda label, number: Image.fromarray(noise(10 * label + number, *size, 3))


def pixels_of(data: Data) -> torch.Tensor:
    """All test pictures, no longer normalised: values from 0 to 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in data.normalisation)
    return torch.cat([images for images, _ in data.test]) * std + mean


def png16(values):
    """A PNG of 16 bits a channel, which Pillow does not write: (height, width, 3)."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8, 8), LARGE])
def test_sixteen_bits_are_all_kept(tmp_path, size):
    values = [noise(n, *size, high=65536, dtype=np.uint16) for n in range(4)]
    folder = saved(tmp_path, lambda label, number: Image.fromarray(values[2 * label + number]), train=2)
    data = open_data(f"imagefolder:{folder}", size=size)
    assert isinstance(data.test, MemoryLoader if size == (8, 8) else DiskLoader)
    found = pixels_of(data)
    if size == (8, 8):  # larger ones are resized and cropped
        expected = np.stack(values)[:, None].repeat(3, 1) / 65535
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        train = next(iter(open_data(f"imagefolder:{folder}").train))[0][:, 0]
        assert len(train.unique()) > 64, "augmented too"
    else:
        assert len((found * 65535).round().unique()) > 10_000
    assert 0.4 < found.mean() < 0.6


def test_a_set_of_both_depths_has_one_scale(tmp_path):
    deep, flat = np.full((8, 8), 25700, np.uint16), np.full((8, 8), 100, np.uint8)
    data = open_data(f"imagefolder:{saved(tmp_path, lambda label, _: Image.fromarray(flat if label else deep))}")
    np.testing.assert_allclose(pixels_of(data).numpy(), 100 / 255, atol=1e-6)


def test_a_deep_picture_that_nobody_expected_is_named(tmp_path, monkeypatch):
    folder = saved(tmp_path, coloured())
    Image.fromarray(np.full((8, 8), 25700, np.uint16)).save(folder / "test" / "bee" / "1.png")
    monkeypatch.setattr("indistill_fx.data.image_folders._LOOKED_AT", 1)
    with pytest.raises(ConfigError, match=r"bee/1.png' has 16 bits a channel, but the others have 8. Convert"):
        open_data(f"imagefolder:{folder}")


@pytest.mark.parametrize(
    ("mode", "dtype", "match"),
    [("I", np.int32, "it has 32-bit values, and which of them is white"), ("F", np.float32, "floating-point values")],
)
def test_values_of_no_known_range_are_refused(tmp_path, mode, dtype, match):
    folder = saved(tmp_path, lambda *_: Image.fromarray(np.zeros((8, 8), dtype)), suffix="tif")
    with pytest.raises(ConfigError, match=rf"0.tif' cannot be read: .*{match}"):
        open_data(f"imagefolder:{folder}")


def test_sixteen_bit_colours_would_lose_bits_and_are_refused(tmp_path):
    path = tmp_path / "x.png"
    for content in (png16(noise(0, 4, 4, 3)), b"P6 2 2 65535\n" + bytes(24)):
        path.write_bytes(content)
        for read in (read_head, read_picture):
            with pytest.raises(
                ConfigError, match="colours of 16 bits, of which only 8 could be read; save it with 8 bits"
            ):
                read(str(path))
    path.write_bytes(b"P5 2 2 65535\n" + np.array([0, 1, 256, 65535], ">u2").tobytes())
    assert read_picture(str(path), channels=1, deep=True).flatten().tolist() == [0, 1, 256, 65535]


@pytest.mark.parametrize("mode", ["P", "PA", "1", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_keeps_its_colours(tmp_path, mode):
    base = Image.fromarray(np.kron(noise(0, 2, 2, 3), np.ones((8, 8, 1), np.uint8)))  # four flat fields
    picture = base.quantize(4) if mode == "P" else base.convert(mode)
    suffix = "tif" if mode in ("PA", "CMYK", "YCbCr") else "png"
    path = tmp_path / f"x.{suffix}"
    picture.save(path)
    expected = np.asarray(picture.convert("RGB"), np.int64)
    np.testing.assert_array_equal(np.asarray(read_picture(str(path)), np.int64), expected)
    if mode in ("P", "RGBA"):
        np.testing.assert_array_equal(expected, np.asarray(base))
    if mode == "CMYK":
        np.testing.assert_allclose(expected, np.asarray(base), atol=1)
    assert read_picture(str(path), channels=1).mode == "L"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    upright = noise(0, 6, 4, 3)
    turned = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "x.png")
    Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif)
    np.testing.assert_array_equal(np.asarray(read_picture(path)), upright)
    head = read_head(path)
    assert (head.height, head.width) == (6, 4)


def test_grey_and_colours_on_request(tmp_path):
    folder = saved(tmp_path / "x", coloured())
    grey = open_data(f"imagefolder:{folder}", channels=1)
    assert grey.input_size == (1, 8, 8)
    assert next(iter(grey.train))[0].shape[1:] == (1, 8, 8)
    expected = np.asarray(Image.open(folder / "test" / "ant" / "0.png").convert("L")) / 255
    np.testing.assert_allclose(pixels_of(grey)[0, 0].numpy(), expected, atol=1e-6)
    assert grey.normalisation[0] == pytest.approx((0.485 * 0.299 + 0.456 * 0.587 + 0.406 * 0.114,))
    large = open_data(f"imagefolder:{folder}", channels=1, size=96)
    assert isinstance(large.train, DiskLoader)
    assert next(iter(large.train))[0].shape[1:] == (1, 96, 96)
    assert open_data("digits", channels=3, size=(16, 12)).input_size == (3, 16, 12)
    with pytest.raises(ConfigError, match="channels is 4"):
        open_data("digits", channels=4)


def test_pictures_of_several_sizes_are_brought_to_the_commonest_and_that_is_said(tmp_path):
    sizes = [(12, 10), (8, 9), (8, 9)]
    folder = saved(tmp_path, lambda _, number: Image.fromarray(noise(number, *sizes[number], 3)))
    data = open_data(f"imagefolder:{folder}")
    assert data.input_size == (3, 8, 9)
    assert data.notes[:-1] == ("4 of 10 images were not 8x9 as most are, and were resized to it.",)
    assert open_data(f"imagefolder:{folder}", cache=tmp_path / "cache").notes == data.notes
    assert open_data(f"imagefolder:{folder}", cache=tmp_path / "cache").notes == data.notes
    assert open_data(f"imagefolder:{folder}", size=(6, 7)).input_size == (3, 6, 7)
    assert open_data(f"imagefolder:{folder}", size=(6, 7)).notes == data.notes[-1:]


def test_larger_pictures_take_the_models_size(tmp_path):
    folder = saved(tmp_path, coloured(LARGE))
    data = open_data(f"imagefolder:{folder}")
    assert data.input_size == (3, 224, 224)
    assert data.notes[:-1] == ("Images (80x70) are resized and cropped to 224x224.",)
    assert open_data(f"imagefolder:{folder}", model_size=(96, 128)).input_size == (3, 96, 128)
    assert next(iter(open_data(f"imagefolder:{folder}", model_size=(96, 128)).test))[0].shape[2:] == (96, 128)
    small = saved(tmp_path / "small", coloured())
    assert open_data(f"imagefolder:{small}", model_size=(96, 128)).input_size == (3, 8, 8)


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    folder = saved(tmp_path, coloured())
    for place in ("train/ant/.ipynb_checkpoints", "train/__MACOSX", "train/.cache", "train/ant/more"):
        (folder / place).mkdir()
        shutil.copy(folder / "train/ant/0.png", folder / place / "0-checkpoint.png")
    (folder / "train/bee/._0.png").write_bytes(b"\0\5\x16\7 Mac OS X")
    data = open_data(f"imagefolder:{folder}", augment=False)
    assert data.classes == ("ant", "bee")
    assert data.train_plain.samples == 7, "the one in more/ counts"


def test_unlabelled_folders(tmp_path):
    folder = saved(tmp_path / "x", coloured())
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(5):
        coloured()(0, i).save(flat / f"{i}.png")
    alone = open_data(f"imagefolder:{flat}", batch_size=2, with_indices=True)
    images, labels, indices = next(iter(alone.train))
    assert (images.shape, labels, len(indices)) == ((2, 3, 8, 8), None, 2)
    assert (alone.labelled, alone.classes, alone.train.samples, alone.test.samples) == (False, (), 5, 5)
    assert "no class folders" in alone.notes[0]
    assert open_data(f"imagefolder:{flat}", limit=3).train.samples == 3
    shutil.rmtree(folder / "train")
    shutil.copytree(flat, folder / "train")
    mixed = open_data(f"imagefolder:{folder}", size=96, batch_size=2)
    assert (mixed.labelled, mixed.classes) == (True, ("ant", "bee"))
    assert next(iter(mixed.train))[1] is None
    assert next(iter(mixed.test))[1].tolist() == [0, 0]


def test_a_folder_is_no_cifar10_by_its_size(tmp_path):
    data = open_data(f"imagefolder:{saved(tmp_path / 'x', coloured((32, 32)))}")
    assert data.normalisation == PUBLISHED["imagenet"]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    data = open_data(f"imagefolder:{saved(tmp_path / 'y', coloured((32, 32)), classes=names)}")
    assert data.normalisation == PUBLISHED["cifar10"]
    data = open_data(f"imagefolder:{saved(tmp_path / 'z', coloured((16, 16)), classes=names)}")
    assert data.normalisation == PUBLISHED["imagenet"]


@pytest.mark.parametrize("size", [(8, 8), LARGE])
def test_mean_and_std_are_measured_on_request(tmp_path, size):
    folder = saved(tmp_path, coloured(size))
    data = open_data(f"imagefolder:{folder}", size=size, mean="auto")
    assert f"mean {data.normalisation[0][0]:.4f}" in data.notes[-1]
    images = torch.cat([images for images, _ in data.train_plain])
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


def test_mean_and_std_as_given():
    assert open_data("digits", mean="half").normalisation == ((0.5,), (0.5,))
    assert open_data("digits", mean=(0.1,), std=0.2).normalisation == ((0.1,), (0.2,))
    assert open_data("digits", channels=3, mean="imagenet").normalisation == PUBLISHED["imagenet"]
    assert open_data("digits", mean="auto").normalisation[0] == pytest.approx((0.3053,), abs=1e-3)
    for options, match in (
        (
            {"mean": (0.1,)},
            "The mean of the images is given as numbers, but their std is missing. Give both, --mean",
        ),
        ({"std": (0.1,)}, "but their mean is missing"),
        ({"mean": "imagnet"}, "'imagnet' is not a known mean of images. Nearest: imagenet"),
        ({"mean": (0.1, 0.2), "std": (0.1,)}, "The mean has 2 numbers, but the images have 1 channel"),
        ({"mean": (0.1,), "std": (0.0,)}, "A std of the images is 0"),
        ({"mean": (float("nan"),), "std": (0.1,)}, "A mean of the images is not finite"),
        ({"mean": (0.1,), "std": (float("inf"),)}, "A std of the images is not finite"),
        (
            {"mean": (123,), "std": (0.3,)},
            "of values from 0 to 1, but one is 123. If they are of values from 0 to 255, divide",
        ),
        ({"mean": (0.4,), "std": (57.5,)}, "but one is 57.5"),
    ):
        with pytest.raises(ConfigError, match=match):
            open_data("digits", **options)


def test_what_has_no_effect_is_said(tmp_path):
    assert "--workers has no effect" in open_data("digits", workers=2).notes[-1]
    folder = saved(tmp_path / "x", coloured(LARGE))
    assert "--cache has no effect" in open_data(f"imagefolder:{folder}", cache=tmp_path / "c").notes[-2]


def test_pictures_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    """One path reads pixels, the other holds them: normalised to the same bits."""
    folder = saved(tmp_path, coloured())
    held = open_data(f"imagefolder:{folder}")
    monkeypatch.setattr(open_folder, "MEMORY", 10)
    read = open_data(f"imagefolder:{folder}")
    assert isinstance(read.test, DiskLoader)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(held.test, read.test, strict=True))
