"""Sizes of channels are numbers, lists of parts are lists: code may write 8 or `x.shape[1] // 2`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.errors import PassError
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning import slice_network
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.traced import TracedModel
from tests.numerics.masked_reference import run_masked

Way = Callable[[Tensor], Tensor]
WIDTH = 16

SIZES: dict[str, Way] = {
    "narrow": lambda x: torch.cat([x.narrow(1, x.size(1) // 2, x.size(1) // 2), x.narrow(1, 0, x.size(1) // 2)], 1),
    "index_select": lambda x: torch.cat(
        [x.index_select(1, torch.arange(x.size(1) // 2, device=x.device)), x[:, 8:]], 1
    ),
    "group norm": lambda x: F.group_norm(x, x.size(1) // 4),
    "layer norm of a map": lambda x: F.layer_norm(x, x.shape[1:]),
    "layer norm of tokens": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2),
    "mean over the last two": lambda x: x * x.mean((x.dim() - 2, x.dim() - 1), keepdim=True).sigmoid(),
    "sum over channels": lambda x: x * x.sum(x.dim() - 3, keepdim=True).sigmoid(),
    "axis of a concatenation": lambda x: torch.cat([x[:, :8], x[:, 8:]], x.dim() - 3),
    "split": lambda x: torch.cat(torch.split(x, x.size(1) // 4, 1)[::-1], 1),
    "split in two": lambda x: torch.cat(torch.split(x, [x.size(1) // 4, x.size(1) - x.size(1) // 4], 1)[::-1], 1),
    "chunk": lambda x: torch.cat(x.chunk(x.size(1) // 4, 1)[::-1], 1),
    "channel shuffle": lambda x: F.channel_shuffle(x, x.size(1) // 4),
    "depthwise": lambda x: F.conv2d(x, torch.full((16, 1, 3, 3), 0.1, dtype=x.dtype), padding=1, groups=x.size(1)),
    "slices": lambda x: torch.cat([x[:, x.size(1) // 2 :], x[:, : x.size(1) // 2]], 1),
    "a slice of the height": lambda x: x.narrow(2, x.size(2) // 2, x.size(2) // 2),
    "groups of the batch": lambda x: F.conv2d(
        x.reshape(1, -1, 8, 8),
        torch.ones(1, 1, 1, 1, dtype=x.dtype).expand(x.size(0) * 16, 1, 1, 1),
        groups=x.size(0) * x.size(1),
    ).reshape(x.shape),
}
LISTS: dict[str, Way] = {
    "halves joined": lambda x: torch.cat(x.chunk(2, 1), 1),
    "halves exchanged": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "quarters reversed": lambda x: torch.cat(torch.split(x, 4, dim=1)[::-1], 1),
    "uneven parts exchanged": lambda x: torch.cat(torch.split(x, [4, 12], dim=1)[::-1], 1),
    "maximum of halves": lambda x: torch.stack(x.chunk(2, 1)).amax(0).repeat(1, 2, 1, 1),
    "all but the first": lambda x: torch.cat((x[:, :4], torch.cat(x.chunk(4, 1)[1:], 1)), 1),
    "along the batch": lambda x: (
        torch.cat(x.chunk(2, 1), 0).view(2, x.size(0), 8, 8, 8).transpose(0, 1).reshape(x.size(0), 16, 8, 8)
    ),
    "taken apart": lambda x: torch.stack(x.unbind(1)[::-1], 1),
    "lists added": lambda x: torch.cat(x.chunk(2, 1)[1:] + x.chunk(2, 1)[:1], 1),
    "a list of the height": lambda x: torch.cat(x.split(1, 2)[::-1], 2),
    "tensor_split": lambda x: torch.cat(torch.tensor_split(x, 4, dim=1)[::-1], 1),
}


class Net(nn.Module):
    def __init__(self, way: Way):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.fc, self.way = nn.Linear(WIDTH, 5), way

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.way(self.a(x)))).mean((2, 3)))  # type: ignore[no-any-return]


def traced(way: Way) -> TracedModel:
    torch.manual_seed(0)
    return trace(Net(way).double().eval(), torch.randn(2, 3, 8, 8).double())


def assert_narrows_and_shrinks(model: TracedModel) -> None:
    (x,) = model.example_inputs
    taps = [
        names[0]
        for node, names in model.aliases.items()
        if model.facts[node].channel_axis is not None and model.facts[node].channels > 1 and names[0] != ":x"
    ]
    taps = [tap for tap in taps if model.facts_of(tap).batch_axis is not None]
    kept = {tap: range(1, model.facts_of(tap).channels, 3) for tap in taps}
    slim = narrow(model, kept=kept).value
    with torch.no_grad():
        _, whole = run_keeping(model.graph_module, [model.node(tap).name for tap in taps], x)
        _, some = run_keeping(slim.graph_module, [slim.node(tap).name for tap in taps], x)
        for tap in taps:
            expected = whole[model.node(tap).name].index_select(
                model.facts_of(tap).channel_axis or 0, torch.tensor(list(kept[tap]))
            )
            torch.testing.assert_close(some[slim.node(tap).name], expected, rtol=1e-9, atol=1e-9)
        small = shrink(model, ratio=0.5)
        torch.testing.assert_close(
            small.value.graph_module(x), run_masked(model, small.report, x), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize("way", SIZES.values(), ids=SIZES)
def test_widths_read_from_the_tensor(way: Way) -> None:
    assert_narrows_and_shrinks(traced(way))


@pytest.mark.parametrize("way", LISTS.values(), ids=LISTS)
def test_lists_of_parts(way: Way) -> None:
    assert_narrows_and_shrinks(traced(way))


def test_sizes_of_channels_become_numbers_and_those_of_the_picture_and_the_batch_stay() -> None:
    def way(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.reshape(b, c // 2, 2, h, w).reshape(b, c, h * w).reshape(b, c, h, w)

    model = traced(way)
    code = model.graph_module.code
    assert "(getitem, 8, 2, getitem_2, getitem_3)" in code
    with torch.no_grad():
        for shape in ((5, 3, 8, 8), (2, 3, 12, 10)):
            x = torch.randn(shape).double()
            torch.testing.assert_close(model.graph_module(x), model.module(x))


def test_what_follows_from_static_sizes_is_covered_as_if_it_were_written_out() -> None:
    literal = traced(lambda x: torch.cat([x.narrow(1, 8, 8), x.narrow(1, 0, 8)], 1))
    computed = traced(SIZES["narrow"])
    reports = [shrink(model, ratio=0.5).report for model in (literal, computed)]
    assert reports[0].widths == reports[1].widths
    assert reports[1].widths["a"] == (16, 8)


EXPRESSIONS: dict[str, Callable[[Tensor, int], int]] = {
    "literal": lambda x, n: n,
    "shape": lambda x, n: x.shape[1] - (WIDTH - n),
    "size": lambda x, n: x.size(1) * n // WIDTH,
    "len": lambda x, n: len(x.shape) + n - 4,
    "last": lambda x, n: x.shape[-3] - WIDTH + n,
    "of the map": lambda x, n: min(x.size(1), n + 0 * x.shape[1]),
}
USES: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "slices": lambda x, a, b: torch.cat([x[:, b:], x[:, :b]], 1),
    "narrow": lambda x, a, b: torch.cat([x.narrow(1, a, WIDTH - a), x.narrow(1, 0, a)], 1),
    "split": lambda x, a, b: torch.cat(x.split([b, WIDTH - b], 1)[::-1], 1),
    "chunk": lambda x, a, b: torch.cat(x.chunk(a, 1)[::-1], 1),
    "groups": lambda x, a, b: F.group_norm(x, a),
    "shuffle": lambda x, a, b: F.channel_shuffle(x, a),
    "view": lambda x, a, b: x.view(x.size(0), a, -1, 8, 8).transpose(1, 2).reshape(x.size(0), WIDTH, 8, 8),
    "pad": lambda x, a, b: F.pad(x, (0, 0, 0, 0, 0, b))[:, b:],
    "gate": lambda x, a, b: x * x[:, b - 1 : b].sigmoid(),
    "roll": lambda x, a, b: x.roll(b, 1),
}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(USES)),
            st.sampled_from(sorted(EXPRESSIONS)),
            st.sampled_from((2, 4, 8)),
            st.integers(1, WIDTH - 1),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_arguments_as_literals_and_as_expressions(steps: list[tuple[str, str, int, int]]) -> None:
    def way(x: Tensor) -> Tensor:
        for use, expression, a, b in steps:
            tell = EXPRESSIONS[expression]
            x = USES[use](x, tell(x, a), tell(x, b))
        return x

    assert_narrows_and_shrinks(traced(way))


def test_a_smaller_network_that_computes_something_else_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = traced(LISTS["uneven parts exchanged"])
    monkeypatch.setitem(slice_network.FIXES, "split", lambda *_: None)  # as if nobody had thought of it
    with pytest.raises(PassError, match="The smaller network"):
        shrink(model, ratio=0.5)


class ByHeight(nn.Module):
    """As many groups as the picture has rows."""

    def __init__(self, decide: bool):
        super().__init__()
        self.a, self.b, self.decide = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1), decide

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.decide and x.shape[1] > 100:
            return x
        return self.b(F.group_norm(x, x.shape[2] // 2))


@pytest.mark.parametrize("decide", [False, True])
def test_a_size_that_the_input_can_change_is_told_with_its_line(decide: bool) -> None:
    model = trace(ByHeight(decide), torch.randn(2, 3, 8, 8))
    assert model.report.method == ("shapes" if decide else "symbolic")
    report = shrink(model, ratio=0.5).report
    (reason,) = [frozen.reason for frozen in report.frozen if "sizes that the input can change" in frozen.reason]
    line = next(k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "x.shape[2] // 2" in text)
    assert f"test_static_values.py:{line}: " in reason and "x.shape[2]" in reason


class ByWidth(nn.Module):
    """Takes as many channels as the picture is wide."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.cat([x, x.narrow(1, 0, x.shape[3] // 2)], 1)[:, :8])


def test_a_slice_by_a_size_that_the_input_can_change_is_told_with_its_line() -> None:
    model = trace(ByWidth(), torch.randn(2, 3, 8, 8))
    line = next(k for k, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "x.shape[3] // 2" in text)
    told = f"by a size that the input can change (test_static_values.py:{line}: "
    assert any(told in frozen.reason for frozen in shrink(model, ratio=0.5).report.frozen)
    (tap,) = narrow(model, kept={":narrow": [0, 2]}).report.taps
    assert told in tap.stopped[0].reason


def test_numbers_that_the_graph_makes_follow_the_size() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x).relu().flatten(1)
            return z * torch.arange(z.shape[1])

    net = Places().eval()
    model = trace(net, torch.randn(2, 3, 8, 8))
    x = torch.randn(2, 3, 16, 12)
    torch.testing.assert_close(model.graph_module(x), net(x))
