"""Functions and operators of the user's that are called like torch's, and that tracing keeps whole, are not taken for torch's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.passes.test_more_networks import Maps, Way, halved, narrowed, traced


@fx.wrap
def relu(x: Tensor) -> Tensor:
    return x.flip(1).relu()


@fx.wrap
def add(x: Tensor, y: Tensor) -> Tensor:
    return (x + y.flip(1)).mean(-1, keepdim=True)


@fx.wrap
def cat(parts: list[Tensor], dim: int) -> Tensor:
    return torch.cat(parts[::-1], dim)


@fx.wrap
def size(x: Tensor, dim: int) -> int:
    return x.shape[dim] // 2


@fx.wrap
def silu_(x: Tensor, inplace: bool = False) -> Tensor:
    return x.flip(1).sigmoid()


def _flip_and_scale(x: Tensor, scale: float) -> Tensor:
    return x.flip(1) * scale


gelu = functools.partial(_flip_and_scale, scale=2.0)
gelu.__name__ = "gelu"  # type: ignore[attr-defined]
fx.wrap("gelu")


class _Called:
    __name__ = "sigmoid"

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(1).sigmoid()


sigmoid = _Called()
fx.wrap("sigmoid")


@torch.library.custom_op("their_library::relu", mutates_args=())
def operator(x: Tensor) -> Tensor:
    return x.flip(1).relu()


@operator.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _differentiate(context: object, grad: Tensor) -> Tensor:
    return grad.flip(1)


operator.register_autograd(_differentiate)


def _relu(x: Tensor) -> Tensor:
    return relu(x)


def _add(x: Tensor) -> Tensor:
    return add(x, 2 * x)


def _cat(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    return cat([x[:, :half], x[:, half:]], 1)


def _size(x: Tensor) -> Tensor:
    return x[:, : size(x, 1)].repeat(1, 2, 1, 1)


def _inplace(x: Tensor) -> Tensor:
    return silu_(x, inplace=True)


def _partial(x: Tensor) -> Tensor:
    return gelu(x)


def _object(x: Tensor) -> Tensor:
    return sigmoid(x)


def _operator(x: Tensor) -> Tensor:
    return torch.ops.their_library.relu(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("way", "name"),
    [
        (_relu, "relu()"),
        (_add, "add()"),
        (_cat, "cat()"),
        (_size, "size()"),
        (_inplace, "silu_()"),
        (_partial, "gelu()"),
        (_object, "sigmoid()"),
        (_operator, "their_library::relu"),
    ],
)
def test_what_is_called_like_torchs_is_not_taken_for_it(way: Callable[[Tensor], Tensor], name: str) -> None:
    model, x = traced(lambda: Maps(Way(way)))
    assert name in [op_name(node) for node in model.graph_module.graph.nodes]
    with torch.no_grad():
        assert torch.equal(model.graph_module(x), model.module(x))
    narrowed(model, x)
    halved(model, x)


def test_shapes_are_those_of_the_users_function() -> None:
    model, _ = traced(lambda: Maps(Way(_add)))
    assert model.facts["add"].shape == (2, 16, 16, 1)
    assert model.facts["b"].macs == 16 * 16 * 9 * 16  # a column of 16 places


def test_functions_stay_whole_when_a_graph_is_traced_again_and_torch_keeps_no_list_of_them() -> None:
    known = dict(torch.fx._symbolic_trace._wrapped_fns_to_patch)
    model, x = traced(lambda: Maps(Way(_relu)))
    narrowed(model, x)
    small = shrink(model, ratio=0.5).value.graph_module
    assert "relu()" in [op_name(node) for node in trace(small, x).graph_module.graph.nodes]
    assert known == torch.fx._symbolic_trace._wrapped_fns_to_patch
