"""A few of the networks of benchmarks/fuzz_networks.py, by saved seeds: those that once found a fault, and some more."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# (seed, case): what it found when it was first run.
FOUND = {
    (0, 1): "shrink left nodes of the old graph in the sizes of `unflatten`",
    (0, 168): "narrowed at the end of a channel shuffle, a tap lost its channel axis",
    (0, 6): "a graph's output was a tap that `instrument` and `cut` left out without a word",
}
MORE = [(0, case) for case in (0, 2, 3, 5)]
ONE_RECOMPUTES_WEIGHTS = [(0, case) for case in (0, 1, 3, 168)]
"""Cases in which one of the two networks has parametrized convolutions, which have no source code as they are."""

LATER = (
    *("spatial attention", "channel softmax", "channel spread", "constant places", "best places", "gru cell"),
    *("lstm cell", "started", "weight on the left", "spectrum", "places of patches", "windows"),
)


@pytest.fixture(scope="module")
def fuzz(request: pytest.FixtureRequest) -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    request.addfinalizer(lambda: sys.path.remove(str(BENCHMARKS)))
    import fuzz_networks

    return fuzz_networks


@pytest.mark.parametrize("place", [*FOUND, *MORE], ids=str)
def test_every_number_has_a_second_way(place: tuple[int, int], fuzz: ModuleType) -> None:
    case, fault, _ = fuzz.run_case(*place, export=False)
    assert fault == ""
    assert case.refused == []
    assert [step for step in case.done if step != "source"] == [
        "trace",
        "taps",
        "align",
        "narrow",
        "shrink",
        "cut",
        "stage",
    ]
    assert case.done.count("source") == (1 if place in ONE_RECOMPUTES_WEIGHTS else 2)
    assert case.compared >= 10


@pytest.mark.parametrize("kind", LATER)
def test_the_latest_kinds(kind: str, fuzz: ModuleType) -> None:
    """Each alone, twice in a teacher and in its student."""
    import random_networks

    settings = {"stem": "norm", "head": "pool", "downs": ("stride", "pool"), "blocks": ((kind,), (kind,))}
    case = fuzz.Case(10, 0, export=False)
    case.recipes = tuple(
        random_networks.Recipe(seed=seed, widths=widths, **settings) for seed, widths in ((1, (8, 12)), (2, (4, 6)))
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as `run_case` does
        case.run()
    assert case.refused == []
    assert case.done == ["trace", "taps", "align", "narrow", "shrink", "source", "source", "cut", "stage"]


def test_a_wrong_number_is_seen(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a shrink off by a millionth part, and a narrowed feature with two channels exchanged."""
    original = fuzz.run_masked
    monkeypatch.setattr(fuzz, "run_masked", lambda *args: original(*args) * (1 + 1e-6))
    assert fuzz.run_case(0, 0, export=False)[1].startswith("WrongError: shrink: shrunk by")
    monkeypatch.undo()
    value = torch.arange(6.0, dtype=torch.float64).view(1, 6)
    with pytest.raises(fuzz.WrongError, match="off by"):
        fuzz.same(value[:, [1, 0, 2, 3, 4, 5]], value, "exchanged")


def test_a_network_that_was_refused_once_is_traced(fuzz: ModuleType) -> None:
    """Sizes that are computed in `unflatten`, in a network of its own: (0, 1) above, made small."""
    import indistill_fx as ifx
    from tests.numerics.masked_reference import run_masked

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Conv2d(n, m, 1) for n, m in ((3, 8), (8, 8), (8, 5)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            n, c, h, w = y.shape
            y = self.b(y).reshape(n, c, h * w).unflatten(2, (h, w)) + y
            return self.c(y).mean((2, 3))

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    traced = ifx.trace(Net().double().eval(), x)
    small = ifx.shrink(traced, ratio=0.5)
    assert small.report.widths["a"] == (8, 4)
    with torch.no_grad():
        torch.testing.assert_close(small.value.graph_module(x), run_masked(traced, small.report, x))
    with pytest.raises(ifx.ConfigError, match="no layer named `:output`"):
        ifx.instrument(traced, [":output"])
