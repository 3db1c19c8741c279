"""What an exported ONNX file states of its data is known when it is loaded again."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.metadata import of_source
from indistill_fx.errors import ConfigError
from indistill_fx.loading.load import load_source
from indistill_fx.loading.onnx.read import read_onnx
from indistill_fx.loading.onnx.stated import stated_in


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


def test_a_file_that_takes_pixels_normalises_them_itself(tmp_path: Path) -> None:
    figures = ((0.1, 0.2, 0.3), (0.05, 0.06, 0.07))
    path = tmp_path / "pixels.onnx"
    export_onnx(network(), path, torch.randn(2, 3, 8, 8), preprocess=figures, metadata=of_source(normalisation=figures))
    assert stated_in(read_onnx(path), 3, "pixels") == (None, ())
