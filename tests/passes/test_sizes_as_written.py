"""Shrunk and narrowed networks keep sizes and slices as the code writes them: right at other sizes than the example's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from tests import nets
from tests.nets import number_or_none
from tests.numerics.masked_reference import run_masked

Forward = Callable[[Any, Tensor], Tensor]


def traced(forward: Forward, shape: tuple[int, ...], **parts: nn.Module) -> ifx.TracedModel:
    """A network with these parts and this forward, in float64."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, x)

    torch.manual_seed(0)
    for part in parts.values():
        for parameter in part.parameters():
            nn.init.normal_(parameter, std=0.5)
    return ifx.trace(Net().double().eval(), torch.randn(*shape, dtype=torch.float64))


def conv(before: int = 3, after: int = 16, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2)


def permuted_rows(net: Any, x: Tensor) -> Tensor:
    """Rows of a map without channels are taken by twos, and changed in their order."""
    y = net.a(x)
    mean = y.mean(1)
    b, h, w = mean.shape
    order = mean.view(b, h // 2, 2, w).transpose(1, 2).reshape(b, h, w)
    weight = (order * torch.arange(1, h + 1)[:, None]).mean((1, 2))
    return net.d(y * weight.view(-1, 1, 1, 1))  # type: ignore[no-any-return]


def exchanged(net: Any, x: Tensor) -> Tensor:
    """A shuffle of channels in two groups."""
    y = net.a(x)
    b, c, h, w = y.shape
    return net.d(y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))  # type: ignore[no-any-return]


