"""What is computed over the channels (maxima, spreads, norms, softmax) is computed over those that stay, and reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from indistill_fx.errors import PassError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning import masked
from indistill_fx.passes.pruning.shrink import ShrinkReport, shrink
from tests.numerics.masked_reference import run_masked
from tests.passes.test_more_networks import narrowed

Op = Callable[[Tensor], Tensor]
C = 12


class Over(nn.Module):
    """A convolution, an operation over its channels that leaves a map of as many, and a head."""

    def __init__(self, operation: Op, part: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.part, self.head = nn.Conv2d(3, C, 3), part or nn.Identity(), nn.Conv2d(C, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.operation(self.stem(x)))).mean((2, 3))  # type: ignore[no-any-return]


def shrunk(module: Over, ratio: float = 0.5) -> ShrinkReport:
    """Shrink and compare with the same code on the channels that stay, and with the masked original."""
    module = module.double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traced = trace(module, x)
    result = shrink(traced, ratio=ratio)
    kept = torch.tensor(next(layer.kept for layer in result.report.layers if layer.path == "stem"))
    with torch.no_grad():
        got = result.value.graph_module(x)
        middle = module.part(module.operation(module.stem(x)[:, kept]))
        expected = F.conv2d(middle, module.head.weight[:, kept], module.head.bias).mean((2, 3))
    scale = float(expected.abs().max())
    assert float((got - expected).abs().max()) <= 1e-10 * scale
    assert float((got - run_masked(traced, result.report, x)).abs().max()) <= 1e-10 * scale
    return result.report


APPROXIMATE: dict[str, Op] = {
    "max": lambda x: x * x.max(1, keepdim=True)[0].sigmoid(),
    "max, values": lambda x: x * torch.max(x, dim=1, keepdim=True).values,
    "max, unpacked": lambda x: x * _first(*torch.max(x, 1, True)),
    "min without the axis": lambda x: x * x.min(1).values.unsqueeze(1),
    "median": lambda x: x * x.median(dim=-3, keepdim=True).values,
    "prod": lambda x: x + x.prod(1, keepdim=True),
    "logsumexp": lambda x: x - torch.logsumexp(x, 1, keepdim=True),
    "logsumexp of several": lambda x: x - torch.logsumexp(x, (1, 2), True),
    "var and mean": lambda x: _standardised(x, *torch.var_mean(x, 1, keepdim=True)),
    "std and mean": lambda x: _standardised(x, *torch.std_mean(x, dim=(1, 2), keepdim=True, correction=0)),
    "norm by its axis": lambda x: x / (1 + x.norm(p=1, dim=1, keepdim=True)),
    "mean by numpy's name": lambda x: x - x.mean(axis=1, keepdims=True),
    "log softmax": lambda x: F.log_softmax(x, 1),
    "softmin": lambda x: x * F.softmin(x, dim=1),
    "softmax in another type": lambda x: x * torch.softmax(x, 1, dtype=torch.float32),
    "normalize over several axes": lambda x: F.normalize(x, dim=(1, 2)),
    "spatial attention": lambda x: x * torch.cat([x.mean(1, True), x.max(1, True)[0]], 1).sum(1, True).sigmoid(),
}
EXACT: dict[str, Op] = {
    "sum": lambda x: x + x.sum(1, keepdim=True),
    "cumsum": lambda x: x + x.cumsum(1),
    "maximum of space": lambda x: x * x.flatten(2).max(2).values[..., None, None],
    "place in space": lambda x: x * x.flatten(2).argmax(2)[..., None, None],
    "sorted space": lambda x: x + x.sort(2).values + x.sort(dim=3, descending=True)[0] + x.argsort(2),
    "best of space": lambda x: x + x.topk(4, 2).values.mean(2, keepdim=True) + x.kthvalue(2, 3, keepdim=True).values,
    "cumulative in space": lambda x: x.cumprod(-1) + x.cummax(2).values + torch.cummin(x, dim=3)[0] + x.logcumsumexp(2),
    "maximum of two": lambda x: torch.max(x, -x) + torch.min(x, other=x.abs() * 0.5),
    "elementwise": lambda x: x.atan() + x.clip(-1, 1) + torch.rsub(x, 1) + F.threshold(x, 0.1, 0.2) + x.abs().log2(),
    "logic": lambda x: x * ((x > 0) & (x < 1) | ~(x > -0.5)) + x.isnan() * 2,
    "of two": lambda x: torch.atan2(x, x + 1) + torch.hypot(x, x) + torch.xlogy(x, x.abs() + 1) + torch.fmod(x, 0.7),
}
STAY: dict[str, Op] = {
    "argmax": lambda x: x * x.argmax(1, keepdim=True),
    "places of the maxima": lambda x: x * x.max(1, keepdim=True)[1],
    "places of the minima": lambda x: x * x.min(1, keepdim=True).indices + x.min(1, keepdim=True).values,
    "sorted channels": lambda x: x.sort(1).values,
}


def _first(values: Tensor, _: Tensor) -> Tensor:
    return values


def _standardised(x: Tensor, spread: Tensor, mean: Tensor) -> Tensor:
    return (x - mean) / (1 + spread)


@pytest.mark.parametrize("name", [*APPROXIMATE, *EXACT])
def test_over_the_channels_that_stay(name: str) -> None:
    report = shrunk(Over({**APPROXIMATE, **EXACT}[name]))
    assert report.widths["stem"] == (C, C // 2)
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    assert bool(report.approximate) == (name in APPROXIMATE)


@pytest.mark.parametrize("kind", [nn.Softmax, nn.LogSoftmax, nn.Softmin])
def test_modules_over_channels(kind: type[nn.Module]) -> None:
    report = shrunk(Over(lambda x: x, kind(dim=1)))
    assert report.widths["stem"] == (C, C // 2) and len(report.approximate) == 1
    assert shrunk(Over(lambda x: x, nn.Softmax2d())).approximate == ("part (softmax2d)",)


@pytest.mark.parametrize("name", STAY)
def test_what_numbers_the_channels_keeps_them(name: str) -> None:
    report = shrunk(Over(STAY[name]))
    assert report.widths["stem"] == (C, C)
    assert "numbers them" in report.frozen[0].reason or name == "sorted channels"


def test_places_that_nobody_reads_do_not_matter() -> None:
    def values(x: Tensor) -> Tensor:
        found = x.max(1, keepdim=True)
        _ = found[1]
        return x * found[0]

    assert shrunk(Over(values)).widths["stem"] == (C, C // 2)


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in "mean sum amax amin logsumexp".split()},
    "var": lambda x, dim, keepdim: torch.var(x, dim, unbiased=False, keepdim=keepdim),
    "std": lambda x, dim, keepdim: torch.std(x, dim, correction=0, keepdim=keepdim),
    "norm": lambda x, dim, keepdim: torch.linalg.vector_norm(x, 2, dim, keepdim=keepdim),
    "max": lambda x, dim, keepdim: torch.max(x, dim[0], keepdim=keepdim).values,
    "prod": lambda x, dim, keepdim: torch.prod(x, dim[0], keepdim=keepdim),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(REDUCTIONS)),
    st.sets(st.integers(1, 3), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.25, 0.5, 0.75]),
)
def test_any_axes(name: str, axes: set[int], keepdim: bool, negative: bool, ratio: float) -> None:
    """Shrunk over the channels that stay, narrowed to the whole at the kept channels; by any axes, from either end."""
    dims = [axis - 4 if negative else axis for axis in sorted(axes)]

    def operation(x: Tensor) -> Tensor:
        y = REDUCTIONS[name](x, dims, keepdim)
        for axis in (sorted(axes)[:1] if name in ("max", "prod") else sorted(axes)) if not keepdim else ():
            y = y.unsqueeze(axis)
        return x + y

    module = Over(operation)
    report = shrunk(module, ratio)
    assert report.widths["stem"] == (C, round(C * ratio))
    over = 1 in axes if name not in ("max", "prod") else min(axes) == 1
    assert bool(report.approximate) == (over and name != "sum")
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    narrowed(trace(module, x), x)


def test_the_comparison_sees_a_statistic_over_all_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the checks above."""
    monkeypatch.setattr(masked, "_leave_out", lambda *_: None)
    with pytest.raises(PassError, match="off by"):
        shrunk(Over(APPROXIMATE["max"]))


def test_channels_along_which_a_convolution_slides_stay_and_the_report_says_why() -> None:
    class Neighbours(nn.Module):
        """The weights of ECA: from the means of each channel and its neighbours."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1)

    module = Over(lambda x: x, Neighbours()).double().eval()
    report = shrink(trace(module, torch.randn(2, 3, 6, 6, dtype=torch.float64)), ratio=0.5).report
    assert report.widths["stem"] == (C, C)
    why = "`part.conv` (conv) combines each with its neighbours: if one went, others would become neighbours"
    assert [frozen.reason for frozen in report.frozen] == [why, "an output of the network"]
