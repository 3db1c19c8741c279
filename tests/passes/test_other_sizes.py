"""A narrowed network computes the kept channels for batches and pictures of other sizes than the example's, too."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.errors import PassError
from indistill_fx.graph.interpret import run_keeping
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.channels import layout
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.passes.pruning.verified import verify_smaller


def reversed_rows(y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.reshape(b, c, 2, h // 2, w).flip(2).reshape(b, c, h, w)


def windows(y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    z = y.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    z = z + z.mean(1, keepdim=True)
    return z.view(b, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def tokens(y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.flatten(2).transpose(1, 2).softmax(1).mT.view(b, c, h, w)


def sides(y: Tensor) -> Tensor:
    _, _, h, w = y.shape
    rows, columns = torch.cat([y.mean(3, keepdim=True), y.mean(2, keepdim=True).mT], 2).split([h, w], 2)
    return y * rows.sigmoid() * columns.mT.sigmoid()


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "chunk": lambda y: torch.cat(y.chunk(2, 2)[::-1], 2),
    "split": lambda y: torch.cat(y.split(y.shape[2] // 2, 2)[::-1], 2),
    "tensor_split": lambda y: torch.cat(y.tensor_split(2, 2)[::-1], 2),
    "split in unequal parts": lambda y: torch.cat(y.split([y.shape[2] // 4, y.shape[2] - y.shape[2] // 4], 2), 2),
    "every second row": lambda y: y[:, :, ::2] + y[..., 1::2, :],
    "all rows but one": lambda y: y[:, :, :-1] + y[:, :, 1:],
    "unflatten": lambda y: y.unflatten(2, (2, -1)).flip(2).flatten(2, 3),
    "squeeze": lambda y: y.mean(2, keepdim=True).squeeze(2).unsqueeze(3),
    "reshape": reversed_rows,
    "windows": windows,
    "tokens": tokens,
    "sides": sides,
    "pad": lambda y: F.pad(y, (0, y.shape[3] % 3, 0, 0)),
    "zeros of a size": lambda y: y.tanh() + torch.zeros(y.size(), dtype=y.dtype),
    "new ones of a shape": lambda y: y.tanh() + y.new_ones(y.shape),
    "a value of a shape": lambda y: y.tanh() * torch.full(y.shape, 0.3, dtype=y.dtype),
    "a new value of a size": lambda y: y.tanh() * y.new_full(y.size(), 0.3),
    "data": lambda y: y + y.data.relu().flatten(2).view(y.data.size()),
    "repeat": lambda y: y + y.mean(2, keepdim=True).repeat(1, 1, y.shape[2], 1),
}


class Middle(nn.Module):
    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(self.conv(self.stem(x).relu())).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OPERATIONS)
@torch.no_grad()
def test_all_taps_at_other_sizes(name: str) -> None:
    net = Middle(OPERATIONS[name]).double().eval()
    model = trace(net, torch.randn(2, 3, 16, 16, dtype=torch.float64))
    known = {names[0]: model.facts[node] for node, names in model.aliases.items() if node in model.facts}
    taps = [tap for tap, own in known.items() if own.channel_axis and model.node(tap).op != "placeholder"]
    kept = {tap: range(0, known[tap].channels, 2) for tap in taps}
    smaller, shrunk = narrow(model, kept=kept).value, shrink(model, ratio=0.5).value
    assert shrunk.facts_of("conv").shape[1] == 3
    for size in ((3, 3, 24, 32), (1, 3, 8, 12)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(model.graph_module(x), net(x))
        _, whole = run_keeping(model.graph_module, [model.node(tap).name for tap in taps], x)
        got, _ = cut(smaller, taps).value(x)
        for tap in taps:
            expected = whole[model.node(tap).name].index_select(known[tap].channel_axis or 0, torch.tensor(kept[tap]))
            torch.testing.assert_close(got[tap], expected)
        assert shrunk.graph_module(x).shape == net(x).shape


@pytest.mark.parametrize("form", [lambda x: x.mT, lambda x: x.transpose(1, 2), lambda x: x.mH])
def test_the_channels_of_a_transposed_tensor(form: Callable[[Tensor], Tensor]) -> None:
    model = trace(Middle(lambda y: form(form(y.flatten(2)).softmax(1)).unflatten(2, (8, 8))), torch.randn(2, 3, 8, 8))
    axes = [known.channel_axis for known in model.facts.values() if known.shape in ((2, 6, 64), (2, 64, 6))]
    assert axes == [1, 2, 2, 1]


def test_sizes_are_read_from_what_was_narrowed() -> None:
    model = trace(Middle(windows).eval(), torch.randn(2, 3, 16, 16))
    graph_module = cut(narrow(model, kept={":relu_1": [0, 2, 4]}).value, [":relu_1"]).value
    widths = {m.out_channels for m in graph_module.modules() if isinstance(m, nn.Conv2d)}
    assert widths == {8, 3}  # the whole tensor is not computed for the sake of its shape


def test_a_fault_at_other_sizes_alone_is_found() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).sum((2, 3)) / 900)

    model = trace(Pooled(), (torch.randn(2, 3, 32, 32),))
    small = shrink(model, ratio=0.5)
    verify_smaller(model, small.value.graph_module, small.report.axes)
    division = next(n for n in small.value.graph_module.graph.nodes if n.target is operator.truediv)
    total, spoiled = division.args[0], small.value.graph_module.graph
    with spoiled.inserting_before(division):
        height = spoiled.call_method("size", (total.args[0], 2))
        division.update_arg(0, spoiled.call_function(operator.mul, (total, height)))
        division.update_arg(1, 900 * 30)
    small.value.graph_module.recompile()
    with pytest.raises(PassError, match="is off by"):
        verify_smaller(model, small.value.graph_module, small.report.axes)


@pytest.mark.parametrize("size", [4, 48])
def test_a_narrowed_network_is_compared_at_another_size_than_the_example(size: int, monkeypatch) -> None:
    """A control: the example's size is written into the narrowed network."""

    def baked(out, call, new, span, made):
        return list(call.output_shape[: made[0]]), list(call.output_shape[made[1] :])

    monkeypatch.setattr(layout, "free_sizes", baked)
    model = trace(Middle(windows).eval(), torch.randn(2, 3, size, size))
    with pytest.raises(PassError, match="narrowed network") as error:
        narrow(model, kept={":relu_1": [0, 2, 4]})
    assert error.value.where == "narrow"


def test_what_a_forward_leaves_behind_does_not_reach_the_narrowed_network() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.conv(x) * self.calls  # type: ignore[no-any-return]

    model = trace(Counting(), torch.randn(2, 3, 8, 8))
    assert narrow(model, kept={":mul": [1, 5]}).report.kept == {":mul": (1, 5)}
    assert model.graph_module.calls == 0
