"""Random networks: how a network is written does not change its pairs, only what it computes does."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from indistill_fx.errors import MatchError
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pairing.match import best_path, match
from indistill_fx.traced import TracedModel


@dataclass(frozen=True)
class Style:
    """How a network is written: nothing of this changes what it computes when it is evaluated."""

    prefix: str = "layer"
    backwards: bool = False
    functional: bool = False
    dropout: bool = False
    identity: bool = False
    nested: bool = False


STYLES = [
    Style(prefix="zz_part"),
    Style(backwards=True),
    Style(functional=True),
    Style(dropout=True),
    Style(identity=True),
    Style(nested=True),
    Style("q", True, True, True, True, True),
]
Stage = tuple[str, int, str]  # kind of block, number of blocks, what makes the maps smaller before it
STAGES = st.lists(
    st.tuples(
        st.sampled_from(["residual", "chain", "separable", "dense"]),
        st.integers(1, 3),
        st.sampled_from(["stride", "pool"]),
    ),
    min_size=2,
    max_size=4,
)


class Net(nn.Module):
    """A network of stages, in one of many styles; weights depend on the stages alone."""

    def __init__(self, stages: list[Stage], style: Style, width: int):
        super().__init__()
        self.style, self.steps, self.made = style, [], []
        torch.manual_seed(len(stages))
        channels = self._conv("stem", 3, width)
        for kind, count, smaller in stages:
            if smaller == "pool":
                self.steps.append(("pool", ()))
            else:
                channels = self._conv("conv", channels, channels, stride=2)
            for _ in range(count):
                channels = self._block(kind, channels)
        self.made.append(nn.Linear(channels, 4))
        names = [f"{style.prefix}{k}" for k in range(len(self.made))]
        for name, layer in sorted(zip(names, self.made, strict=True), reverse=style.backwards):
            self.add_module(name, nn.Sequential(layer) if style.nested else layer)
        self.dropout = nn.Dropout(0.4)
        self.made = []
        self.names = names

    def _conv(self, step: str, cin: int, cout: int, **options: Any) -> int:
        self.made += [
            nn.Conv2d(cin, cout, options.pop("kernel_size", 3), padding=options.pop("padding", 1), **options),
            nn.BatchNorm2d(cout),
        ]
        self.made[-1].running_mean.normal_(0, 0.3)
        self.steps.append((step, (len(self.made) - 2, len(self.made) - 1)))
        return cout

    def _block(self, kind: str, channels: int) -> int:
        if kind == "chain":
            return self._conv("conv", channels, channels)
        if kind == "separable":
            self._conv("conv", channels, channels, groups=channels)
            return self._conv("linear", channels, channels, kernel_size=1, padding=0)
        self._conv("branch", channels, channels)
        self.steps.append((kind, ()))
        return channels * 2 if kind == "dense" else channels

    def _apply(self, number: int, x: Tensor) -> Tensor:
        layer = getattr(self, self.names[number])
        if not self.style.functional:
            return layer(x)
        layer = layer[0] if self.style.nested else layer
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        if isinstance(layer, nn.BatchNorm2d):
            return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, False)
        return F.linear(x, layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for step, numbers in self.steps:
            if step == "pool":
                x = F.max_pool2d(x, 2)
            elif step == "branch":
                branch = self._apply(numbers[1], self._apply(numbers[0], x))
            elif step == "residual":
                x = torch.relu(x + branch) if self.style.functional else (branch + x).relu()
            elif step == "dense":
                x = torch.cat([x, F.relu(branch)], 1)
            else:
                x = self._apply(numbers[1], self._apply(numbers[0], x))
                x = x if step == "linear" else F.relu(x)
            if self.style.dropout and step != "branch":
                x = self.dropout(x) if self.style.nested else F.dropout(x, 0.1, self.training)
            if self.style.identity and step != "branch":
                x = nn.Identity()(x) if self.style.nested else x.contiguous()
        return self._apply(len(self.names) - 1, F.adaptive_avg_pool2d(x, 1).flatten(1))


X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def traced(stages: list[Stage], style: Style = Style(), width: int = 4) -> TracedModel:
    return trace(Net(stages, style, width).eval(), X)


def features(model: TracedModel, taps: list[str]) -> list[Tensor]:
    with torch.no_grad():
        _, found = run_keeping(model.graph_module, [model.taps[tap] for tap in taps], X)
    return [found[model.taps[tap]] for tap in taps]


def paired(teacher: TracedModel, student: TracedModel, **options: Any) -> list[list[Tensor]] | None:
    """The tensors of the pairs, teacher's and student's; None where there are none."""
    try:
        pairs = match(teacher, student, **options).value
    except MatchError:
        return None
    return [features(teacher, [pair.teacher for pair in pairs]), features(student, [pair.student for pair in pairs])]


def same(a: list[list[Tensor]] | None, b: list[list[Tensor]] | None) -> bool:
    if a is None or b is None:
        return a is b
    return [len(x) for x in a] == [len(x) for x in b] and all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-4, atol=1e-5)
        for xs, ys in zip(a, b, strict=True)
        for x, y in zip(xs, ys, strict=True)
    )


@settings(max_examples=12, deadline=None, derandomize=True)
@given(teacher=STAGES, student=STAGES, style=st.sampled_from(STYLES), every_block=st.booleans())
def test_the_style_does_not_change_the_pairs(
    teacher: list[Stage], student: list[Stage], style: Style, every_block: bool
) -> None:
    plain = paired(traced(teacher, width=6), traced(student), every_block=every_block)
    assert same(plain, paired(traced(teacher, style, width=6), traced(student), every_block=every_block))
    assert same(plain, paired(traced(teacher, width=6), traced(student, style), every_block=every_block))


@pytest.mark.parametrize(
    "style",
    STYLES,
    ids=lambda style: (
        style.prefix
        + "".join("-" + n for n in ("backwards", "functional", "dropout", "identity", "nested") if getattr(style, n))
    ),
)
def test_each_style_on_one_network(style: Style) -> None:
    stages = [("residual", 2, "stride"), ("dense", 2, "pool"), ("residual", 3, "stride")]
    plain = paired(traced(stages, width=6), traced(stages[:2]))
    assert plain is not None
    assert same(plain, paired(traced(stages, style, width=6), traced(stages[:2], style)))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(stages=STAGES)
def test_a_network_goes_with_itself_layer_by_layer(stages: list[Stage]) -> None:
    model = traced(stages)
    for options in ({}, {"every_block": True}, {"taps": "pre-activation"}):
        assert all(pair.teacher == pair.student and pair.score == 1 for pair in match(model, model, **options).value)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(teacher=STAGES, student=STAGES)
def test_pairs_never_cross(teacher: list[Stage], student: list[Stage]) -> None:
    sides = traced(teacher), traced(student)
    orders = [{node.name: k for k, node in enumerate(model.graph_module.graph.nodes)} for model in sides]
    for options in ({}, {"every_block": True}):
        pairs = match(*sides, **options).value
        places = [(orders[0][sides[0].taps[pair.teacher]], orders[1][sides[1].taps[pair.student]]) for pair in pairs]
        assert all(a < c and b < d for (a, b), (c, d) in pairwise(places))


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.integers(-3, 9), min_size=n, max_size=n), min_size=1, max_size=4)
    )
)
def test_the_best_path_is_the_best(gain: list[list[int]]) -> None:
    def paths() -> list[list[tuple[int, int]]]:
        rows, columns = range(len(gain)), range(len(gain[0]))
        return [
            list(zip(i, j, strict=True))
            for n in range(min(len(gain), len(gain[0])) + 1)
            for i in combinations(rows, n)
            for j in combinations(columns, n)
        ]

    found = best_path(gain)
    assert found in paths()
    assert sum(gain[i][j] for i, j in found) == max(sum(gain[i][j] for i, j in path) for path in paths())
