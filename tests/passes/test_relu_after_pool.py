"""A ReLU behind its pooling: values and gradients to the bit, and only where nobody else reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import indistill_fx as ifx
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.max_pool import relu_after_pool
from tests.nets import Cnn32, images, seeded


class Block(nn.Module):
    def __init__(self, middle: nn.Module, pool: nn.Module):
        super().__init__()
        self.conv, self.middle, self.pool, self.last = nn.Conv2d(3, 8, 3), middle, pool, nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.pool(self.middle(self.conv(x)))).mean((2, 3))


def kinds(graph_module) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.integers(0, 5))
def test_values_and_gradients_are_equal_to_the_bit(kernel, stride, pad, ceil, seed):
    module = Block(nn.ReLU(), nn.MaxPool2d(kernel, stride, kernel // 2 if pad else 0, ceil_mode=ceil))
    torch.manual_seed(seed)
    with torch.no_grad():
        module.conv.weight.copy_(torch.randint(-1, 2, module.conv.weight.shape))  # many equal entries
        module.conv.bias.zero_()
    found = []
    x = images(2, 13).round()
    for moved in (False, True):
        own = copy.deepcopy(module)
        graph = cut(ifx.trace(own, x, role="student"), ["last"]).value
        if moved:
            graph = relu_after_pool(graph).value
            assert kinds(graph) == ["conv", "pool", "middle", "last"]
        value = graph(x)[0]["last"]
        value.square().sum().backward()
        found.append((value, own.conv.weight.grad, own.conv.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1].any()


def test_the_relu_is_behind_the_pooling():
    graph = cut(ifx.trace(Block(nn.ReLU(), nn.MaxPool2d(2)), images(), role="student"), ["last"]).value
    result = relu_after_pool(graph)
    assert result.report.done == ("middle: moved behind pool",)
    assert kinds(result.value) == ["conv", "pool", "middle", "last"]
    assert kinds(graph) == ["conv", "middle", "pool", "last"]


@pytest.mark.parametrize(
    ("middle", "pool", "taps"),
    [
        (nn.ReLU(), nn.MaxPool2d(2), ["middle", "last"]),
        (nn.ReLU(), nn.AvgPool2d(2), ["last"]),
        (nn.GELU(), nn.MaxPool2d(2), ["last"]),  # not monotonous
    ],
)
def test_others_stay_where_they_are(middle, pool, taps):
    graph = cut(ifx.trace(Block(middle, pool), images(), role="student"), taps).value
    result = relu_after_pool(graph)
    assert result.report.done == ()
    assert kinds(result.value) == ["conv", "middle", "pool", "last"]


def test_the_student_of_a_stage_runs_it():
    teacher, student = seeded(lambda: Cnn32((16, 32, 64), 128)), seeded(Cnn32)
    stages = ifx.compile_stages(
        teacher, student, ifx.align(teacher, student, example_inputs=images(2, 32)), example_inputs=images(2, 32)
    )
    nodes = [node.name for node in stages[0].student.graph.nodes]
    assert nodes.index("relu") > nodes.index("max_pool_channels_last")