MAPS = {"a": conv(), "d": conv(8, 3, 1)}
SLICED: dict[str, tuple[Forward, dict[str, nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "channels and rows": (lambda s, x: s.d(s.a(x)[:, :8, 1:]), MAPS, (2, 3, 8, 8), (3, 3, 12, 10)),
    "channels and steps": (lambda s, x: s.d(s.a(x)[:, 8:, ::2, ::2]), MAPS, (2, 3, 8, 8), (3, 3, 12, 16)),
    "channels and all but the last": (lambda s, x: s.d(s.a(x)[:, 8:, :-1, 2:-2]), MAPS, (2, 3, 8, 8), (3, 3, 12, 16)),
    "tokens and channels": (
        lambda s, x: s.d(s.a(x)[:, 1:, :8]), {"a": nn.Linear(12, 16), "d": nn.Linear(8, 3)}, (2, 6, 12), (3, 9, 12),
    ),
    "batch and channels": (
        lambda s, x: s.d(s.a(x)[1:, :, :8]), {"a": nn.Linear(12, 16), "d": nn.Linear(8, 3)}, (2, 6, 12), (4, 7, 12),
    ),
    "narrowed rows": (
        lambda s, x: s.d(s.a(x).narrow(2, 2, 3)[:, 8:]), MAPS, (2, 3, 8, 8), (3, 3, 12, 10),
    ),
    "permuted rows": (permuted_rows, {"a": conv(), "d": conv(16, 3, 1)}, (2, 3, 8, 8), (3, 3, 16, 10)),
    "shuffled channels": (exchanged, {"a": conv(), "d": conv(16, 3, 1)}, (2, 3, 8, 8), (3, 3, 16, 10)),
}  # fmt: skip


@pytest.mark.parametrize("name", SLICED)
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_a_shrunk_network_at_another_size(name: str, ratio: float) -> None:
    forward, parts, shape, other = SLICED[name]
    model = traced(forward, shape, **parts)
    result = ifx.shrink(model, ratio=ratio)
    assert result.report.widths["a"][1] < 16
    for size in (shape, other):
        x = torch.randn(*size, dtype=torch.float64)
        with torch.no_grad():
            got, wanted = result.value.graph_module(x), run_masked(model, result.report, x)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def windows(net: Any, x: Tensor) -> Tensor:
    """Windows of 4 by 4, and back (Swin)."""
    x = net.a(x).permute(0, 2, 3, 1)
    b, h, w, c = x.shape
    z = net.p(x.view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c))
    return net.d(z.view(-1, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c))  # type: ignore[no-any-return]


def last(net: Any, x: Tensor) -> Tensor:
    return net.a(x).permute(0, 2, 3, 1)  # type: ignore[no-any-return]


def by_rows(net: Any, x: Tensor) -> Tensor:
    y = last(net, x)
    _, h, w, c = y.shape
    return net.d(net.p(y.reshape(-1, c)).view(-1, h, w, c))  # type: ignore[no-any-return]


def unflattened(net: Any, x: Tensor) -> Tensor:
    y = last(net, x)
    return net.d(net.p(y.flatten(0, 1)).unflatten(0, (-1, y.shape[1])))  # type: ignore[no-any-return]


def open_rows(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.e(y.flatten(2).relu().view(y.shape[0], y.shape[1], -1, y.shape[3]))  # type: ignore[no-any-return]


def as_shape(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.e(y.flatten(2).relu().view(y.shape))  # type: ignore[no-any-return]


def as_tensor(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    return net.e(y.flatten(2).relu().reshape_as(y))  # type: ignore[no-any-return]


LINEAR = {"a": conv(), "p": nn.Linear(16, 16), "d": nn.Linear(16, 3)}
CONVOLVED = {"a": conv(), "e": conv(16, 3, 1)}


@pytest.mark.parametrize(
    ("forward", "parts", "tap"),
    [
        (windows, LINEAR, ":reshape_1"), (by_rows, LINEAR, ":view"), (unflattened, LINEAR, ":unflatten"),
        (open_rows, CONVOLVED, ":view"), (as_shape, CONVOLVED, ":view"), (as_tensor, CONVOLVED, ":reshape"),
    ],
)  # fmt: skip
def test_a_narrowed_network_at_another_size(forward: Forward, parts: dict[str, nn.Module], tap: str) -> None:
    model = traced(forward, (2, 3, 8, 8), **parts)
    kept = [0, 3, 5, 11]
    narrowed = ifx.narrow(model, kept={tap: kept}).value
    axis = model.facts_of(tap).channel_axis
    assert axis is not None
    for size in ((2, 3, 8, 8), (5, 3, 8, 8), (3, 3, 16, 8), (3, 3, 8, 12)):
        x = torch.randn(*size, dtype=torch.float64)
        with torch.no_grad():
            (got, _), (whole, _) = ifx.instrument(narrowed, [tap])(x), ifx.instrument(model, [tap])(x)
        torch.testing.assert_close(got[tap], whole[tap].index_select(axis, torch.tensor(kept)), rtol=1e-9, atol=1e-9)


def test_a_part_of_a_tuple_that_the_code_takes_twice_is_narrowed() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.a(x)
        out = net.m(y, y, y, need_weights=False)
        return net.d(out[0] + out[0].relu())  # type: ignore[no-any-return]

    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    model = traced(forward, (2, 6, 16), a=nn.Linear(16, 12), m=attention, d=nn.Linear(12, 3))
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    narrowed = ifx.narrow(model, kept={"m[0]": [1, 7]}).value
    got, whole = ifx.instrument(narrowed, ["m[0]"])(x)[0]["m[0]"], ifx.instrument(model, ["m[0]"])(x)[0]["m[0]"]
    torch.testing.assert_close(got, whole[..., [1, 7]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "layer", [nn.LSTM(16, 12, batch_first=True), nn.GRU(16, 12, batch_first=True), nn.RNN(16, 12, batch_first=True)]
)
def test_the_channels_of_a_recurrent_layer_are_its_features_not_its_steps(layer: nn.Module) -> None:
    model = traced(lambda net, x: net.d(net.r(x)[0]), (2, 5, 16), r=layer, d=nn.Linear(12, 3))
    assert model.facts_of("r[0]").channel_axis == 2
    attention = nn.MultiheadAttention(16, 4, batch_first=True)
    model = traced(lambda net, x: net.d(net.m(x, x, x)[0]), (2, 5, 16), m=attention, d=nn.Linear(16, 3))
    assert model.facts_of("m[0]").channel_axis == 2


def test_a_width_that_cannot_be_reached_is_refused() -> None:
    """Nothing removes filters of a grouped transposed convolution; asked for by width, it was left whole without a word."""
    model = traced(
        lambda net, x: net.d(net.t(net.a(x))), (2, 3, 8, 8),
        a=conv(), t=nn.ConvTranspose2d(16, 24, 4, 2, 1, groups=4), d=conv(24, 3, 1),
    )  # fmt: skip
    with pytest.raises(
        ifx.PruneError, match=r"`t`: none of its 24 channels can be removed: no rule covers what makes them"
    ):
        ifx.shrink(model, widths={"t": 12})


def windows_by_int(net: Any, x: Tensor) -> Tensor:
    """The batch is computed back from the number of windows, as in Swin."""
    y = net.a(x)
    c, h, w = y.shape[1:]
    z = y.view(len(y), c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
    z = z * z.mean(1, keepdim=True)
    b = int(z.shape[0] / (h * w / 4 / 4))
    assert isinstance(b, int) and issubclass(bool, int) and len([z]) == int("1")
    return net.d(z.view(b, h // 4, w // 4, 4, 4, -1).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w))  # type: ignore[no-any-return]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_int_and_len_of_sizes_follow_the_input(role: Literal["teacher", "student"]) -> None:
    model = traced(windows_by_int, (2, 3, 8, 8), a=conv(), d=conv(16, 3, 1))
    assert "int" not in globals() and "len" not in globals()
    model = ifx.trace(model.module, *model.example_inputs, role=role)
    assert (model.report.leaves, model.report.specialisations) == ((), ())
    result = ifx.shrink(model, ratio=0.5)
    assert result.report.widths == {"a": (16, 8), "d": (3, 3)}
    for size in ((3, 3, 12, 8), (1, 3, 4, 16)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(model.graph_module(x), model.module(x))
        torch.testing.assert_close(result.value.graph_module(x), run_masked(model, result.report, x))


KINDS: dict[str, Callable[[Any, Any], bool]] = {
    "isinstance of int": lambda h, _: isinstance(h, int) and not isinstance(h, float) and not isinstance(h, Tensor),
    "type of int": lambda h, _: type(h) == int and int == type(h // 2) and type(h) in (int, float) and type(h) != float,  # noqa: E721
    "type is int": lambda h, x: type(h) is int and all(type(n) is int for n in x.shape) and type(h / 2) is float,
    "type by name": lambda h, _: (
        {int: True}.get(type(h), False) and issubclass(type(h), int) and type(h).__name__ == "int"
    ),
    "in another file": lambda h, _: number_or_none(h) is not None and isinstance(type(h), type),
    "types of the rest": lambda _, x: (
        type(x) is Tensor and type(x.shape) is torch.Size and isinstance(type("A", (), {})(), object)
    ),
    "of float": lambda h, _: isinstance(h / 2, float) and type(h / 2) == float and type(h / 2) != int,  # noqa: E721
    "of bool": lambda h, x: isinstance(h > x.shape[3], bool) and isinstance(h > 0, int) and type(h > 0) == bool,  # noqa: E721
}


@pytest.mark.parametrize("kind", KINDS)
def test_code_that_asks_for_the_type_of_a_size_is_told_pythons(kind: str) -> None:
    """The stand-ins of sizes were of no type that the code knows, so the other branch was taken, and the graph was refused."""

    def forward(net: Any, x: Tensor) -> Tensor:
        z = net.a(x)
        return net.d(z.flatten(2).view(*z.shape[:2], -1)) if KINDS[kind](x.shape[2], x) else net.a(-x)  # type: ignore[no-any-return]

    model = traced(forward, (2, 3, 8, 8), a=conv(), d=nn.Conv1d(16, 3, 1))
    assert "type" not in globals() and "type" not in vars(nets)
    assert model.report.method == "shapes"
    x = torch.randn(3, 3, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(model.graph_module(x), model.module(x))


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "sqrt": lambda h: math.sqrt(h * 2),
    "log": lambda h: math.log(h) + math.log(h, 3),
    "log2, log10": lambda h: math.log2(h) + math.log10(h),
    "exp": lambda h: math.exp(-h / 8),
    "pow": lambda h: math.pow(h, 0.3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_math_follow_sizes(name: str) -> None:
    """They took the example's size in code that only recording can follow, as it asks for a type."""
    before = dict(vars(math))

    def forward(net: Any, x: Tensor) -> Tensor:
        assert isinstance(x.shape[2], int)
        return net.a(x) * FUNCTIONS[name](x.shape[2])  # type: ignore[no-any-return]

    model = traced(forward, (2, 3, 8, 8), a=conv())
    assert (model.report.method, model.report.specialisations) == ("shapes", ())
    assert vars(math) == before
    for size in ((3, 3, 12, 8), (1, 3, 5, 16)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(model.graph_module(x), model.module(x))


def test_of_a_module_that_stays_one_node_the_line_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * sum(1 for _ in range(x.shape[0])) / x.shape[0]

    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    for inner, line in ((Odd(), "range(x.shape[0])"), (Data(), "x.sum() > 0")):
        model = traced(lambda s, x: s.d(s.inner(s.a(x))), (2, 3, 8, 8), a=conv(), inner=inner, d=conv(16, 3, 1))
        first = ifx.shrink(model, ratio=0.5).report.frozen[0].reason
        why = f"`inner` ({type(inner).__name__}) reads them, and stays one node, because its code cannot be traced"
        assert first.startswith(f"{why} (test_sizes_as_written.py:") and first.endswith(f": {line})")
