"""What stands around a network's operations: autocast, activation checkpoints, `out=`, flags of its layers. Right, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from indistill_fx.errors import FrontendError
from indistill_fx.passes.capture.trace import trace


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.drop = nn.Dropout(0.5)
        self.bound = nn.Parameter(2 * torch.randn(8))
        self.register_buffer("mean", torch.zeros(8))

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()  # type: ignore[no-any-return]


class FlagOfADropout(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.features(x).mean((2, 3)), self.drop.p, self.drop.training))  # type: ignore[no-any-return]


class FlagOfANorm(Body):
    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        x = F.batch_norm(self.conv(x), n.running_mean, n.running_var, n.weight, n.bias, n.training, 0.1, n.eps)
        return self.head(x.relu().mean((2, 3)))  # type: ignore[no-any-return]


class Checkpointed(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.features, x, use_reentrant=False).mean((2, 3)))  # type: ignore[no-any-return]


class CheckpointedBySize(Body):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = checkpoint(self.features, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Reentrant(Body):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 4:
            x = checkpoint(self.features, x.detach().requires_grad_(), use_reentrant=True)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class MeanIntoBuffer(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.training:
            with torch.no_grad():
                torch.mul(self.mean, 0.9, out=self.mean)
                torch.add(self.mean, x.mean((0, 2, 3)), alpha=0.1, out=self.mean)
        return self.head(x.mean((2, 3)) - self.mean)  # type: ignore[no-any-return]


class ClampedParameter(Body):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.clamp(self.bound, -1, 1, out=self.bound)
        return self.head(self.features(x).mean((2, 3)) * self.bound)  # type: ignore[no-any-return]


class Reused(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        room = torch.empty_like(x)
        with torch.no_grad():
            first = torch.tanh(x, out=room) + 1
            torch.sigmoid(x, out=room)
        return self.head(x * room + first)  # type: ignore[no-any-return]


def plain(function: Callable[..., Tensor], *args: Tensor, use_reentrant: bool) -> Tensor:
    return function(*args)


def _step(call: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(7)
    output: Tensor = call(x)
    output.square().sum().backward()
    return output.detach()


@pytest.mark.parametrize(
    "make",
    [
        FlagOfADropout,
        FlagOfANorm,
        Checkpointed,
        CheckpointedBySize,
        Reentrant,
        MeanIntoBuffer,
        ClampedParameter,
        Reused,
    ],
)
def test_a_students_graph_does_the_same_in_both_modes(make: Callable[[], nn.Module], monkeypatch) -> None:
    module, x = make(), torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(module)
    graph = trace(module, x, role="student").graph_module
    # torch runs a checkpointed batch norm twice, and counts its batch twice; a graph runs it once
    monkeypatch.setitem(globals(), "checkpoint", plain)
    for training in (True, False, True):
        graph.train(training)
        twin.train(training)
        batch = torch.randn(3, 3, 8, 8)
        assert torch.allclose(_step(graph, batch), _step(twin, batch), atol=1e-6)
        for (name, own), (_, other) in zip(module.named_parameters(), twin.named_parameters(), strict=True):
            assert torch.allclose(own, other, atol=1e-6), name
            gradients = [torch.zeros(()) if p.grad is None else p.grad for p in (own, other)]
            assert torch.allclose(*gradients, atol=1e-5), name
        for (name, own), (_, other) in zip(module.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.allclose(own, other, atol=1e-6), name


@pytest.mark.parametrize("make", [MeanIntoBuffer, ClampedParameter, Reused])
def test_a_teachers_graph_runs_with_gradients_on(make: Callable[[], nn.Module]) -> None:
    module, x = make().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(module, x).graph_module
    assert graph(x).requires_grad
    assert torch.allclose(graph(x), copy.deepcopy(module)(x), atol=1e-6)


class Low(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.conv(x)
        return x.float()


class Decorated(Body):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


class Around(Body):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.parts(x)
        return self.head(x.float().mean((2, 3)))  # type: ignore[no-any-return]


class Within(Body):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.low = nn.Conv2d(8, 8, 5, padding=2), Low()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.low(self.wide(self.features(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Off(Body):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        with torch.autocast("cpu", enabled=False):
            x = x.float().mean((2, 3))
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "line"), [(Around, 'torch.autocast("cpu", dtype=torch.bfloat16)'), (Decorated, "`Decorated.forward`")]
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_autocast_is_refused_with_its_line(make: Callable[[], nn.Module], line: str, role) -> None:
    with pytest.raises(FrontendError, match=r"switches autocast on at test_code_around\.py:\d+") as raised:
        trace(make(), torch.randn(2, 3, 8, 8), role=role)
    assert line in raised.value.message
    assert "submodule of its own" in str(raised.value.hint) and "--precision" in str(raised.value.hint)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_part_with_autocast_stays_one_node(role) -> None:
    model = trace(Within(), torch.randn(2, 3, 8, 8), role=role)
    assert model.report.leaves == ("low",)


def test_autocast_switched_off_is_reported() -> None:
    (note,) = trace(Off(), torch.randn(2, 3, 8, 8)).report.notes
    assert note.startswith("test_code_around.py:") and "switches autocast off" in note
