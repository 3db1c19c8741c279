"""Code that takes the batch apart into as many pieces as it needs: a graph would keep the example's number of them."""

import math

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx


class ByChunks(nn.BatchNorm1d):
    """Ghost batch norm, as in TabNet."""

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(math.ceil(x.shape[0] / 8), 0)
        return torch.cat([super(ByChunks, self).forward(part) for part in parts], dim=0)


class BySplit(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(BySplit, self).forward(part) for part in x.split(8)])


class Halves(nn.Module):
    """Two views of each sample, in one batch."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([x, 2 * x]).chunk(2)
        return first * second


class Net(nn.Module):
    def __init__(self, part: nn.Module):
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(4, 8), part, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(torch.relu(y + self.part(y)))


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("part", [ByChunks, BySplit])
def test_a_larger_batch_keeps_all_of_its_pieces(part, role):
    torch.manual_seed(0)
    net = Net(part(8)).train(role == "student")
    net.part.running_mean.normal_()
    traced = ifx.trace(net, torch.randn(2, 4), role=role)
    assert traced.report.leaves == ("part",)
    assert "grows with the batch" in str(traced.report.refused)
    x = torch.randn(20, 4)
    graph = traced.graph_module.train(role == "student")
    assert torch.equal(graph(x), net(x))


def test_a_fixed_number_of_pieces_needs_no_leaf():
    traced = ifx.trace(Net(Halves()), torch.randn(2, 4))
    assert not traced.report.leaves
    x = torch.randn(20, 4)
    assert torch.equal(traced.graph_module(x), traced.module(x))


def test_the_first_pieces_alone_are_taken_as_they_are():
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x.split(1)[0]

    traced = ifx.trace(Net(First()), torch.randn(2, 4))
    assert not traced.report.leaves
    x = torch.randn(20, 4)
    assert torch.equal(traced.graph_module(x), traced.module(x))


def test_pieces_in_the_networks_own_forward_are_refused():
    class Whole(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Whole, self).forward(part) for part in x.split(8)])

    with pytest.raises(
        ifx.FrontendError, match=r"the forward takes the batch apart .* whose number grows with the batch"
    ) as caught:
        ifx.trace(Whole(nn.Identity()), torch.randn(2, 4))
    assert "submodule of its own" in str(caught.value)


class Listed(nn.Module):
    """Like TabNet: what stops the recording elsewhere leaves `torch.export` alone, which would take all of a larger batch at once."""

    def __init__(self):
        super().__init__()
        self.first, self.part, self.head = nn.Linear(4, 8), ByChunks(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.first(x).split(8)
        return self.head(torch.cat([self.part(part) for part in parts]))


def test_a_student_that_is_taken_apart_is_not_exported_as_a_whole():
    torch.manual_seed(0)
    with pytest.raises(ifx.FrontendError, match="grows with the batch") as caught:
        ifx.trace(Listed().train(), torch.randn(2, 4), role="student")
    assert "in train mode it would compute with all of a larger batch at once" in str(caught.value)
