"""Taps are outputs: equal to what hooks see, right even where the module overwrites them, and nothing behind a cut is held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.extract.instrument import cut
from tests.nets import Cnn32, Overwritten, PreActivation, Residual, TinyTransformer, images, seeded


def hooked(module: nn.Module, paths: list[str], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What forward hooks see, each value copied at once."""
    seen: dict[str, torch.Tensor] = {}

    def hook(path: str):
        def note(_module: nn.Module, _args: object, out: torch.Tensor) -> None:
            seen.setdefault(path, out.detach().clone())

        return note

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return seen


CASES = [
    (Cnn32, ["conv1", "conv2_bn", "pool", "fc1"], images(3, 32)),
    (Residual, ["stem", "layer1", "layer1.0.bn1", "layer2.0.shortcut", "layer3", "fc"], images(3)),
    (Overwritten, ["conv", "bn", "relu"], images(3)),
    (PreActivation, ["conv1", "bn1", "bn2", "head"], images(3)),
    (TinyTransformer, ["patches", "blocks.0", "blocks.0.mlp", "blocks.1", "norm"], images(3)),
]


@pytest.mark.parametrize(("make", "paths", "x"), CASES, ids=lambda v: getattr(v, "__name__", ""))
def test_features_equal_hooks_and_output_equals_module(make, paths, x):
    module = seeded(make).eval()
    before = digest(module)
    traced = ifx.trace(module, x[:2])
    features, output = ifx.instrument(traced, paths)(x)
    assert list(features) == paths
    for path, value in hooked(module, paths, x).items():
        torch.testing.assert_close(features[path], value, rtol=0, atol=0)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)
    assert digest(module) == before


def test_in_place_relu_does_not_reach_the_tap():
    module = seeded(Overwritten).eval()
    features, _ = ifx.instrument(ifx.trace(module, images()), ["bn", "relu"])(images())
    assert (features["bn"] < 0).any()
    assert torch.equal(features["relu"], features["bn"].relu())


def test_cut_holds_nothing_behind_the_tap():
    graph = cut(ifx.trace(seeded(Residual), images()), ["layer1"]).value
    assert {name.split(".")[0] for name, _ in graph.named_parameters()} == {"stem", "layer1"}
    features, output = graph(images())
    assert output is None
    assert features["layer1"].shape == (2, 8, 16, 16)


def test_second_call_and_unknown_names():
    traced = ifx.trace(seeded(Residual), images())
    assert traced.taps["layer1.0.relu@2"] == traced.taps["layer1.0"]
    assert traced.taps["layer1.0.relu"] != traced.taps["layer1.0"]
    with pytest.raises(ifx.ConfigError, match=r"The teacher has no layer named `layr1`. Nearest: layer1"):
        ifx.instrument(traced, ["layr1"])


def test_tracing_and_taps_leave_flags_of_a_frozen_part_alone():
    module = seeded(Residual).train()
    module.layer1.eval()
    before = digest(module)
    for role in ("teacher", "student"):
        ifx.instrument(ifx.trace(module, images(), role=role), ["layer1", "fc"])
    assert digest(module) == before
    assert module.training
    assert not module.layer1[0].bn1.training


class ReadsAWeight(nn.Module):
    """Reads a layer's weight before it calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.fc((x @ self.fc.weight).relu()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_cut_before_a_layer_leaves_the_module_whole(role):
    module, x = seeded(ReadsAWeight), torch.randn(2, 8)
    before = digest(module)
    traced = ifx.trace(module, x, role=role)
    features, _ = cut(traced, [":relu"]).value(x)
    assert torch.equal(features[":relu"], (x @ module.fc.weight).relu())
    assert digest(module) == before and module.fc.bias is not None
    assert torch.equal(traced.graph_module(x), module(x))
