"""State that is shared, hidden, or cannot be copied: the graph computes what the module does call after call, or the trace is refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace
from tests.passes.test_state import Net, batches, over


class Views(nn.Module):
    """Writes one buffer and reads another of the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.ones(8))
        self.register_buffer("part", self.whole[:4])

    def forward(self, x: Tensor) -> Tensor:
        self.part.mul_(1.5)
        return x * over(self.whole)


class Expanded(nn.Module):
    """Writes the one number of which a buffer has eight."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.ones(1))
        self.register_buffer("wide", self.one.expand(8))

    def forward(self, x: Tensor) -> Tensor:
        self.one.mul_(1.5)
        return x * over(self.wide)


class InAList(nn.Module):
    """Writes a buffer that stands in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(8))
        self.all, self.calls = [self.scale], 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.all[0].mul_(1.5)
        self.all.append(None)
        del self.all[1:]
        return x * over(self.scale) * self.calls


class InATuple(nn.Module):
    """Writes a tensor that stands in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = torch.ones(8), 2

    def forward(self, x: Tensor) -> Tensor:
        self.pair[0].mul_(1.5)
        return x * over(self.pair[0])


class Exchanged(nn.Module):
    """Calls two submodules in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x)
        self.a, self.b = self.b, self.a
        return y


class OwnNoise(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x: Tensor) -> Tensor:
        return x + over(torch.rand(8, generator=self.generator))


class WritesItsWeight(nn.Module):
    """Changes its parameter after it has read it, so that the first call shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        y = x * over(self.weight)
        self.weight.data = self.weight.data * 1.5
        return y


class ScalesItsWeight(nn.Module):
    """Writes its parameter without gradients, through a view too, and reads it with them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = self.weight.mul_(1.5).clamp_(max=3.0)
            self.weight[0].mul_(0.5)
        return x * over(weight)


def with_own_generator(net: nn.Module) -> nn.Module:
    new = copy.deepcopy(net)
    for part in new.modules():
        if isinstance(part, OwnNoise):
            part.generator = torch.Generator().manual_seed(1)
    return new


@pytest.mark.parametrize(
    "kind", [Views, Expanded, InAList, InATuple, Exchanged, OwnNoise, WritesItsWeight, ScalesItsWeight]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
@torch.no_grad()
def test_the_graph_computes_what_the_module_does_call_after_call(kind: Callable[[], nn.Module], role: str) -> None:
    torch.manual_seed(0)
    net = Net(kind()).train(role == "student")
    reference, untouched, before = with_own_generator(net), with_own_generator(net), digest(net)
    traced = trace(net, batches()[0], role=role)  # type: ignore[arg-type]
    assert digest(net) == before
    assert not any("in eval mode the graph still computes" in note for note in traced.report.notes)
    for x in batches():
        torch.testing.assert_close(traced.graph_module(x), reference(x))
    if role == "teacher":  # nothing of that has reached the caller's module
        for x in batches():
            torch.testing.assert_close(net(x), untouched(x))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_graph_that_writes_its_parameters_has_the_modules_gradients(role: str) -> None:
    torch.manual_seed(0)
    net = Net(ScalesItsWeight()).train(role == "student")
    reference, x = copy.deepcopy(net), batches()[0]
    traced = trace(net, x, role=role)  # type: ignore[arg-type]
    weights = [dict(model.named_parameters())["inner.weight"] for model in (traced.graph_module, reference)]
    for model in (traced.graph_module, reference):
        model(x).square().sum().backward()
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


class Locked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": 0, "lock": threading.Lock()}

    def forward(self, x: Tensor) -> Tensor:
        self.state["calls"] += 1
        return x * self.state["calls"]


def test_what_a_teachers_graph_cannot_have_a_copy_of_is_named() -> None:
    with pytest.raises(FrontendError, match=r"changes `inner.state`, of which the teacher's graph needs a copy"):
        trace(Net(Locked()), batches()[0])


class Stash(nn.Module):
    """Leaves its features for others to read, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(8, 8, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.last, self.calls = self.conv(x), self.calls + 1
        return self.last * self.calls


def test_features_left_by_an_earlier_call_are_not_written() -> None:
    net = Net(Stash()).train()
    net(torch.randn(2, 3, 8, 8))
    last, history = net.inner.last, net.inner.last.grad_fn
    traced = trace(net, batches()[0], role="student")
    assert traced.report.leaves == ("inner",)
    assert net.inner.last is last and last.grad_fn is history
