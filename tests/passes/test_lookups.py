"""Channels that are taken by constant places go with those they were; axes that are looked up elsewhere pass them on."""

from __future__ import annotations

import operator
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.channels import keys, lookups
from indistill_fx.passes.channels.call import read_call
from indistill_fx.passes.pruning.shrink import shrink
from tests.passes.test_more_networks import WIDTH, Maps, Way, halved, narrowed, traced

Op = Callable[[nn.Module, Tensor], Tensor]


class Places(nn.Module):
    """An operation on maps, with buffers."""

    def __init__(self, operation: Op, **buffers: Tensor):
        super().__init__()
        self.operation = operation
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, x)


def shuffled(groups: int) -> Tensor:
    return torch.arange(WIDTH).view(groups, -1).t().flatten()


def best_tokens(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    best = tokens.mean(-1).topk(16, 1).indices
    chosen = tokens.gather(1, best.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
    return chosen.transpose(1, 2).unflatten(2, (4, 4))


def one_token(m: nn.Module, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return tokens[torch.arange(x.shape[0]), tokens.sum(-1).argmax(-1)][:, :, None, None] + x


GOES: dict[str, Callable[[], nn.Module]] = {
    "buffer": lambda: Places(lambda m, x: x[:, m.order], order=torch.randperm(WIDTH)),
    "shuffle by places": lambda: Places(lambda m, x: x[:, m.order, 1:], order=shuffled(4)),
    "ellipsis": lambda: Places(lambda m, x: x[..., m.order, :, :], order=torch.randperm(WIDTH)),
    "new axis": lambda: Places(lambda m, x: x[:, None, m.order].squeeze(1), order=torch.randperm(WIDTH)),
    "negative": lambda: Places(lambda m, x: x[:, m.order], order=-1 - torch.randperm(WIDTH)),
    "index_select": lambda: Places(lambda m, x: x.index_select(1, m.order), order=torch.randperm(WIDTH)),
    "list": lambda: Places(lambda m, x: x[:, [*range(1, WIDTH), 0]]),
    "computed from constants": lambda: Places(lambda m, x: x[:, torch.arange(WIDTH - 1, -1, -1)]),
    "two halves": lambda: Places(
        lambda m, x: torch.cat([x[:, m.even], x[:, m.odd] * 2], 1),
        even=torch.arange(0, WIDTH, 2),
        odd=torch.arange(1, WIDTH, 2),
    ),
    "mask": lambda: Places(lambda m, x: torch.cat([x[:, m.mask], x[:, ~m.mask]], 1), mask=torch.arange(WIDTH) % 3 == 0),
    "places of space": lambda: Places(lambda m, x: x[..., m.at], at=torch.tensor([7, 0, 3])),
    "places of space, two axes": lambda: Places(lambda m, x: x[:, :, m.at, m.at][..., None], at=torch.arange(8)),
    "places of space, a grid": lambda: Places(lambda m, x: x[:, :, m.at[:, None], m.at], at=torch.arange(8)),
    "places apart": lambda: Places(lambda m, x: x[m.at[:1], :, m.at[:1]][:, :, None] + x, at=torch.arange(8)),
    "places behind a number": lambda: Places(
        lambda m, x: x[:1, :, 3:4][0][None, :, 0, m.at][..., None] + x, at=torch.arange(16)
    ),
    "places apart, a number between": lambda: Places(lambda m, x: x[0, :, x.mean((0, 1)).argmax(0)][None] + x),
    "a new axis before the places": lambda: Places(
        lambda m, x: x.movedim(1, -1).flatten(0, 2)[None, x.mean(1).flatten().argsort()].mean(1)[..., None, None] + x
    ),
    "a new axis behind the places": lambda: Places(
        lambda m, x: x.movedim(1, -1).flatten(0, 2)[x.mean(1).flatten().argsort(), None].mean((0, 1))[:, None, None] + x
    ),
    "places of a mask": lambda: Places(
        lambda m, x: x.movedim(1, -1)[x.mean(1) > -9.0].reshape(x.shape[0], 16, 16, WIDTH).movedim(-1, 1)
    ),
    "rows of a mask": lambda: Places(lambda m, x: x[x.mean((1, 2, 3)) > -9.0, :, 1:]),
    "size of what is taken": lambda: Places(lambda m, x: x * x[:, -1, :].size(1) + x[:, :, 0].size(2)),
    "one token": lambda: Places(one_token),
    "best tokens": lambda: Places(best_tokens),
    "take_along_dim": lambda: Places(lambda m, x: torch.take_along_dim(x, x.mean(1, keepdim=True).argsort(2), 2)),
    "gather by their own order": lambda: Places(lambda m, x: x.gather(3, x.argsort(3))),
    "scatter": lambda: Places(lambda m, x: x.scatter(2, x.argsort(2), x * 2)),
    "index_add": lambda: Places(lambda m, x: x.index_add(2, m.at, x[:, :, :3] * 2), at=torch.tensor([0, 0, 1])),
    "index_copy": lambda: Places(lambda m, x: torch.zeros_like(x).index_copy(-1, m.at, x), at=torch.arange(15, -1, -1)),
    "filter for all channels": lambda: Places(
        lambda m, x: F.conv2d(x, m.f.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]), f=torch.rand(1, 1, 3, 3)
    ),
    "filter repeated": lambda: Places(
        lambda m, x: F.conv2d(x, m.f.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]), f=torch.rand(1, 1, 3, 3)
    ),
    "patches of a channel": lambda: Way(
        lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], WIDTH, 9, *x.shape[2:]).amax(2)
    ),
    "maxout": lambda: Way(lambda x: torch.cat([x, x], 1).view(x.shape[0], WIDTH, 2, *x.shape[2:]).max(2)[0]),
}


