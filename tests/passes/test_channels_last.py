"""The stem channels last: equal values and gradients, the usual layout behind it, and what may not be moved left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.channels_last import channels_last, max_pool_channels_last, stem_channels_last
from tests.nets import images, seeded


class Stem(nn.Module):
    def __init__(self, *middle: nn.Module, pool: nn.Module | None = None):
        super().__init__()
        self.conv, self.middle = nn.Conv2d(3, 8, 3), nn.Sequential(*middle)
        self.pool, self.last, self.head = pool or nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.last(self.pool(self.middle(self.conv(x)))).mean((2, 3)))


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.booleans(), st.booleans(), st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_pooling_and_its_gradient_equal_the_stock_ones_also_between_equal_entries(kernel, stride, pad, ceil, dilation):
    options = (kernel, stride, tuple(n // 2 for n in kernel) if pad else (0, 0), dilation, ceil)
    x = images(2, 13).round()  # rounded: many equal entries
    found = []
    for pool in (max_pool_channels_last, F.max_pool2d):
        leaf = x.clone().requires_grad_()
        value = pool(leaf, *options)
        assert value.is_contiguous()
        (value * torch.arange(value.numel()).view(value.shape)).sum().backward()
        found.append((value, leaf.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("side", "size"), [(181, 2), (182, 4)])
def test_places_are_kept_in_the_smallest_type(side, size):
    x = torch.rand(1, 1, side, side, requires_grad=True)
    value = max_pool_channels_last(x, (3, 3), (2, 2), (1, 1), (1, 1), False)
    kept = value.grad_fn.saved_tensors[1]
    assert kept.element_size() == size
    value.sum().backward()
    (stock,) = torch.autograd.grad(F.max_pool2d(x, 3, 2, 1).sum(), x)
    assert torch.equal(x.grad, stock)


def half(module: nn.Module, tap: str = "last"):
    return cut(ifx.trace(module.train(), images(4), role="student"), [tap]).value


def order(graph_module) -> list[str]:
    return [str(getattr(node.target, "__name__", node.target)) for node in graph_module.graph.nodes]


def test_values_and_gradients_are_those_of_the_usual_layout():
    plain = seeded(lambda: Stem(nn.BatchNorm2d(8), nn.ReLU(inplace=True)).double())
    moved = copy.deepcopy(plain)
    x = images(4).double()
    found = []
    for module, change in ((plain, False), (moved, True)):
        graph = cut(ifx.trace(module.train(), x, role="student"), ["last"]).value
        if change:
            result = stem_channels_last(graph)
            assert result.report.done == ("pool: channels last from conv on",)
            graph = result.value
        value = graph(x)[0]["last"]
        assert value.is_contiguous()
        (value * torch.linspace(-1, 1, value.numel(), dtype=value.dtype).view(value.shape)).sum().backward()
        found.append([value, *(p.grad for p in module.parameters() if p.grad is not None), *module.buffers()])
    assert len(found[0]) == 10
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_layout_changes_at_the_image_and_behind_the_pooling():
    graph = stem_channels_last(half(Stem(nn.BatchNorm2d(8), nn.ReLU()))).value
    assert order(graph)[:7] == ["x", "channels_last", "conv", "middle.0", "middle.1", "max_pool_channels_last", "last"]
    seen = {}
    for name in ("conv", "middle.1", "last"):
        graph.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: i[0]}))
    graph(images(4))
    assert [not seen[name].is_contiguous() for name in ("conv", "middle.1", "last")] == [True, True, False]


@pytest.mark.parametrize("middle", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.Softmax(1), nn.LayerNorm([14, 14])])
def test_the_chain_begins_behind_what_draws_at_random_or_knows_its_layout(middle):
    graph = stem_channels_last(half(Stem(middle, nn.ReLU()))).value
    assert order(graph)[1:6] == ["conv", "middle.0", "channels_last", "middle.1", "max_pool_channels_last"]


def test_a_value_that_others_read_keeps_its_layout():
    graph = cut(ifx.trace(Stem(nn.ReLU()).train(), images(4), role="student"), ["conv", "last"]).value
    graph = stem_channels_last(graph).value
    assert order(graph)[1:5] == ["conv", "channels_last", "middle.0", "max_pool_channels_last"]


class Unpooling(nn.Module):
    def forward(self, x):
        values, places = nn.functional.max_pool2d(x, 3, 2, return_indices=True)
        return values + places


@pytest.mark.parametrize("pool", [Unpooling(), nn.AvgPool2d(3, 2), nn.AdaptiveMaxPool2d(9), nn.Identity()])
def test_other_poolings_are_left_alone(pool):
    graph = half(Stem(nn.ReLU(), pool=pool))
    graph = stem_channels_last(graph).value
    assert "channels_last" not in order(graph)


def test_nothing_moves_under_torch_compile_or_without_four_axes(monkeypatch):
    x = images(4)
    assert not channels_last(x).is_contiguous()
    assert channels_last(x[0]) is not None and channels_last(x[0]).is_contiguous()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert channels_last(x) is x


def test_the_student_of_a_stage_runs_it():
    pair = (
        seeded(lambda: torchvision.models.resnet34(num_classes=5)),
        seeded(lambda: torchvision.models.resnet18(num_classes=5)),
    )
    x = torch.randn(2, 3, 64, 64)
    stages = ifx.compile_stages(*pair, ifx.align(*pair, example_inputs=x), example_inputs=x)
    for stage in stages:
        assert order(stage.student)[1:6] == ["channels_last", "conv1", "bn1", "relu_1", "max_pool_channels_last"]


class Functional(nn.Module):
    """Poolings in every way in which people call them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = nn.functional.max_pool2d(nn.functional.relu(self.conv(x)), kernel_size=2)
        x = nn.functional.max_pool2d(x, (2, 1), 2, ceil_mode=True)
        return nn.functional.max_pool2d(x, (1, 2), padding=(0, 1)).mean((2, 3))


def test_functional_poolings():
    module, x = seeded(Functional).double().train(), images(4, 17).double()
    taps = [":max_pool", ":max_pool_1", ":max_pool_2"]
    graph = cut(ifx.trace(module, x, role="student"), taps).value
    result = stem_channels_last(graph)
    assert len(result.report.done) == 3
    before, after = graph(x)[0], result.value(x)[0]
    for tap in taps:
        torch.testing.assert_close(after[tap], before[tap], rtol=1e-12, atol=1e-12)
