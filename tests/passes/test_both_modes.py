"""A student's graph keeps the meaning of train() and eval(), whatever its code does with the flag."""

from __future__ import annotations

import copy
import importlib
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import ExportError, PruneError
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes
from indistill_fx.passes.capture.symbolic import capture_symbolic
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)
        return x * mask.div_(0.5)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(8))
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean = x.mean((0, 2, 3))
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * mean.detach())
        else:
            mean = self.mean
        return (x - mean.view(1, -1, 1, 1)) * self.weight.view(1, -1, 1, 1)


class Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5 if self.training else 0.0) * (2.0 if self.training else 3.0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if self.training else self.two(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.a, self.bn, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), inner
        self.b, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.a(x)))
        y = y + self.inner(self.b(y))
        return F.dropout(self.fc(y.mean((2, 3))), 0.3, training=self.training)


INNER = [Functional, DropPath, Norm, Number, Layer]
CAPTURES = [capture_symbolic, capture_shapes, capture_leaves, capture_exported]


def both(graph: nn.Module, module: nn.Module, x: Tensor) -> None:
    torch.manual_seed(3)
    expected = copy.deepcopy(module)(x)
    torch.manual_seed(3)
    assert torch.allclose(graph(x), expected, atol=1e-6)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("make", INNER)
def test_a_students_graph_follows_the_mode(make, capture, monkeypatch):
    monkeypatch.setattr(importlib.import_module("indistill_fx.passes.capture.trace"), "_METHODS", {"only": capture})
    torch.manual_seed(0)
    module, x = Net(make()), torch.randn(4, 3, 6, 6)
    model = trace(module, x, role="student")
    graph = model.graph_module
    assert not [note for note in model.report.notes if "eval mode" in note]
    assert module.training
    both(copy.deepcopy(graph).train(), module, x)
    module.eval()  # by the user's module
    both(graph, module, x)
    assert torch.equal(graph(x), graph(x))
    module.train()
    graph.eval()  # by the graph
    assert not any(part.training for part in graph.modules())
    module.eval()
    both(graph, module, x)
    graph.train()
    both(copy.deepcopy(graph).train(), module.train(), x)


def test_modules_set_to_eval_by_themselves_stay_so():
    module = Net(Functional())
    module.inner.eval()
    model = trace(module, torch.randn(2, 3, 6, 6), role="student")
    assert not module.inner.training and module.training
    x = torch.randn(4, 3, 6, 6)
    torch.manual_seed(0)
    expected = module(x)
    torch.manual_seed(0)
    assert torch.allclose(model.graph_module(x), expected, atol=1e-6)


def test_an_in_place_dropout_beside_code_that_asks_for_the_mode():
    module, x = Net(nn.Sequential(DropPath(), nn.Dropout(0.5, inplace=True))), torch.randn(2, 3, 6, 6)
    model = trace(module, x, role="student")
    assert not model.report.notes
    batch = torch.randn(4, 3, 6, 6)
    assert torch.equal(model.graph_module.eval()(batch), module.eval()(batch))
    assert shrink(model, ratio=0.5).report.widths["b"] == (8, 4)


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.RReLU])
def test_an_in_place_layer_follows_the_mode_of_the_users_own(layer):
    """Frozen by itself or with the whole module: the graph draws exactly where the module does."""
    module, x = nn.Sequential(nn.Linear(4, 8), layer(inplace=True), nn.Linear(8, 2)), torch.randn(5, 4, 4)
    graph = trace(module, x, role="student").graph_module

    def outcomes(model: nn.Module) -> int:
        return len({float(model(x).detach().sum()) for _ in range(5)})

    assert outcomes(module) == outcomes(graph) == 5
    module[1].eval()
    assert outcomes(module) == outcomes(graph) == 1
    assert torch.equal(module(x), graph(x))
    module[1].train()
    module.eval()
    assert torch.equal(module(x), graph(x))
    graph.train()
    assert module[1].training and outcomes(graph) == 5


