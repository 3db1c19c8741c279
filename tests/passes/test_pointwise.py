"""Convolutions that look at one place at a time leave the other axes as they are, as a linear layer does (gMLP)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.extract.instrument import instrument
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from tests.numerics.masked_reference import run_masked

TOKENS = 12
MIXING: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Conv1d(TOKENS, TOKENS, 1),
    "padding by name": lambda: nn.Conv1d(TOKENS, TOKENS, 1, padding="same"),
    "depthwise": lambda: nn.Conv1d(TOKENS, TOKENS, 1, groups=TOKENS),
    "transposed": lambda: nn.ConvTranspose1d(TOKENS, TOKENS, 1),
    "function": lambda: Function(),
}


class Function(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(TOKENS, TOKENS, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, None, 1, 0)


class Block(nn.Module):
    def __init__(self, width: int, mixing: nn.Module):
        super().__init__()
        self.p, self.mixing, self.q = nn.Linear(width, 2 * width), mixing, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.p(x)).chunk(2, -1)
        return x + self.q(u * self.mixing(v))  # type: ignore[no-any-return]


class Gated(nn.Module):
    def __init__(self, mixing: Callable[[], nn.Module], width: int = 16):
        super().__init__()
        self.e, self.m, self.o = (
            nn.Linear(6, width),
            nn.Sequential(*(Block(width, mixing()) for _ in range(2))),
            nn.Linear(width, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.m(self.e(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", MIXING)
@torch.no_grad()
def test_channels_beside_a_convolution_over_tokens(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, 6, dtype=torch.float64)
    model = trace(Gated(MIXING[name]).double().eval(), x)
    result = shrink(model, ratio=0.5)
    assert result.report.widths["e"] == (16, 8) and result.report.widths["m.0.p"] == (32, 16)
    torch.testing.assert_close(result.value.graph_module(x), run_masked(model, result.report, x))
    small = narrow(model, kept={"m.0.q": [1, 5]})
    assert not small.report.taps[0].stopped
    (got, _), (whole, _) = instrument(small.value, ["m.0.q"])(x), instrument(model, ["m.0.q"])(x)
    torch.testing.assert_close(got["m.0.q"], whole["m.0.q"][..., [1, 5]])


@torch.no_grad()
def test_a_strided_convolution_over_tokens_does_not_leave_the_channels_alone() -> None:
    strided = nn.Sequential(nn.Linear(6, 16), nn.Conv1d(TOKENS, TOKENS, 1, stride=2), nn.Linear(8, 3))
    report = shrink(trace(strided.eval(), torch.randn(2, TOKENS, 6)), ratio=0.5).report
    assert report.widths["0"] == (16, 16)


def test_blocks_whose_tokens_a_convolution_mixes_are_paired() -> None:
    def network(width: int) -> nn.Module:
        blocks = [Block(width, nn.Conv1d(TOKENS, TOKENS, 1)) for _ in range(2)]
        return nn.Sequential(nn.Embedding(30, width), *blocks, nn.Linear(width, 30))

    plan = ifx.align(network(16), network(8), example_inputs=torch.randint(0, 30, (2, TOKENS)))
    assert [(pair.teacher, pair.student) for pair in plan.pairs] == [("1", "1"), ("2", "2")]


class Mixing(nn.Module):
    """A block of an MLP-Mixer, the sums in one order or the other."""

    def __init__(self, width: int, first: bool):
        super().__init__()
        self.norm, self.out, self.first = nn.LayerNorm(width), nn.LayerNorm(width), first
        self.tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + y if self.first else y + x
        z = self.channels(self.out(x))
        return x + z if self.first else z + x


class Mixer(nn.Module):
    def __init__(self, width: int, first: bool):
        super().__init__()
        self.embed, self.head = nn.Conv2d(3, width, 4, 4), nn.Linear(width, 5)
        self.blocks = nn.Sequential(*(Mixing(width, first) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("teacher", "student"), [(24, 12), (16, 8), (24, 16), (16, 16)])
def test_the_blocks_of_a_mixer_are_paired_also_where_it_has_as_many_tokens_as_channels(
    teacher: int, student: int, first: bool
) -> None:
    plan = ifx.align(Mixer(teacher, first), Mixer(student, first), example_inputs=torch.randn(2, 3, 16, 16))
    found = [(p.teacher, p.student, p.adapter, p.teacher_shape, len(p.kept or ()) or teacher) for p in plan.pairs]
    assert found == [(f"blocks.{k}", f"blocks.{k}", "none", (2, 16, teacher), student) for k in range(3)]
