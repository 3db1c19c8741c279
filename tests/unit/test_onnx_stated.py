"""What an exported ONNX file states of its data is known when it is loaded again."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.metadata import of_source
from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import load_source


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def test_a_file_states_its_own_normalisation_and_classes(tmp_path: Path) -> None:
    figures, names = ((0.1, 0.2, 0.3), (0.05, 0.06, 0.07)), ("ant", "bee")
    path, x = tmp_path / "stated.onnx", torch.randn(2, 3, 8, 8)
    export_onnx(network(), path, x, metadata=of_source(classes=names, normalisation=figures))
    source = load_source(str(path))
    assert (source.wanted_normalisation, source.classes) == (figures, names)
    model = onnx.load(path)
    entries = {entry.key: entry for entry in model.metadata_props}
    entries["std"].value = "[0.1, 0, 0.1]"
    onnx.save(model, path)
    with pytest.raises(ConfigError, match="impossible normalisation"):
        load_source(str(path))
    entries["indistill_fx"].key = "another"
    onnx.save(model, path)
    assert load_source(str(path)).wanted_normalisation is None


@pytest.mark.parametrize("prefix", ["", "onnxruntime:"])
def test_a_file_that_takes_pixels_is_a_model_of_normalised_images(tmp_path: Path, prefix: str) -> None:
    figures = ((0.1, 0.2, 0.3), (0.05, 0.06, 0.07))
    path, module = tmp_path / "pixels.onnx", network()
    facts = of_source(normalisation=figures, classes=("ant", "bee"))
    export_onnx(module, path, torch.randn(2, 3, 8, 12), preprocess=figures, metadata=facts)
    source = load_source(prefix + str(path))
    known = (source.wanted_normalisation, source.classes, source.input_size, source.wanted_size)
    assert known == (figures, ("ant", "bee"), (3, 8, 12), (8, 12))
    pixels = torch.randint(0, 256, (5, 8, 12, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in figures)
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(source.module(images), module(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(source.module(pixels), module(images), rtol=1e-4, atol=1e-4)
    traced = ifx.trace(source.module, images, role="teacher")
    torch.testing.assert_close(traced.graph_module(images), module(images), rtol=1e-4, atol=1e-4)


def test_an_open_size_of_pixels_is_given_as_of_images(tmp_path: Path) -> None:
    figures, path = ((0.1, 0.2, 0.3), (0.05, 0.06, 0.07)), tmp_path / "pixels.onnx"
    export_onnx(network(), path, torch.randn(2, 3, 8, 12), preprocess=figures, dynamic_size=True)
    assert load_source(f"{path}?input=3x20x24").input_size == (3, 20, 24)


def test_a_preprocessing_of_what_is_not_pixels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "edited.onnx"
    export_onnx(network(), path, torch.randn(2, 3, 8, 8))
    model = onnx.load(path)
    model.metadata_props.add(key="preprocess", value='{"mean": [0.5], "std": [0.5]}')
    onnx.save(model, path)
    with pytest.raises(ConfigError, match=r"its input `input` is not pixels"):
        load_source(str(path))


def test_a_black_box_says_what_it_was_given_instead_of_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "box.onnx"
    export_onnx(network(), path, torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"onnxruntime fails on inputs of 2x1x8x8.*--channels"):
        load_source(f"onnxruntime:{path}").module(torch.randn(2, 1, 8, 8))
