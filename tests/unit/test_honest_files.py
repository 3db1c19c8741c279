"""Honest files that were once refused, or refused for a reason that was wrong; each loads, and gives what was saved."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import fx, nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.loading.state_dicts import read_state_dict

PACKAGE = """
from torch import nn

class Options(dict):
    pass

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.options = nn.Linear(2, 2), Options(a=1)

    def forward(self, x):
        return self.linear(x)
"""


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


@pytest.mark.parametrize(
    ("beside", "trust"),
    [
        ({"args": argparse.Namespace(lr=0.1)}, []),  # as torchvision's and timm's own training scripts save it
        ({"best": np.float64(0.5)}, []),
        ({"best": np.float64(0.5)}, ["numpy"]),
        ({"args": {"out": Path("a")}}, []),
    ],
    ids=["args of scripts", "a numpy number", "the same, numpy trusted", "a path"],
)
def test_what_lies_beside_weights_is_no_reason_to_refuse_them(beside, trust, tmp_path):
    state = net().state_dict()
    torch.save({"model": state, **beside}, tmp_path / "weights.pth")
    found, *_ = read_state_dict(tmp_path / "weights.pth", trust=trust)
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_a_class_of_a_trusted_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "honest_package.py").write_text(PACKAGE)
    import honest_package

    model = honest_package.Net()
    torch.save(model, tmp_path / "model.pt")
    found = ifx.load(str(tmp_path / "model.pt"), trust=["honest_package"])
    assert torch.equal(found.linear.weight, model.linear.weight) and found.options == {"a": 1}
    sys.modules.pop("honest_package")


def made() -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(net())
    return {
        "features_only": timm.create_model("resnet10t", features_only=True),
        "dynamically quantised": quantised,
        "averaged weights": torch.optim.swa_utils.AveragedModel(net()),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(made()))
def test_models_of_other_makes(name, tmp_path):
    model = made()[name].eval()
    x = (
        torch.randn(2, 2)
        if isinstance(model, nn.Sequential) or name == "averaged weights"
        else torch.randn(2, 3, 64, 64)
    )
    torch.save(model, tmp_path / "model.pt")
    expected, found = model(x), ifx.load(str(tmp_path / "model.pt")).eval()(x)
    torch.testing.assert_close(found, expected)


def test_a_graph_that_calls_the_users_own_function_is_refused_with_what_to_do(tmp_path):
    """It is not called damaged."""
    graph = fx.Graph()
    graph.output(graph.call_function(read_state_dict, (graph.placeholder("x"),)))
    torch.save(fx.GraphModule(nn.Module(), graph), tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"save it by torch\.export\.save") as told:
        ifx.load(str(tmp_path / "model.pt"))
    assert "damaged" not in str(told.value)


def test_a_file_may_be_named_by_a_path(tmp_path):
    torch.save(nn.Sequential(nn.Linear(3, 2)), tmp_path / "model.pt")
    assert ifx.load(tmp_path / "model.pt")[0].out_features == 2
