"""Pooling by maxima: equal values always, equal gradients always, and windows of other kinds left alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.max_pool import max_pool_by_maxima, pool_by_maxima
from tests.nets import Cnn32, images, seeded


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))
def test_values_equal_the_stock_pooling(rows, columns, height, width):
    x = images(2, 13)[:, :, : rows + height, : columns + width]
    assert torch.equal(max_pool_by_maxima(x, (rows, columns)), F.max_pool2d(x, (rows, columns)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9), st.integers(0, 9))
def test_gradients_equal_the_stock_pooling_also_between_equal_entries(rows, columns, height, width):
    x = images(2, 13)[:, :, : rows + height, : columns + width].round()  # rounded: many equal entries
    grads = []
    for pool in (max_pool_by_maxima, F.max_pool2d):
        leaf = x.clone().requires_grad_()
        value = pool(leaf, (rows, columns))
        (value * torch.arange(value.numel()).view(value.shape)).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


class Pools(nn.Module):
    def __init__(self, pool: nn.Module):
        super().__init__()
        self.conv, self.relu, self.pool, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.pool(self.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.MaxPool2d(2), 1),
        (nn.MaxPool2d((2, 3)), 1),
        (nn.MaxPool2d(3, 2), 0),
        (nn.MaxPool2d(2, padding=1), 0),
        (nn.MaxPool2d(2, dilation=2), 0),
        (nn.MaxPool2d(2, ceil_mode=True), 0),
    ],
)
def test_where_the_rules_apply(pool, expected):
    module = Pools(pool).eval()
    graph = cut(ifx.trace(module, images()), ["pool"]).value
    result = pool_by_maxima(graph)
    assert (len(result.report.done), len(result.report.skipped)) == (expected, 1 - expected)
    assert torch.equal(result.value(images())[0]["pool"], graph(images())[0]["pool"])


def test_functional_form():
    class Functional(Cnn32):
        def forward(self, x):
            x = F.max_pool2d(F.relu(self.conv1(x)), kernel_size=2)
            return self.fc2(F.max_pool2d(x, (2, 2), 2).mean((2, 3)).repeat(1, 8))

    graph = cut(ifx.trace(seeded(Functional).eval(), images(2, 32)), [":max_pool", ":max_pool_1"]).value
    before = graph(images(2, 32))[0]
    result = pool_by_maxima(graph)
    assert len(result.report.done) == 2
    after = result.value(images(2, 32))[0]
    assert all(torch.equal(before[tap], after[tap]) for tap in before)
