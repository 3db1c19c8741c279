"""Source code of networks that return named tuples and dataclasses, and of frozen parts of attention."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from indistill_fx.compression.write_source import source_of
from indistill_fx.errors import ExportError, FrontendError
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink

Pair = namedtuple("Pair", "logits hidden")


class Block(NamedTuple):
    """Has the name that a part of the network would get."""

    logits: Tensor
    hidden: Tensor | None = None


@dataclasses.dataclass
class Record:
    logits: Tensor
    parts: tuple[Tensor, ...] = ()
    scale: float = 0.5


@dataclasses.dataclass(kw_only=True, frozen=True)
class ByKeyword:
    scale: int = 2
    logits: Tensor


@dataclasses.dataclass
class Checked:
    logits: Tensor

    def __post_init__(self) -> None:
        assert self.logits is not None


@dataclasses.dataclass
class WithMethod:
    logits: Tensor

    def probabilities(self) -> Tensor:
        return self.logits.softmax(-1)


class WithProperty(NamedTuple):
    logits: Tensor

    @property
    def classes(self) -> Tensor:
        return self.logits.argmax(-1)


class Returns(nn.Module):
    def __init__(self, how: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.how = nn.Conv2d(3, 8, 3), how
        self.block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.how(self.block(h.mean((2, 3))), h)


WAYS: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "namedtuple": (Pair, "class Pair(NamedTuple):\n    logits: Any\n    hidden: Any\n"),
    "NamedTuple": (Block, "class Block(NamedTuple):\n    logits: Any\n    hidden: Any = None\n"),
    "NamedTuple with a default": (lambda y, _: Block(y), "class Block(NamedTuple):\n    logits: Any\n    hidden: Any"),
    "dataclass": (
        lambda y, h: Record(y, (h,)),
        "@dataclass\nclass Record:\n    logits: Any\n    parts: Any = ()\n    scale: Any = 0.5\n",
    ),
    "dataclass by keyword": (
        lambda y, _: ByKeyword(logits=y, scale=3),
        "@dataclass(kw_only=True)\nclass ByKeyword:\n    scale: Any = 2\n    logits: Any\n",
    ),
}


@pytest.mark.parametrize("ratio", [None, 0.5])
@pytest.mark.parametrize("name", WAYS)
@torch.no_grad()
def test_records_are_written(name: str, ratio: float | None) -> None:
    how, text = WAYS[name]
    model, x = trace(Returns(how), torch.randn(2, 3, 8, 8)), torch.randn(3, 3, 12, 8)
    model = model if ratio is None else shrink(model, ratio=ratio).value
    source = source_of(model)
    assert text in source.text
    expected, got = model.graph_module(x), source.build().eval()(x)
    assert type(got).__name__ == type(expected).__name__
    assert torch.equal(got.logits, expected.logits)
    fields = getattr(expected, "_asdict", lambda: vars(expected))()
    assert fields.keys() == getattr(got, "_asdict", lambda: vars(got))().keys()


@pytest.mark.parametrize("kind", [Checked, WithMethod, WithProperty])
def test_a_record_that_does_more_is_refused(kind: Callable[[Tensor], Any]) -> None:
    """Its code would be left out."""
    with pytest.raises(ExportError, match=f"it calls `{kind.__name__}`"):
        source_of(trace(Returns(lambda y, _: kind(y)), torch.randn(2, 3, 8, 8)))


@dataclasses.dataclass
class Halved:
    logits: Tensor

    def __post_init__(self) -> None:
        self.logits = self.logits / 2


@dataclasses.dataclass
class WithMore:
    logits: Tensor
    mask: Tensor | None = None
    factor: float | None = 2.0
    scores: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.scores = self.logits.softmax(-1)


def test_a_record_that_changes_its_fields_is_refused_by_name() -> None:
    with pytest.raises(
        FrontendError, match=r"`Halved.__post_init__` changes the fields that it is given.* Compute them in forward"
    ):
        trace(Returns(lambda y, _: Halved(y)), torch.randn(2, 3, 8, 8))


def test_a_record_may_compute_further_fields() -> None:
    x = torch.randn(3, 3, 12, 8)
    net = Returns(lambda y, _: WithMore(y, factor=None)).eval()
    model = trace(net, torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        got, expected = model.graph_module(x), net(x)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.scores, expected.scores)
    assert (got.mask, got.factor) == (None, None)
    small = shrink(model, ratio=0.5).value
    with torch.no_grad():
        halved = small.graph_module(x)
    assert torch.equal(halved.scores, halved.logits.softmax(-1))


@pytest.mark.parametrize("name", WAYS)
def test_channels_in_a_record_stay_because_they_are_returned(name: str) -> None:
    """As those in a tuple or dict."""
    model = trace(Returns(WAYS[name][0]), torch.randn(2, 3, 8, 8))
    assert {frozen.reason for frozen in shrink(model, ratio=0.5).report.frozen} == {"an output of the network"}


def test_channels_in_a_record_in_a_record() -> None:
    model = trace(Returns(lambda y, h: Record(y, (Pair(h, h),))), torch.randn(2, 3, 8, 8))
    assert [(frozen.channels, frozen.reason) for frozen in shrink(model, ratio=0.5).report.frozen] == [
        (13, "an output of the network")
    ]


class Attending(nn.Module):
    def __init__(self, frozen: str, **settings: Any) -> None:
        super().__init__()
        self.embed, self.fc = nn.Linear(3, 8), nn.Linear(8, 5)
        self.width = settings.get("kdim", 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)
        for name, parameter in self.attention.named_parameters():
            parameter.requires_grad_(name != frozen)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).mT)
        return self.fc(self.attention(x, x[..., : self.width], x)[0].mean(1))  # type: ignore[no-any-return]


FLAGS = [
    ("in_proj_weight", {}, {"query.weight", "key.weight", "value.weight"}),
    ("in_proj_bias", {}, {"query.bias", "key.bias", "value.bias"}),
    ("k_proj_weight", {"kdim": 6}, {"key.weight"}),
]


@pytest.mark.parametrize(("frozen", "settings", "parts"), FLAGS)
def test_frozen_parts_of_attention(frozen: str, settings: dict[str, Any], parts: set[str]) -> None:
    model = trace(Attending(frozen, **settings), torch.randn(2, 3, 8, 8), role="student")
    source_of(model)
    small = shrink(model, ratio=0.5).value
    source_of(small)
    flags = {name.removeprefix("attention."): p.requires_grad for name, p in small.graph_module.named_parameters()}
    assert {name for name, trained in flags.items() if not trained} == parts
