"""Folding changes nothing but round-off, and leaves the caller's teacher alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.lowering.fused_conv import fuse_convolutions
from tests.nets import Overwritten, PreActivation, Residual, images, seeded


def test_folded_teacher_computes_the_same():
    module = seeded(Residual, dropout=0.5).double().eval()
    before = digest(module)
    x = images(4).double()
    result = fold(ifx.instrument(ifx.trace(module, x), ["layer1", "layer2", "layer3"]))
    features, output = result.value(x)
    torch.testing.assert_close(output, module(x), rtol=1e-12, atol=1e-12)
    assert not [m for m in result.value.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.Dropout)]
    assert sum(entry.endswith(": folded") for entry in result.report.done) == 1 + 6 * 2 + 2
    assert [entry for entry in result.report.done if entry.endswith(": removed")] == ["dropout: removed"]
    assert digest(module) == before
    assert features["layer3"].shape == (4, 32, 4, 4)


def test_fresh_statistics_would_hide_a_missing_fold():
    """Negative control: without the norms' own numbers the output is another one."""
    module = seeded(Residual).double().eval()
    x = images(4).double()
    expected = module(x)
    for child in module.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            child.reset_running_stats()
    assert (module(x) - expected).abs().max() > 1e-2


def test_norms_that_cannot_be_folded_are_reported():
    traced = ifx.trace(seeded(PreActivation).eval(), images())
    report = fold(traced.graph_module).report
    assert report.done == ()
    assert sorted(line.split(":")[0] for line in report.skipped) == ["bn1", "bn2"]
    assert "read by others" in report.skipped[0]


def test_tap_between_convolution_and_norm_blocks_the_fold():
    traced = ifx.trace(seeded(Overwritten).eval(), images())
    both = fold(ifx.instrument(traced, ["conv", "bn"]))
    assert both.report.done == ()
    features, _ = both.value(images())
    assert torch.equal(features["conv"], traced.module.conv(images()))


def test_folded_graph_has_parameters_of_its_own():
    module = seeded(PreActivation)
    folded = fold(ifx.trace(module, images()).graph_module).value
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.requires_grad for p in module.parameters())
    own = {id(p) for p in module.parameters()}
    assert not any(id(p) in own for p in folded.parameters())


def test_a_layer_whose_hook_makes_its_weight_is_left_alone():
    """torch.nn.utils.prune computes weight_orig * mask before every call, and would undo a fold."""
    module = seeded(Residual).double().eval()
    for layer in [part for part in module.modules() if isinstance(part, torch.nn.Conv2d)]:
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    x = images(2).double()
    traced = ifx.trace(module, x)
    expected = ifx.instrument(traced, ["layer1", "layer3"])(x)[0]
    features, output = fold(ifx.instrument(traced, ["layer1", "layer3"])).value(x)
    torch.testing.assert_close(output, module(x), rtol=1e-12, atol=1e-12)
    for tap, value in expected.items():
        torch.testing.assert_close(features[tap], value, rtol=1e-12, atol=1e-12)


def test_a_stage_of_a_pruned_teacher_has_the_plain_features():
    teacher, student = seeded(Residual, 16).eval(), seeded(Residual)
    for layer in [part for part in teacher.modules() if isinstance(part, torch.nn.Conv2d)]:
        torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    x = images(2)
    plan = ifx.align(teacher, student, example_inputs=x)
    stages = ifx.compile_stages(teacher, student, plan, example_inputs=x, main=None)
    stage = next(one for one in stages if one.pairs[0].teacher == "layer1")
    with torch.no_grad():
        got = stage.teacher(x)[0]["layer1"]
        expected = teacher.layer1(teacher.stem(x))[:, list(stage.pairs[0].kept)]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooked", ["0", "1", "2", "3"])
def test_a_hook_keeps_its_layer_and_is_named(hooked: str) -> None:
    """Of a convolution, a batch norm, a dropout and a ReLU: whichever is left out, its hook would be lost without a word."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.Dropout(), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1)
    ).eval()
    torch.nn.init.uniform_(module[1].running_mean)

    def negates(part, args, out):
        return -2 * out

    module.get_submodule(hooked).register_forward_hook(negates)
    traced = ifx.trace(module, images())
    folded = fold(ifx.instrument(traced, ["4"]))
    fused = fuse_convolutions(folded.value, traced.facts)
    for graph in (folded.value, fused.value):
        torch.testing.assert_close(graph(images())[1], module(images()))
    told = (*folded.report.skipped, *fused.report.skipped)
    assert any("negates" in line for line in told)


class Dropout(torch.nn.Module):
    """A user's own, of the name of torch's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


class ReLU(torch.nn.ReLU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) - 1


def test_a_class_of_the_name_of_torchs_is_not_taken_for_it() -> None:
    layers = (torch.nn.Conv2d(3, 4, 3), ReLU(), torch.nn.Conv2d(4, 4, 1), Dropout(), torch.nn.Conv2d(4, 2, 1))
    module, x = torch.nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    traced = ifx.trace(module, x, leaves=["1", "3"])
    fused = fuse_convolutions(fold(ifx.instrument(traced, [])).value, traced.facts)
    torch.testing.assert_close(fused.value(x)[1], module(x))
    assert ifx.shrink(traced, ratio=0.5).report.axes == {}


@pytest.mark.parametrize("replaced", ["0", "1", "2", "3"])
def test_a_layer_whose_forward_was_replaced_is_left_alone(replaced: str) -> None:
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout())
    module, x = torch.nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    module[1].running_mean.normal_()
    layer = module[int(replaced)]
    own = layer.forward
    layer.forward = lambda given: own(given) * 1.5 + 0.3  # as Accelerate does
    traced = ifx.trace(module, x)
    fused = fuse_convolutions(fold(ifx.instrument(traced, [])).value, traced.facts)
    torch.testing.assert_close(fused.value(x)[1], module(x))
