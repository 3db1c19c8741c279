"""What a forward keeps from one call to the next: the graph keeps it too, or the part that does stays whole, or the trace is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.errors import FrontendError
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.capture.trace import trace

KEPT: dict[str, type[nn.Module]] = {}
"""Modules whose graph keeps what they keep."""
WHOLE: dict[str, type[nn.Module]] = {}
"""Modules that stay one node, so that their own code keeps it."""


def module(found: dict[str, type[nn.Module]], **attributes: Callable[[], Any]) -> Callable[[Any], Any]:
    """A module with these attributes whose forward is the function below; a tensor called `buffer…` is a buffer."""

    def make(forward: Any) -> Any:
        class Keeps(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                for name, value in attributes.items():
                    if name.startswith("buffer"):
                        self.register_buffer(name, value())
                    else:
                        setattr(self, name, value())

        Keeps.forward = forward
        found[forward.__name__] = Keeps
        return forward

    return make


def over(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def zeros() -> Tensor:
    return torch.zeros(8)


def ones() -> Tensor:
    return torch.ones(8)


@module(KEPT, scale=ones)
def bound_anew(self, x):
    self.scale = self.scale * 1.5
    return x * over(self.scale)


@module(KEPT, scale=ones)
def bound_anew_after_it_was_read(self, x):
    y = x * over(self.scale)
    self.scale = self.scale * 1.5
    return y


@module(KEPT, scale=ones)
def written(self, x):
    self.scale *= 1.5
    return x * over(self.scale)


@module(KEPT, mean=zeros)
def running_mean(self, x):
    self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
    return x - over(self.mean)


@module(KEPT, mean=zeros)
def running_mean_in_place(self, x):
    self.mean.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
    return x - over(self.mean)


@module(KEPT, mean=zeros)
def running_mean_of_train_mode(self, x):
    if self.training:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
    return x - over(self.mean)


@module(KEPT, buffer=zeros)
def buffer_bound_anew(self, x):
    self.buffer = 0.9 * self.buffer + 0.1 * x.detach().mean((0, 2, 3))
    return x - over(self.buffer)


@module(KEPT, buffer=zeros)
def buffer_of_train_mode(self, x):
    if self.training:
        self.buffer = 0.9 * self.buffer + 0.1 * x.detach().mean((0, 2, 3))
    return x - over(self.buffer)


@module(KEPT, buffer=zeros)
def buffer_written(self, x):
    self.buffer.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
    return x - over(self.buffer)


@module(KEPT, a=ones, b=zeros)
def exchanged(self, x):
    self.a, self.b = self.b + 0.5, self.a
    return x * over(self.a) + over(self.b)


@module(WHOLE, count=int)
def counted(self, x):
    self.count += 1
    return x * self.count


@module(WHOLE, odd=bool)
def every_second_time(self, x):
    self.odd = not self.odd
    return x.flip(1) if self.odd else x


@module(WHOLE, history=list)
def listed(self, x):
    self.history.append(x.detach().mean((0, 2, 3)))
    return x - over(torch.stack(self.history).mean(0))


@module(WHOLE, memory=lambda: {"mean": zeros()})
def dictionary(self, x):
    self.memory["mean"] = 0.9 * self.memory["mean"] + 0.1 * x.detach().mean((0, 2, 3))
    return x - over(self.memory["mean"])


@module(WHOLE, memory=lambda: {"mean": zeros()})
def tensor_in_a_dictionary(self, x):
    self.memory["mean"].mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
    return x - over(self.memory["mean"])


@module(WHOLE, before=lambda: None)
def difference_to_the_last_batch(self, x):
    mean, before = x.detach().mean((0, 2, 3)), self.before
    self.before = mean
    return x if before is None else x - over(before)


@module(WHOLE, scale=lambda: None)
def scaled_as_the_first_batch(self, x):
    if self.scale is None:
        self.scale = x.detach().abs().amax((0, 2, 3))
    return x / over(self.scale)


@module(WHOLE, counts=lambda: np.zeros(3))
def numpy_array(self, x):
    self.counts += 1
    return x * float(self.counts[0])


@module(WHOLE, buffer=lambda: None)
def buffer_of_the_first_batch(self, x):
    if self.buffer is None:
        self.buffer = x.detach().abs().amax((0, 2, 3))
    return x / over(self.buffer)


class Meter:
    def __init__(self) -> None:
        self.calls = 0


@module(WHOLE, meter=Meter)
def object_of_ones_own(self, x):
    self.meter.calls += 1
    return x * self.meter.calls


class Net(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), inner, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.conv(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(rows, 3, 8, 8, generator=generator) for rows in (2, 3, 2, 4)]


@pytest.mark.parametrize("name", [*KEPT, *WHOLE])
@pytest.mark.parametrize("role", ["teacher", "student"])
@torch.no_grad()
def test_the_graph_computes_what_the_module_does_call_after_call(name, role):
    torch.manual_seed(0)
    net = Net({**KEPT, **WHOLE}[name]()).train(role == "student")
    reference, before = copy.deepcopy(net), digest(net)
    traced = trace(net, batches()[0], role=role)
    assert digest(net) == before
    assert traced.report.leaves == (("inner",) if name in WHOLE else ())
    for x in batches():
        torch.testing.assert_close(traced.graph_module(x), reference(x))
    if role == "teacher":
        fresh = Net({**KEPT, **WHOLE}[name]())
        fresh.load_state_dict(net.state_dict())
        torch.testing.assert_close(net(batches()[0]), fresh.eval()(batches()[0]))  # the caller's has kept nothing
    else:
        torch.testing.assert_close(net.eval()(batches()[0]), reference.eval()(batches()[0]))


@pytest.mark.parametrize("name", WHOLE)
def test_a_forward_that_keeps_what_no_graph_can_is_refused(name):
    inner = WHOLE[name]

    class Root(inner):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(self.conv(x).relu()).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(
        FrontendError, match=r"keeps `\w+` from one call to the next, which the graph does not"
    ) as found:
        trace(Root(), batches()[0])
    assert "register_buffer" in found.value.hint


@pytest.mark.parametrize("name", KEPT)
@torch.no_grad()
def test_what_is_kept_shrinks_with_its_channels(name):
    torch.manual_seed(0)
    traced = trace(Net(KEPT[name]()), batches()[0])
    small = ifx.shrink(traced, ratio=0.5).value
    assert small.facts_of("conv").shape[1] == 4
    for x in batches():
        small.graph_module(x)


@torch.no_grad()
def test_a_students_graph_keeps_what_eval_mode_alone_changes():
    class Adapts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mean = nn.Linear(4, 4), torch.zeros(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.linear(x)
            if not self.training:
                self.mean = 0.5 * self.mean + 0.5 * x.mean(0)
            return x - self.mean

    net = Adapts().train()
    reference = copy.deepcopy(net)
    graph = trace(net, torch.randn(2, 4), role="student").graph_module
    for training in (True, False, False, True):
        net.train(training), reference.train(training)
        x = torch.randn(3, 4)
        torch.testing.assert_close(graph(x), reference(x))
    torch.testing.assert_close(net.mean, reference.mean)


class Sets(nn.Module):
    """Leaves things for others to read, and makes a mask once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.mask = nn.Linear(4, 4), 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.tril(torch.ones(4, 4))
        self.calls += 1
        self.last = self.linear(x)
        return self.last @ self.mask  # type: ignore[no-any-return]


