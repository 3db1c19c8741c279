"""The nodes that bring two features to one shape: each rule against the tensor operation it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import indistill_fx as ifx
from indistill_fx.passes.extract.adapt import Layout, adapt
from indistill_fx.passes.extract.instrument import cut
from tests.nets import Residual, TinyTransformer, images, seeded

MAP = Layout(8, True, (16, 16), "map")


def adapted(make, tap: str, own: Layout, other: Layout, **options: bool):
    module = seeded(make).eval()
    graph = cut(ifx.trace(module, images()), [tap]).value
    result = adapt(graph, tap, own, other, **options)
    done = tuple(entry.removeprefix(f"{tap}: ") for entry in result.report.done)
    return graph(images())[0][tap], result.value(images())[0][tap], done


def test_equal_layouts_need_nothing():
    plain, value, told = adapted(Residual, "layer1", MAP, MAP)
    assert told == ()
    assert torch.equal(plain, value)


def test_larger_map_is_pooled_per_axis():
    plain, value, told = adapted(Residual, "layer1", MAP, Layout(8, True, (4, 32), "map"))
    assert told == ("pooled 16x16 to 4x16",)
    assert torch.equal(value, F.adaptive_avg_pool2d(plain, (4, 16)))


def test_smaller_map_stays():
    _, _, told = adapted(Residual, "layer1", MAP, Layout(8, True, (32, 32), "map"))
    assert told == ()


def test_wider_student_is_compared_on_the_teachers_channels():
    plain, value, told = adapted(Residual, "layer1", MAP, Layout(5, True, (16, 16), "map"), may_slice=True)
    assert told == ("first 5 of 8 channels",)
    assert torch.equal(value, plain[:, :5])


def test_tokens_become_the_map_they_came_from():
    tokens = Layout(16, False, (17,), "tokens")
    plain, value, told = adapted(TinyTransformer, "blocks.0", tokens, Layout(16, True, (2, 2), "map"))
    assert told == ("channels first", "tokens to a 4x4 map", "pooled 4x4 to 2x2")
    expected = plain[:, 1:].transpose(1, 2).reshape(2, 16, 4, 4)
    assert torch.equal(value, F.adaptive_avg_pool2d(expected, 2))


def test_map_against_tokens_is_pooled_to_their_grid():
    plain, value, _ = adapted(Residual, "layer1", MAP, Layout(8, False, (17,), "tokens"))
    assert torch.equal(value, F.adaptive_avg_pool2d(plain, 4))


def test_wider_student_tokens_stay_tokens():
    tokens = Layout(16, False, (17,), "tokens")
    plain, value, _ = adapted(TinyTransformer, "blocks.0", tokens, Layout(10, False, (17,), "tokens"), may_slice=True)
    assert torch.equal(value, plain[..., :10])


def test_forms_without_a_common_shape_are_refused():
    with pytest.raises(ifx.MatchError, match="have no common form"):
        adapted(Residual, "layer1", MAP, Layout(8, True, (), "vector"))
