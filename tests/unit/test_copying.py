"""Deep copies of graphs: equal to Python's, and nothing shared."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.copying import deep_copy


class Shared(nn.Module):
    """A layer used twice, a weight tied to another, a recurrent layer, and a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1, bias=False)
        self.tied = nn.Conv2d(4, 4, 1, bias=False)
        self.tied.weight = self.twice.weight
        self.rnn = nn.GRU(4, 4, batch_first=True)
        self.norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(self.twice(self.twice(self.norm(self.conv(x)))))
        return self.rnn(x.flatten(2).transpose(1, 2))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("training", [True, False])
def test_equal_and_nothing_shared(training: bool) -> None:
    graph_module = fx.symbolic_trace(Shared().train(training))
    new, theirs = deep_copy(graph_module, {}), copy.deepcopy(graph_module)
    new.recompile()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(new(x), theirs(x))
    kinds = [
        [type(m) for m in list(graph.modules())[1:]] for graph in (new, theirs)
    ]  # each graph is of a class of its own
    assert kinds[0] == kinds[1]
    assert new.tied.weight is new.twice.weight
    own = {id(value) for m in graph_module.modules() for value in vars(m).values() if isinstance(value, dict)}
    assert not own & {id(value) for m in new.modules() for value in vars(m).values() if isinstance(value, dict)}
    assert not {t.data_ptr() for t in graph_module.state_dict().values()} & {
        t.data_ptr() for t in new.state_dict().values()
    }
    assert all(m.training is training for m in new.modules())


def test_what_stands_in_the_memo_is_taken() -> None:
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Conv2d(3, 4, 1)))
    smaller = nn.Parameter(torch.zeros(2, 3, 1, 1))
    new = deep_copy(graph_module, {id(graph_module.get_parameter("0.weight")): smaller})
    assert new.get_parameter("0.weight") is smaller
