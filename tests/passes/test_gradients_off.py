"""Parts of a forward that run without gradients: the student's graph has the module's own gradients, step after step, in both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.gate = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.tensor(0))


class RunningMean(Body):
    """Keeps a mean of its features in a buffer, while it trains."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(y.mean((0, 2, 3)), alpha=0.1)
                self.calls += 1
        return self.head((y - self.mean.view(1, -1, 1, 1)).mean((2, 3)))  # type: ignore[no-any-return]


class FrozenStem(Body):
    """Trains the head alone."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm(self.conv(x)).relu()
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


class FrozenGate(Body):
    """Weights its features by what has no gradients."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu()
        with torch.no_grad():
            gate = self.gate(y.mean((2, 3))).sigmoid()
        y = y * gate[:, :, None, None]
        return self.head((y * 0.5 + y.detach()).mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [RunningMean, FrozenStem, FrozenGate])
def test_a_students_graph_has_the_modules_gradients_and_buffers(kind: Callable[[], nn.Module]) -> None:
    net = kind().double().train()
    reference, before = copy.deepcopy(net), digest(net)
    graph = trace(net, torch.randn(2, 3, 8, 8, dtype=torch.float64), role="student").graph_module
    assert digest(net) == before
    for training in (True, True, False):
        x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
        for called, own in ((graph, net), (reference, reference)):
            own.train(training).zero_grad()
            called(x).square().sum().backward()
        for (name, own), expected in zip(net.named_parameters(), reference.parameters(), strict=True):
            assert (own.grad is None) == (expected.grad is None), (name, training)
            if own.grad is not None:
                torch.testing.assert_close(own.grad, expected.grad)
        for own, expected in zip(net.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(own, expected)
