"""Random graphs, random channels: a narrowed tap is the whole one at the kept channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked

Values = list[Tensor]


class Random(nn.Module):
    """A graph written as a list of steps; each makes a map of some width from earlier ones."""

    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.widths = steps, [8]
        self.stem, self.parts = nn.Conv2d(3, 8, 1), nn.ModuleList()
        for kind, a, b in steps:
            part, width = _part(kind, *(self.widths[k % len(self.widths)] for k in (a, b)))
            self.parts.append(part)
            self.widths.append(width)
        self.head = nn.Conv2d(self.widths[-1], 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.stem(x)]
        for (kind, a, b), part in zip(self.steps, self.parts, strict=True):
            values.append(part(OPS[kind](values[a % len(values)], values[b % len(values)])))
        return self.head(values[-1]).mean((2, 3))  # type: ignore[no-any-return]


def _shuffle(x: Tensor) -> Tensor:
    return (
        x.view(x.size(0), 2, x.size(1) // 2, x.size(2), x.size(3))
        .transpose(1, 2)
        .reshape(x.size(0), x.size(1), x.size(2), x.size(3))
    )


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv": lambda x, y: x,
    "depthwise": lambda x, y: x,
    "grouped": lambda x, y: x,
    "norm": lambda x, y: x,
    "relu": lambda x, y: F.relu(x),
    "add": lambda x, y: x + F.relu(x),
    "cat": lambda x, y: torch.cat([x, y], 1),
    "half": lambda x, y: x.chunk(2, 1)[1],
    "every other": lambda x, y: x[:, ::2],
    "shuffle": lambda x, y: _shuffle(x),
    "gate": lambda x, y: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "last": lambda x, y: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
}


def _part(kind: str, a: int, b: int) -> tuple[nn.Module, int]:
    if kind in ("conv", "depthwise", "grouped"):
        groups, width = {"conv": (1, 10), "depthwise": (a, a), "grouped": (2, 12)}[kind]
        return nn.Conv2d(a, width, 1, groups=groups), width
    if kind == "norm":
        norm = nn.BatchNorm2d(a)
        for value in (norm.running_mean, norm.weight, norm.bias):
            nn.init.normal_(value)
        return norm, a
    if kind in ("half", "every other"):
        return nn.Identity(), a // 2
    return nn.Identity(), a + b if kind == "cat" else a


def _fits(steps: list[tuple[str, int, int]]) -> bool:
    widths = [8]
    for kind, a, b in steps:
        own, other = (widths[k % len(widths)] for k in (a, b))
        if kind in ("half", "every other", "shuffle", "grouped") and own % 2:
            return False
        widths.append(_part(kind, own, other)[1])
        if not 2 <= widths[-1] <= 64:
            return False
    return True


graphs = st.lists(
    st.tuples(st.sampled_from(sorted(OPS)), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8
).filter(_fits)


def _values(graph_module: fx.GraphModule, names: list[str], x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return run_keeping(graph_module, names, x)[1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graphs, st.randoms(use_true_random=False))
def test_narrowed_is_a_selection(steps: list[tuple[str, int, int]], chooser: object) -> None:
    module = Random(steps).double().eval()
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = trace(module, x)
    taps = [
        names[0]
        for node, names in teacher.aliases.items()
        if teacher.facts[node].channel_axis == 1 and teacher.facts[node].channels > 3
    ]
    kept = {
        tap: sorted(chooser.sample(range(n := teacher.facts_of(tap).channels), chooser.randint(1, n))) for tap in taps
    }  # type: ignore[attr-defined]
    slim = narrow(teacher, kept=kept).value
    whole = _values(teacher.graph_module, [teacher.node(tap).name for tap in taps], x)
    got = _values(slim.graph_module, [slim.node(tap).name for tap in taps], x)
    for tap in taps:
        expected = whole[teacher.node(tap).name][:, kept[tap]]
        assert torch.allclose(got[slim.node(tap).name], expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))
    assert torch.equal(teacher.graph_module(x), slim.graph_module(x))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(graphs, st.sampled_from([0.25, 0.5, 0.8]))
def test_shrunk_is_masked(steps: list[tuple[str, int, int]], ratio: float) -> None:
    module = Random(steps).double().eval()
    x = torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = trace(module, x)
    result = shrink(traced, ratio=ratio)
    expected = run_masked(traced, result.report, x)
    with torch.no_grad():
        got = result.value.graph_module(x)
    assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
