"""Positions that the code computes anew for every input, and queries and keys that are normalised: width and heads go beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.compression.write_source import source_of
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.passes.test_shrink import run_masked

WIDTH, HEADS, HEAD = 16, 4, 4


def of_tokens(x: Tensor) -> Tensor:
    """Sine and cosine of the place in a text, (length, channels)."""
    length, width = x.shape[1:]
    speeds = 100.0 ** (-torch.arange(width // 2, device=x.device) / (width // 2))
    angles = torch.arange(length, device=x.device)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1).type_as(x)


def interleaved(x: Tensor) -> Tensor:
    """The same with sine and cosine in turn, written into a tensor of zeros, (1, length, channels)."""
    places = torch.zeros(x.shape[1], x.shape[2], dtype=x.dtype)
    angles = torch.arange(x.shape[1])[:, None] / 10 ** torch.linspace(0, 1, x.shape[2] // 2)
    places[:, 0::2] = angles.sin().to(x)
    places[:, 1::2] = angles.cos().to(x)
    return places.unsqueeze(0)


class Tokens(nn.Module):
    def __init__(self, positions: Callable[[Tensor], Tensor], *, attends: bool = False):
        super().__init__()
        self.positions, self.attends = positions, attends
        self.embed, self.mid = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.query, self.key, self.head = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.attends:  # as in DETR: of queries and keys alone
            seen = x + self.positions(x)
            weights = (self.query(seen) @ self.key(seen).transpose(1, 2)).softmax(-1)
            x = x + weights @ self.mid(x)
        else:
            x = x + self.positions(x)
            x = self.mid(F.relu(x)) * 0.5 + self.positions(x)
        return self.head(F.relu(x)).mean(1)


class Map(nn.Module):
    """Positions (1, channels, height, width) beside a map, and a ramp over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        rows, columns = (torch.arange(n).type_as(x) for n in x.shape[-2:])
        speeds = torch.arange(1, WIDTH // 2 + 1).type_as(x)[:, None, None]
        places = [
            torch.sin(rows[:, None] * speeds).expand(-1, -1, len(columns)),
            torch.cos(columns * speeds).expand(-1, len(rows), -1),
        ]
        x = F.relu(self.body(x + torch.cat(places)[None]))
        return self.head((x * torch.linspace(0.5, 1.5, WIDTH).view(-1, 1, 1).type_as(x)).mean((2, 3)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "tokens": (lambda: Tokens(of_tokens), (2, 6, 5), (3, 9, 5)),
    "in turn": (lambda: Tokens(interleaved), (2, 6, 5), (3, 9, 5)),
    "queries and keys": (lambda: Tokens(of_tokens, attends=True), (2, 6, 5), (3, 9, 5)),
    "map": (Map, (2, 3, 9, 8), (3, 3, 12, 7)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_the_width_goes_beside_positions_that_the_code_computes(name: str) -> None:
    make, shape, other = NETWORKS[name]
    torch.manual_seed(0)
    x, longer = torch.randn(shape, dtype=torch.float64), torch.randn(other, dtype=torch.float64)
    model = trace(make().double().eval(), x)
    result = shrink(model, ratio=0.5)
    assert all(after == before // 2 for tap, (before, after) in result.report.widths.items() if tap != "head")
    student = source_of(result.value).build().double().eval()
    for given in (x, longer):
        with torch.no_grad():
            got, expected = result.value.graph_module(given), run_masked(model, result.report, given)
            assert torch.equal(student(given), got)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    again = shrink(result.value, ratio=0.5)  # what was chosen is chosen from once more
    assert again.report.parameters[1] < again.report.parameters[0]


class Heads(nn.Module):
    """Attention whose queries and keys are normalised along each head."""

    def __init__(self, how: str, *, scales: bool = False):
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
        self.norms = nn.ModuleList(norms[how](HEAD) for _ in range(2)) if how in norms else None
        self.scale = nn.Parameter(torch.rand(HEADS, 1, HEAD) + 0.5) if scales else 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        query, key, value = (part.unflatten(-1, (HEADS, HEAD)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        else:
            query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        weights = (query * self.scale @ key.transpose(-2, -1)).softmax(-1)
        return self.head((x + self.out((weights @ value).transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize(
    ("how", "scales"), [("layer", False), ("rms", True), ("normalize", False), ("normalize", True)]
)
def test_whole_heads_go_where_queries_and_keys_are_normalised(how: str, scales: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    model = trace(Heads(how, scales=scales).double().eval(), x)
    result = shrink(model, ratio=0.5)
    assert result.report.widths["qkv"] == (3 * HEADS * HEAD, 3 * HEADS * HEAD // 2)
    assert result.report.approximate == ()  # no norm lost channels
    products = [node.name for node in model.graph_module.graph.nodes if node.target in (torch.matmul, "__matmul__")]
    shapes = {result.value.facts[name].shape[1:] for name in products if name in result.value.facts}
    assert all(shape[0] == HEADS // 2 for shape in shapes)
    with torch.no_grad():
        torch.testing.assert_close(
            result.value.graph_module(x), run_masked(model, result.report, x), rtol=1e-9, atol=1e-9
        )
