"""Networks that give every column of a table a vector: the vectors' entries are the channels, and the columns are tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from indistill_fx.passes.align import align
from indistill_fx.passes.capture.trace import trace

COLUMNS = 10


class Table(nn.Module):
    """Tokens of columns through a transformer: (batch, columns) → (batch, 4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(COLUMNS, width)) for _ in range(2))
        self.norm = nn.BatchNorm1d(COLUMNS)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True, norm_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(width, 4)

    def embed(self, x: Tensor) -> Tensor:
        return self.weight * self.norm(x).unsqueeze(-1) + self.bias  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))  # type: ignore[no-any-return]


class AddsBias(Table):
    def embed(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias[None], x[:, :, None], self.weight[None])


class Summed(Table):
    def embed(self, x: Tensor) -> Tensor:
        return torch.einsum("bf,fd->bfd", x, self.weight)


class Shared(Table):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.row = nn.Parameter(torch.randn(1, width))

    def embed(self, x: Tensor) -> Tensor:
        return x[..., None] @ self.row + self.bias


class Periodic(Table):
    def embed(self, x: Tensor) -> Tensor:
        phase = self.weight.chunk(2, 1)[0] * x[..., None]
        return torch.cat([phase.cos(), phase.sin()], -1)


class ByColumn(Table):
    """Several values a column, and a matrix for each."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.matrices = nn.Parameter(torch.randn(COLUMNS, 3, width))

    def embed(self, x: Tensor) -> Tensor:
        values = torch.stack([x, x.relu(), x * x], -1)
        return (values[..., None, :] @ self.matrices).squeeze(-2) + self.bias


class ByColumnSummed(ByColumn):
    def embed(self, x: Tensor) -> Tensor:
        return torch.einsum("bfk,fkd->bfd", torch.stack([x, x.relu(), x * x], -1), self.matrices)


@pytest.mark.parametrize("kind", [Table, AddsBias, Summed, Shared, Periodic, ByColumn, ByColumnSummed])
def test_the_entries_of_the_vectors_are_the_channels(kind: type[Table]) -> None:
    x = torch.randn(8, COLUMNS)
    teacher, student = trace(kind(32).eval(), x), trace(kind(16), x, role="student")
    plan = align(teacher, student)
    assert plan.pairs
    assert {pair.adapter for pair in plan.pairs} == {"none"}
    assert {len(pair.kept or ()) for pair in plan.pairs} == {16}
    assert all(pair.teacher_shape == (8, COLUMNS, 32) for pair in plan.pairs)


def test_tables_over_time() -> None:
    """(batch, steps, columns): the vectors stand on a fourth axis."""

    class Steps(Table):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x[..., None] * self.weight
            across = self.encoder(tokens.flatten(0, 1)).view_as(tokens)
            return self.head((tokens + across).mean((1, 2)))  # type: ignore[no-any-return]

    x = torch.randn(2, 7, COLUMNS)
    large, small = (trace(Steps(width).eval(), x) for width in (32, 16))
    wider = [
        name
        for name, facts in large.facts.items()
        if facts.shape != small.facts[name].shape and facts.batch_axis is not None
    ]
    assert {"mul", "add"} <= set(wider)
    for name in wider:
        axis = large.facts[name].channel_axis
        assert axis is not None, name
        assert large.facts[name].shape[axis] > small.facts[name].shape[axis], name


def test_maps_made_of_a_vector_by_convolutions_keep_their_axis() -> None:
    """Not everything that grows on its last axis is a table: a decoder adds positions to channels."""

    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.places, self.conv = (
                nn.Linear(5, 12),
                nn.Parameter(torch.randn(1, 12, 7)),
                nn.Conv1d(12, 6, 3),
            )

        def forward(self, z: Tensor) -> Tensor:
            return self.conv(self.lift(z)[..., None] + self.places)  # type: ignore[no-any-return]

    traced = trace(Broadcast().eval(), torch.randn(3, 5))
    assert traced.facts["add"].shape == (3, 12, 7)
    assert traced.facts["add"].channel_axis == 1
