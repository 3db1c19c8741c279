"""Products of tensors of any ranks, with what is learned or constant on either side, narrowed and halved exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.errors import PassError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning import attention_dependencies
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked
from tests.passes.test_more_networks import halved, narrowed

Op = Callable[[nn.Module, Tensor], Tensor]
NODES, WIDTH = 5, 8


class Graph(nn.Module):
    """Features of nodes, a product, and a head; `matrix` is learned or constant."""

    def __init__(self, operation: Op, matrix: Tensor, out: int = WIDTH, *, learned: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave, self.operation = nn.Linear(6, WIDTH), nn.Linear(out, 4), operation
        self.inner, self.bias = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(out))
        self.matrix = nn.Parameter(matrix)
        if not learned:
            del self.matrix
            self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self, self.inner(self.enter(x).tanh()).tanh())
        return self.leave(y) + self.bias.sum()  # type: ignore[no-any-return]


ADJACENT, WEIGHT = torch.randn(NODES, NODES), torch.randn(WIDTH, WIDTH)
GOES: dict[str, Callable[[], nn.Module]] = {
    "graph convolution": lambda: Graph(lambda m, x: m.matrix @ x, ADJACENT),
    "from the right": lambda: Graph(lambda m, x: (x.mT @ m.matrix).mT, ADJACENT),
    "expanded": lambda: Graph(lambda m, x: torch.bmm(m.matrix.expand(x.shape[0], -1, -1), x), ADJACENT),
    "added to": lambda: Graph(
        lambda m, x: torch.baddbmm(m.inner(x), m.matrix.expand(x.shape[0], -1, -1), x, alpha=0.5), ADJACENT
    ),
    "several adjacencies": lambda: Graph(lambda m, x: (m.matrix @ x.unsqueeze(1)).sum(1), torch.randn(3, NODES, NODES)),
    "weight": lambda: Graph(lambda m, x: x @ m.matrix, WEIGHT, learned=True),
    "weight on the left": lambda: Graph(lambda m, x: (m.matrix @ x.mT).mT, WEIGHT, learned=True),
    "weight of a flat product": lambda: Graph(
        lambda m, x: torch.addmm(m.bias, x.flatten(0, 1), m.matrix).unflatten(0, (-1, NODES)), WEIGHT, learned=True
    ),
    "vector": lambda: Graph(lambda m, x: x * (x @ m.matrix).sigmoid()[..., None], torch.randn(WIDTH), learned=True),
    "ellipsis": lambda: Graph(lambda m, x: torch.einsum("...c,cd->...d", x, m.matrix), WEIGHT, learned=True),
    "ellipsis of nodes": lambda: Graph(lambda m, x: torch.einsum("nm,...mc->...nc", m.matrix, x), ADJACENT),
}


def traced(module: nn.Module) -> tuple[object, Tensor]:
    x = torch.randn(2, NODES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return trace(module.double().eval(), x), x


@pytest.mark.parametrize("name", GOES)
def test_products(name: str) -> None:
    model, x = traced(GOES[name]())
    narrowed(model, x)
    report = halved(model, x)
    assert {path: after for path, (_, after) in report.widths.items() if path in ("enter", "inner", "leave")} == {
        "enter": WIDTH // 2,
        "inner": WIDTH // 2,
        "leave": 4,
    }, report.frozen


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 3),
    st.lists(st.booleans(), max_size=2),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_any_ranks(groups: int, whole: list[bool], vector: bool, left: bool, learned: bool) -> None:
    """The other operand is a vector or a matrix, with batches of its own or one for all, on either side."""
    sizes = [1, groups, NODES, WIDTH] if groups else [1, NODES, WIDTH]
    batches = [n if same else 1 for n, same in zip(sizes[:-2][::-1], whole, strict=False)][::-1]
    inner = NODES if left else WIDTH
    shape = [inner] if vector else [*batches, *((6, inner) if left else (inner, 6))]
    out = (WIDTH if left else NODES) if vector else (WIDTH if left else 6)

    def multiply(m: nn.Module, x: Tensor) -> Tensor:
        x = x[:, None].expand(-1, groups, -1, -1) * 2 if groups else x
        return torch.matmul(m.matrix, x) if left else torch.matmul(x, m.matrix)

    torch.manual_seed(2)
    model, x = traced(Graph(multiply, torch.randn(shape), out, learned=learned))
    narrowed(model, x)
    report = halved(model, x)
    assert report.widths["enter"][1] == report.widths["inner"][1] == WIDTH // 2, report.frozen


def test_the_comparison_sees_a_product_over_other_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the checks above: the two sides of a sum lose different channels."""
    tie = attention_dependencies.Coupling.tie
    monkeypatch.setattr(
        attention_dependencies.Coupling,
        "tie",
        lambda self, a, b, why: tie(self, a, np.roll(b, 1) if "sums over" in why and b is not None else b, why),
    )
    with pytest.raises(PassError, match="off by"):
        halved(*traced(GOES["weight"]()))


class Retention(nn.Module):
    """Heads without a softmax, each normalised as one group."""

    def __init__(self, *, functional: bool):
        super().__init__()
        self.e, self.q, self.k, self.v = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 32)
        self.norm, self.leave, self.o, self.functional = (
            nn.GroupNorm(4, 32),
            nn.Linear(32, 16),
            nn.Linear(16, 3),
            functional,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, 4, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = (q @ k.transpose(2, 3) @ v).transpose(1, 2).reshape(b * n, 32)
        y = F.group_norm(y, 4, self.norm.weight, self.norm.bias) if self.functional else self.norm(y)
        return self.o(self.leave(y.view(b, n, 32)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("functional", [False, True])
@torch.no_grad()
def test_a_group_norm_of_heads_loses_groups(functional: bool) -> None:
    torch.manual_seed(0)
    net = Retention(functional=functional).double().eval()
    nn.init.normal_(net.norm.weight)
    model = trace(net, torch.randn(2, 5, 6, dtype=torch.float64))
    small = shrink(model, ratio=0.5)
    assert [frozen.reason for frozen in small.report.frozen] == ["an output of the network"]
    assert small.report.approximate == () and small.report.widths["v"] == (32, 16)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(small.value.graph_module(x), run_masked(model, small.report, x))
