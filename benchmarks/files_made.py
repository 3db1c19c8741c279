"""How files for `attacks.py` are made: whole modules, altered archives, folders of pictures."""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

Make = Callable[[Path], list[str]]
"""Writes a file into a folder; returns the arguments for the command line."""


class Reduced:
    """Pickles as a call."""

    def __init__(self, *recipe: Any):
        self.recipe = recipe

    def __reduce__(self) -> Any:
        return self.recipe


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()


def exported_program() -> torch.export.ExportedProgram:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = ({0: torch.export.Dim("batch")},)
        return torch.export.export(network(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=batch)


def inspect(path: Path) -> list[str]:
    return ["inspect", str(path), "--input", "3x8x8"]


def saved(value: Any, *, beside: str = "", **options: Any) -> Make:
    """A file of torch.save; with `beside`, weights for that model."""

    def make(folder: Path) -> list[str]:
        held = value(folder) if callable(value) and not isinstance(value, nn.Module) else value
        torch.save(held, folder / "file.pt", **options)
        return (
            inspect(folder / "file.pt")
            if not beside
            else ["inspect", f"{beside}@{folder / 'file.pt'}", "--input", "3x64x64"]
        )

    return make


def with_attribute(name: str, value: Any) -> nn.Module:
    model = network()
    vars(model[2])[name] = value
    return model


def renamed(registry: str, name: str) -> nn.Module:
    model = network()
    if registry == "_modules":
        model._modules = {name if key == "2" else key: part for key, part in model._modules.items()}
    else:
        vars(model[0])[registry][name] = nn.Parameter(torch.ones(1))
    return model


def altered(edit: Callable[[dict[str, bytes]], Any], *, program: bool = False) -> Make:
    """An archive of torch.save or torch.export, one of whose entries was changed."""

    def make(folder: Path) -> list[str]:
        content, path = io.BytesIO(), folder / ("file.pt2" if program else "file.pt")
        if program:
            torch.export.save(exported_program(), content)
        else:
            torch.save(network(), content)
        with zipfile.ZipFile(content) as archive:
            entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        edit(entries)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                archive.writestr(f"archive/{name}", data)
        return inspect(path)

    return make


def pictures_of(content: Callable[[bytes], bytes], *, name: str = "0.png", size: int = 0) -> Make:
    """A folder of pictures, one of which was changed, under a model that is measured on them."""

    def make(folder: Path) -> list[str]:
        sound = io.BytesIO()
        Image.new("RGB", (8, 8)).save(sound, {"png": "PNG", "gif": "GIF", "webp": "WEBP"}[name.rpartition(".")[2]])
        for split in ("train", "test"):
            for label in "ab":
                place = folder / "data" / split / label
                place.mkdir(parents=True)
                (place / f"1{name}").write_bytes(sound.getvalue())
        with open(folder / "data" / "test" / "a" / name, "wb") as file:
            file.write(content(sound.getvalue()))
            file.truncate(max(size, file.tell()))
        torch.save(network(), folder / "file.pt")
        return ["evaluate", str(folder / "file.pt"), "--data", f"imagefolder:{folder / 'data'}"]

    return make