@pytest.mark.parametrize("name", GOES)
def test_goes_with_what_it_was(name: str) -> None:
    model, x = traced(lambda: Maps(GOES[name]()))
    narrowed(model, x)
    report = halved(model, x)
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    assert report.widths["a"] == (WIDTH, WIDTH // 2)


class TwoHeads(nn.Module):
    """Queries, keys and values of two heads, made by one layer and taken apart: more parts than heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.leave = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        parts = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = (q @ k.transpose(-2, -1) / 3).softmax(-1) @ v
        return self.leave(mixed.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)  # type: ignore[no-any-return]


def test_heads_go_also_where_there_are_more_parts_than_heads() -> None:
    model, x = traced(lambda: Maps(TwoHeads()))
    report = halved(model, x)
    assert [frozen.reason for frozen in report.frozen] == ["an output of the network"]
    assert report.widths["inner.qkv"] == (3 * WIDTH, 3 * WIDTH // 2)


STAYS: dict[str, Callable[[], nn.Module]] = {
    "places that are drawn": lambda: Places(
        lambda m, x: x[:, torch.randperm(WIDTH, device=x.device)].mean(1, keepdim=True) * x
    ),
    "places that are computed": lambda: Places(lambda m, x: x[:, x.mean((0, 2, 3)).argsort()]),
    "gather along the channels": lambda: Places(lambda m, x: x.gather(1, x.argsort(1))),
    "places and a number": lambda: Places(lambda m, x: x[:, m.order, 0][:, :, None] + x, order=torch.randperm(WIDTH)),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays_where_the_places_are_not_constant(name: str) -> None:
    model, x = traced(lambda: Maps(STAYS[name]()))
    if name != "places that are drawn":  # two runs draw different ones
        narrowed(model, x)
        halved(model, x)
    assert shrink(model, ratio=0.5).report.widths["a"] == (WIDTH, WIDTH)


class Turning(nn.Module):
    """Its order of channels is another one at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.order.copy_(self.order.roll(1))
        return x[:, self.order]


def test_an_order_that_the_forward_writes_is_not_constant() -> None:
    model, _ = traced(lambda: Maps(Turning()))
    assert shrink(model, ratio=0.5).report.widths["a"] == (WIDTH, WIDTH)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(-WIDTH, WIDTH - 1), min_size=2, max_size=2 * WIDTH),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["tensor", "list", "index_select"]),
    st.booleans(),
)
def test_any_places_of_any_axis(chosen: list[int], axis: int, how: str, negative: bool) -> None:
    """Repeated, in any order, from either end."""
    at = [k if negative or how == "index_select" else k % WIDTH for k in chosen]
    at = [k % WIDTH for k in at] if how == "index_select" else at

    def take(m: nn.Module, x: Tensor) -> Tensor:
        if how == "index_select":
            return x.index_select(axis - 4 if negative else axis, m.at)
        return x[(slice(None),) * axis + ((at if how == "list" else m.at),)]

    net = nn.Sequential(
        nn.Conv2d(3, WIDTH, 1), Places(take, at=torch.tensor(at)), nn.Conv2d(len(at) if axis == 1 else WIDTH, 4, 1)
    )
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model = trace(net.double().eval(), x)
    narrowed(model, x)
    report = halved(model, x)
    assert len(report.layers[0].kept) < WIDTH or len({k % WIDTH for k in at}) < 2


def test_the_comparison_sees_places_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A control of the checks above: the order is taken for the channels' own."""
    right = keys._places
    monkeypatch.setattr(keys, "_places", lambda *given: tuple(sorted(right(*given) or ())))
    with pytest.raises(Exception, match="off by"):
        shrink(traced(lambda: Maps(GOES["buffer"]()))[0], ratio=0.5)


SIZES = (5, 7, 11)
PLACES = {
    "single": torch.tensor(1),
    "places": torch.tensor([1, 0, 3]),
    "grid": torch.tensor([[1, 0, 3], [2, 2, 4]]),
    "mask": torch.arange(5) > 1,
    "mask of two": torch.arange(35).view(5, 7) > 31,
}
PLAIN = {":": slice(None), "1:": slice(1, None), "None": None, "0": 0, "...": ...}


@given(st.lists(st.sampled_from([*PLACES, *PLAIN]), min_size=1, max_size=5).filter(lambda key: key.count("...") < 2))
@settings(max_examples=400, deadline=None)
def test_where_the_axes_of_a_lookup_come_from(entries: list[str]) -> None:
    """Against torch, on tensors whose entries are their own places along one axis."""
    coordinates = [
        torch.arange(size).view([-1 if k == axis else 1 for k in range(3)]).expand(SIZES)
        for axis, size in enumerate(SIZES)
    ]
    try:
        results = [places[tuple({**PLACES, **PLAIN}[entry] for entry in entries)] for places in coordinates]
    except IndexError:  # too many entries, or masks and places of sizes that do not go together
        return
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name.replace(" ", "_")) for name in ("x", *PLACES)}
    node = graph.call_function(operator.getitem, (nodes["x"], tuple({**nodes, **PLAIN}[entry] for entry in entries)))
    held = {"x": coordinates[0], **PLACES}
    facts = {
        nodes[name].name: SimpleNamespace(shape=tuple(value.shape), dtype=value.dtype) for name, value in held.items()
    }
    axes = lookups._axes_of_lookup(read_call(node, facts))  # type: ignore[arg-type]
    assert axes is not None and len(axes) == results[0].dim()
    for place, (axis, whole) in enumerate(axes):
        if axis is None:
            assert results[0].shape[place] == 1 if whole else True
            continue
        found = results[axis].movedim(place, -1)
        expected = torch.arange(SIZES[axis])[0 if whole else 1 :]
        assert torch.equal(found, expected.expand(found.shape))
