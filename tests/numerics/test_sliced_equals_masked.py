"""Whole networks: what `shrink` slices equals the original with the readers' columns masked, and the check would see an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked

NETS: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {}),
    "mobilenet_v3_small": (64, {}),
    "shufflenet_v2_x0_5": (64, {}),
    "regnet_x_400mf": (64, {}),
    "squeezenet1_1": (64, {}),
    "SwinTransformer": (
        32,
        {"patch_size": [4, 4], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [3, 3]},
    ),
    "VisionTransformer": (
        32,
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "mlp_dim": 64},
    ),
}


def build(name: str, size: int, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """In float64, with batch norms calibrated on data and no weight left at zero: so the output depends on the input all the way."""
    import torchvision

    torch.manual_seed(0)
    make = getattr(torchvision.models, name, None) or getattr(torchvision.models.swin_transformer, name)
    module = make(**options).double()
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.normal_(0, 0.02)
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        module.train()(torch.randn(8, 3, size, size, dtype=torch.float64))
    return module.eval(), x


@pytest.mark.parametrize("name", NETS)
def test_halved_network(name: str) -> None:
    module, x = build(name, *NETS[name])
    traced = trace(module, x)
    result = shrink(traced, ratio=0.5)
    expected = run_masked(traced, result.report, x)
    moving = (expected[0] - expected[1]).abs().max()
    assert moving > 1e-3 * expected.abs().max()
    small = result.value.graph_module
    with torch.no_grad():
        assert (small(x) - expected).abs().max() <= 1e-10 * moving
        _swap_columns(small)
        assert (small(x) - expected).abs().max() > 1e-6 * moving
    whole = [layer.path for layer in result.report.layers if len(layer.kept) == layer.of]
    assert len(whole) == 1  # the classifier
    for layer in result.report.layers[:-1]:
        assert len(layer.kept) == (layer.of // layer.each + 1) // 2 * layer.each, layer.path
    small.train()
    small(torch.randn(4, *x.shape[1:], dtype=torch.float64)).sum().backward()


def _swap_columns(small: fx.GraphModule) -> None:
    readers = [m for m in small.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.shape[1] > 1]
    weight = readers[-1].weight
    weight[:, [0, 1]] = weight[:, [1, 0]]


def test_masking_makers_would_not_do() -> None:
    """Zeroing the filters that were removed is not a reference: their biases go on."""
    module, x = build("resnet18", 64, {})
    traced = trace(module, x)
    result = shrink(traced, ratio=0.5)
    with torch.no_grad():
        for layer in result.report.layers:
            gone = [k for k in range(layer.of) if k not in layer.kept]
            module.get_submodule(layer.path).weight[gone] = 0
        assert not torch.allclose(module(x), result.value.graph_module(x), rtol=1e-3)