def test_what_the_outputs_do_not_depend_on_is_named():
    x = torch.randn(2, 4)
    (note,) = trace(Sets(), x).report.notes
    assert (
        note
        == "`calls`, `mask`, `last`: set by the forward, but not by the graph; over two calls the outputs did not depend on it"
    )
    net = Net(KEPT["running_mean"]())
    (note,) = trace(net, batches()[0]).report.notes
    assert note == "`inner.mean`: kept from call to call, but not in a buffer, so checkpoints do not hold it"


@torch.no_grad()
def test_a_teacher_that_writes_its_parameters_is_left_as_it_was():
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(1.5)
            return x * self.weight

    net, x = Grows(), torch.randn(2, 4)
    traced = trace(net, x)
    torch.testing.assert_close(traced.graph_module(x), x * 1.5)
    torch.testing.assert_close(traced.graph_module(x), x * 1.5**2)
    torch.testing.assert_close(net.weight, torch.ones(4))


def test_where_torch_lists_the_weights_of_recurrent_layers_is_nobodys_state():
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0][:, -1])  # type: ignore[no-any-return]

    assert trace(Recurrent(), torch.randn(2, 5, 4), role="student").report.notes == ()


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_stages_of_a_teacher_that_keeps_a_mean_leave_it_as_it_was(kind):
    """Narrowing compares its result with the whole teacher: that wrote the mean, and was called a mistake of ours."""

    class Centred(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, width, 3), nn.Conv2d(width, 3, 3)
            if kind == "buffer":
                self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
            else:
                self.mean = torch.full((1, 3, 1, 1), 0.5)

        def forward(self, x):
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 2, 3), keepdim=True).detach()
            return self.last(self.first(x - self.mean).relu())

    torch.manual_seed(0)
    teacher, student, x = Centred(8).eval(), Centred(4), torch.randn(2, 3, 8, 8)
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[("first", "first")])
    stages = ifx.compile_stages(teacher, student, plan, example_inputs=x, task="regression")
    assert stages[0].name == "first"
    for stage in stages:
        for _ in range(2):
            stage([x, torch.randn(2, 3, 4, 4)]).backward()
    assert torch.equal(teacher.mean, torch.full((1, 3, 1, 1), 0.5))
    assert ifx.shrink(ifx.trace(teacher, x), ratio=0.5).report.widths["first"] == (8, 4)


@torch.no_grad()
def test_a_network_with_filters_of_each_samples_own_keeps_its_writes():
    """They were taken out as dead code; the trace noticed, and refused the network."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.filters, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4 * 9), nn.Conv2d(4, 2, 1)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            y = self.conv(x)
            b, c, h, w = y.shape
            weight = self.filters(y.mean((2, 3))).view(b * c, 1, 3, 3)
            y = nn.functional.conv2d(y.reshape(1, b * c, h, w), weight, padding=1, groups=b * c).view(b, c, h, w)
            self.mean.mul_(0.9).add_(0.1 * y.mean((0, 2, 3)))
            return self.head(y)

    torch.manual_seed(0)
    model = Own().train()
    graph, plain = trace(copy.deepcopy(model), torch.randn(2, 3, 8, 8), role="student").graph_module, model
    for rows in (2, 3):
        x = torch.randn(rows, 3, 8, 8)
        torch.testing.assert_close(graph(x), plain(x))
    torch.testing.assert_close(dict(graph.named_buffers())["mean"], plain.mean)
