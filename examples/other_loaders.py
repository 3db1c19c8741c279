"""Data sets of Hugging Face's `datasets`, and shards of WebDataset, as loaders of one's own.

    pip install datasets webdataset
    python examples/other_loaders.py                                  a tiny data set in both forms, under examples-data/
    indistill-fx train examples/other_loaders.py:network --data examples/other_loaders.py:hugging_face -o runs/a --epochs 2
    indistill-fx train examples/other_loaders.py:network --data examples/other_loaders.py:web_dataset -o runs/b --epochs 2

A function that makes loaders is given those of batch_size, seed, workers, limit and augment that it has parameters for. It returns the
loaders by name, and what else is known: the classes, and what the images are normalised by, so that a teacher that wants other figures
can have them.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

HOME = Path("examples-data")
CLASSES = ("dark", "bright")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def hugging_face(batch_size: int = 32, seed: int = 0, workers: int = 0) -> dict[str, Any]:
    """Loaders of a data set on disk. Batches are dicts with `pixel_values` and `labels`; a model gets what its forward names."""
    from datasets import load_from_disk

    def prepared(samples: Mapping[str, Any]) -> dict[str, Any]:
        return {"pixel_values": [pixels_of(one) for one in samples["image"]], "labels": samples["label"]}

    def loader(split: str, *, shuffle: bool) -> DataLoader[Any]:
        dataset = load_from_disk(str(HOME / "hugging_face"))[split].with_transform(prepared)
        order = torch.Generator().manual_seed(seed)
        return DataLoader(dataset, batch_size, shuffle=shuffle, num_workers=workers, generator=order)

    return told(loader("train", shuffle=True), loader("train", shuffle=False), loader("test", shuffle=False))


def web_dataset(batch_size: int = 32, workers: int = 0) -> dict[str, Any]:
    """Loaders of shards of tar files, which are streams: nobody knows how many batches there are before the end.

    Of several processes each reads all shards and is given its share of every batch, so that none is seen twice: WebDataset must not share
    them out itself (`nodesplitter`).
    """
    import webdataset as wds

    def loader(split: str, *, buffered: int = 0) -> DataLoader[Any]:
        shards = sorted(str(path) for path in (HOME / "web_dataset").glob(f"{split}-*.tar"))
        stream = wds.WebDataset(shards, shardshuffle=False, nodesplitter=_all_of_them, empty_check=False)
        stream = stream.shuffle(buffered) if buffered else stream
        samples = stream.decode("pil").to_tuple("png", "cls").map_tuple(pixels_of, int)
        return DataLoader(samples, batch_size, num_workers=workers)

    return told(loader("train", buffered=256), loader("train"), loader("test"))


def _all_of_them(shards: Any) -> Any:
    return shards


def pixels_of(picture: Image.Image) -> Tensor:
    """(3, height, width), normalised."""
    values = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255).movedim(2, 0)
    mean, std = (torch.tensor(figures).view(3, 1, 1) for figures in (MEAN, STD))
    return (values - mean) / std


def told(train: Any, train_plain: Any, test: Any) -> dict[str, Any]:
    """Loaders, and what is known of the data."""
    return {
        "train": train,
        "train_plain": train_plain,
        "test": test,
        "classes": CLASSES,
        "normalisation": (MEAN, STD),
    }


class Network(nn.Module):
    """A small classifier, whose input has the name that the dict batches use."""

    def __init__(self, width: int):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, width), (width, 2 * width)):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU()]
        self.features, self.head = nn.Sequential(*layers), nn.Linear(2 * width, len(CLASSES))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(batch, 3, height, width) → (batch, classes)."""
        return self.head(self.features(pixel_values).mean((2, 3)))


def network(width: int = 8) -> nn.Module:
    """A fresh one."""
    return Network(width)


def picture(number: int) -> Image.Image:
    """Dark ones and bright ones in turn."""
    low = 128 * (number % 2)
    pixels = np.random.default_rng(number).integers(low, low + 128, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(samples: Mapping[str, int]) -> None:
    """A tiny data set in both forms."""
    import webdataset as wds
    from datasets import ClassLabel, Dataset, DatasetDict, Features
    from datasets import Image as Picture

    features = Features({"image": Picture(), "label": ClassLabel(names=list(CLASSES))})
    splits = {}
    for split, count in samples.items():
        held = {"image": [picture(n) for n in range(count)], "label": [n % 2 for n in range(count)]}
        splits[split] = Dataset.from_dict(held, features=features)
        (HOME / "web_dataset").mkdir(parents=True, exist_ok=True)
        for shard in range(2):
            with wds.TarWriter(str(HOME / "web_dataset" / f"{split}-{shard}.tar")) as sink:
                for number in range(shard, count, 2):
                    sink.write({"__key__": f"{number:05}", "png": encoded(picture(number)), "cls": number % 2})
    DatasetDict(splits).save_to_disk(str(HOME / "hugging_face"))


def encoded(image: Image.Image) -> bytes:
    """As PNG."""
    held = io.BytesIO()
    image.save(held, format="PNG")
    return held.getvalue()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny data set in both forms.")
    parser.add_argument("--train", type=int, default=64)
    parser.add_argument("--test", type=int, default=16)
    asked = parser.parse_args()
    write({"train": asked.train, "test": asked.test})
