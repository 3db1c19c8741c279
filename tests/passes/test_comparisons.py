"""Similarities and distances over channels: both sides lose the same ones; and products of all pairs of vectors (DLRM)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked
from tests.passes.test_more_networks import narrowed, traced

CLASSES = 6


class Compared(nn.Module):
    """Two branches, compared in some way, and prototypes of classes."""

    def __init__(self, how: Callable[[Compared, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(3, 8, 5, 2, 2), nn.Linear(CLASSES, 5)
        self.prototypes = nn.Parameter(torch.randn(CLASSES, 8))
        self.similarity, self.distance, self.how = nn.CosineSimilarity(1), nn.PairwiseDistance(keepdim=True), how

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.how(self, self.a(x).relu(), self.b(x)))  # type: ignore[no-any-return]


def vectors(a: Tensor) -> Tensor:
    return a.mean((2, 3))


WAYS: dict[str, Callable[[Compared, Tensor, Tensor], Tensor]] = {
    "cosine": lambda m, a, b: F.cosine_similarity(a, b).flatten(1)[:, :CLASSES],
    "cosine of the last axis": lambda m, a, b: F.cosine_similarity(vectors(a)[:, None], m.prototypes[None], dim=-1),
    "cosine by keywords": lambda m, a, b: F.cosine_similarity(x1=vectors(a)[:, None], x2=m.prototypes, dim=2, eps=1e-6),
    "cosine layer": lambda m, a, b: m.similarity(a, b).flatten(1)[:, :CLASSES],
    "distance": lambda m, a, b: F.pairwise_distance(vectors(a), vectors(b), keepdim=True).expand(-1, CLASSES),
    "distance layer": lambda m, a, b: m.distance(vectors(a), vectors(b)).expand(-1, CLASSES),
    "all distances": lambda m, a, b: torch.cdist(vectors(a), m.prototypes),
    "distances of places": lambda m, a, b: torch.cdist(a.flatten(2).mT, b.flatten(2).mT).mean(1)[:, :CLASSES],
    "pairs": lambda m, a, b: torch.bmm(
        t := torch.cat([vectors(a), vectors(b), vectors(a * b)], 1).view((len(a), -1, 8)), t.transpose(1, 2)
    )[:, torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 2, 1, 2, 2])],
}


@pytest.mark.parametrize("name", WAYS)
def test_half_of_the_channels_go_on_both_sides(name: str) -> None:
    model, x = traced(lambda: Compared(WAYS[name]))
    narrowed(model, x)
    result = shrink(model, ratio=0.5)
    with torch.no_grad():
        torch.testing.assert_close(result.value.graph_module(x), run_masked(model, result.report, x))
    assert set(result.report.widths.items()) - {("out", (5, 5))} <= {("a", (8, 4)), ("b", (8, 4))}
    assert [frozen.reason for frozen in result.report.frozen] == ["an output of the network"]


def test_the_other_axes_are_narrowed_further_up() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.mix = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(12, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = (layer(x).unflatten(1, (4, 2)) for layer in (self.a, self.b))
            near = torch.cdist(a.mean(4).mT, b.mean(4).mT).flatten(1)[:, :8, None, None]
            return self.mix(torch.cat([F.cosine_similarity(a, b, dim=2), near.expand(-1, -1, *x.shape[2:])], 1))  # type: ignore[no-any-return]

    narrowed(*traced(Places))
