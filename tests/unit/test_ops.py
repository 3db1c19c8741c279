"""One operation has one name, whatever form the model's author or a tracer wrote it in."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from indistill_fx.graph.ops import BINARY, UNARY, is_inplace, op_name, with_item

aten = torch.ops.aten


def call(target, **kwargs) -> fx.Node:
    """A node that calls the target: a module, a function, or a method's name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    root = nn.Module()
    if isinstance(target, nn.Module):
        root.part = target
        node = graph.call_module("part", (x,))
    elif isinstance(target, str):
        node = graph.call_method(target, (x,))
    else:
        node = graph.call_function(target, (x, x, x), kwargs)  # as many as any operator prints
    graph.output(node)
    fx.GraphModule(root, graph)
    return node


FORMS = {
    "relu": [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        torch.relu_,
        "relu",
        "relu_",
        aten.relu.default,
        aten.relu_.default,
    ],
    "conv": [
        nn.Conv1d(1, 1, 1),
        nn.Conv2d(1, 1, 1),
        nn.Conv3d(1, 1, 1),
        F.conv2d,
        torch.conv1d,
        aten.conv3d.default,
        aten.convolution.default,
    ],
    "conv_transpose": [nn.ConvTranspose2d(1, 1, 1), F.conv_transpose1d, aten.conv_transpose3d.input],
    "linear": [nn.Linear(1, 1), nn.MultiheadAttention(2, 1).out_proj, F.linear, aten.linear.default],
    "batch_norm": [
        nn.BatchNorm1d(1),
        nn.BatchNorm2d(1),
        nn.BatchNorm3d(1),
        nn.SyncBatchNorm(1),
        F.batch_norm,
        aten.batch_norm.default,
    ],
    "layer_norm": [nn.LayerNorm(1), F.layer_norm, aten.layer_norm.default],
    "group_norm": [nn.GroupNorm(1, 1), F.group_norm, aten.group_norm.default],
    "add": [operator.add, operator.iadd, torch.add, "add", "add_", aten.add.Tensor, aten.add_.Tensor],
    "mul": [operator.mul, operator.imul, torch.multiply, "mul_", aten.mul.Scalar],
    "div": [operator.truediv, torch.true_divide, "divide", aten.div.Tensor],
    "cat": [torch.cat, torch.concat, torch.concatenate, aten.cat.default],
    "max_pool": [nn.MaxPool2d(2), torch.max_pool2d, aten.max_pool2d.default],
    "adaptive_avg_pool": [nn.AdaptiveAvgPool2d(1), F.adaptive_avg_pool2d, aten.adaptive_avg_pool2d.default],
    "interpolate": [F.interpolate, aten.upsample_bilinear2d.vec, aten.upsample_nearest2d.vec],
    "view": ["view", "view_as", aten.view.default, aten._unsafe_view.default],
    "permute": ["permute", torch.permute, aten.permute.default],
    "getitem": [operator.getitem],
    "gelu": [nn.GELU(), F.gelu, aten.gelu.default],
    "silu": [nn.SiLU(), F.silu, aten.silu_.default],
    "dropout": [nn.Dropout(), nn.Dropout2d(), F.dropout, F.dropout2d, aten.dropout.default],
    "softmax": [nn.Softmax(1), F.softmax, torch.softmax, "softmax", aten.softmax.int],
    "rms_norm": [nn.RMSNorm(1), F.rms_norm, aten.rms_norm.default],
    "scaled_dot_product_attention": [F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default],
}


@pytest.mark.parametrize(("name", "target"), [(name, target) for name, targets in FORMS.items() for target in targets])
def test_one_name_for_all_forms(name, target):
    assert op_name(call(target)) == name


def test_a_module_without_a_rule_is_called_by_its_class():
    class MyGreatBlock(nn.Module):
        pass

    assert op_name(call(MyGreatBlock())) == "my_great_block"
    assert op_name(call(nn.Identity()).args[0]) == "placeholder"


@pytest.mark.parametrize(
    "target",
    [nn.ReLU(inplace=True), "add_", torch.relu_, operator.iadd, operator.setitem, aten.add_.Tensor, aten.copy_.default],
)
def test_writes_in_place(target):
    assert is_inplace(call(target))


@pytest.mark.parametrize(
    "target", [nn.ReLU(), "add", "__add__", torch.relu, operator.add, aten.add.Tensor, F.relu, getattr]
)
def test_does_not_write_in_place(target):
    assert not is_inplace(call(target))


def test_the_keyword_inplace_counts():
    assert is_inplace(call(F.relu, inplace=True))
    assert not is_inplace(call(F.relu, inplace=False))


def test_with_item_writes_a_copy():
    x = torch.zeros(2, 3)
    y = with_item(x, (slice(None), 1), 5.0)
    assert y.tolist() == [[0, 5, 0], [0, 5, 0]]
    assert not x.any()


def test_the_families_hold_canonical_names():
    assert {op_name(call(operator.add)), op_name(call("mul_"))} <= BINARY
    assert {op_name(call(nn.Hardswish())), op_name(call(F.hardtanh)), op_name(call(nn.ReLU6()))} <= UNARY
    assert not UNARY & BINARY