@pytest.mark.parametrize("make", [Functional, DropPath, Number])
def test_a_smaller_network_has_flags_of_its_own(make):
    torch.manual_seed(0)
    module, x = Net(make()), torch.randn(4, 3, 6, 6)
    result = shrink(trace(module, x, role="student"), ratio=0.5)
    assert result.report.widths["b"] == (8, 4)
    small = result.value.graph_module
    small.eval()
    assert torch.equal(small(x), small(x)) and module.training
    small.train()
    assert not torch.equal(small(x), small(x))


Outputs = namedtuple("Outputs", "logits features")


@pytest.mark.parametrize(
    "form",
    [lambda y, f: (y, f), lambda y, f: {"logits": y, "features": f}, Outputs],
    ids=["tuple", "dict", "named tuple"],
)
def test_graphs_that_return_different_things_are_reported(form):
    """As torchvision's Inception does, which returns an auxiliary classifier's logits, too, in train mode."""

    class Auxiliary(Net):
        def forward(self, x):
            y = self.bn(self.a(x)).mean((2, 3))
            return form(self.fc(y), y) if self.training else self.fc(y)

    module, x = Auxiliary(Functional()), torch.randn(2, 3, 6, 6)
    model = trace(module, x, role="student")
    assert any("in eval mode the graph still computes" in note for note in model.report.notes)
    with pytest.raises(PruneError, match="role='teacher'"):
        shrink(model, ratio=0.5)
    with pytest.raises(ExportError, match="role='teacher'"):
        source_of(model)
    as_teacher = shrink(trace(module, x), ratio=0.5).value
    assert source_of(as_teacher).build().eval()(x).shape == as_teacher.graph_module(x).shape == (2, 4)


class TrainsOtherwise(nn.Module):
    """In train mode `how` changes what stands between two layers."""

    def __init__(self, how: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.last, self.how = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), how

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.how(x) if self.training else x)


@pytest.mark.parametrize(
    ("how", "alone"),
    [
        (lambda x: x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.9), True),
        (lambda x: x * torch.rand(x.shape[:2])[:, :, None, None], True),
        (lambda x: x * (torch.rand(x.shape[0], 1, 1, 1) < 0.9) / 0.9, True),
        (lambda x: x / 0.9 * (torch.rand(x.size(0), 1, 1, 1, device=x.device) < 0.9).float(), True),
        (lambda x: x.div(0.9) * (0.9 + torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype)).floor_(), True),
        (lambda x: x * torch.empty(x.shape[0], 1, 1, 1).uniform_(0, 1).lt(0.9).type_as(x), True),
        (lambda x: torch.where(torch.rand(x.shape[0], 1, 1, 1) < 0.9, x, torch.zeros_like(x)), True),
        (lambda x: (x / 0.9).masked_fill(torch.rand(x.shape[0], 1, 1, 1) < 0.1, 0.0), True),
        (lambda x: x * torch.randint(0, 2, (x.shape[0], 1, 1, 1)), True),
        (lambda x: x * (1 - F.max_pool2d((torch.rand(x.shape[0], 1, *x.shape[2:]) < 0.1).float(), 3, 1, 1)), True),
        (lambda x: x * torch.arange(x.shape[1])[:, None, None], False),
        (lambda x: x * (torch.randint(0, 9, (8, 1, 1)) > 4), False),
        (lambda x: x * (x.amax(1, keepdim=True) > 0), False),
        (lambda x: x * x.cumsum(1), False),
        (lambda x: x + x.new_ones(8, 1, 1), False),
        (lambda x: x * torch.zeros(1, 8, 1, 1, device=x.device), False),
        (lambda x: x * x[:, :1], False),
    ],
)
def test_channels_go_through_what_changes_each_entry_alone(how: Callable[[Tensor], Tensor], alone: bool) -> None:
    """A tensor made for all of the channels, or one channel used for all, would be wrong in train mode for those that stay."""
    x = torch.randn(2, 3, 4, 4)
    traced = trace(TrainsOtherwise(how), x, role="student")
    small = shrink(traced, ratio=0.5)
    assert (small.report.widths["first"] == (8, 4)) is alone
    assert small.value.graph_module.train()(x).shape == (2, 4, 4, 4)
