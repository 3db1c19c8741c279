"""Decoders as language models have them: RMS norms, gated MLPs, grouped queries, and rotary positions in the three usual forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from indistill_fx.compression.write_source import source_of
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.pruning.shrink import shrink
from tests.passes.test_shrink import run_masked

WIDTH, HEADS, SHARED, HEAD = 32, 8, 4, 8


class OwnNorm(nn.Module):
    """RMS norm by hand, as in Hugging Face's Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def halves(x: Tensor, angles: Tensor) -> Tensor:
    """Entry k and entry k + half are a pair (GPT-NeoX, Hugging Face's Llama)."""
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def neighbours(x: Tensor, angles: Tensor) -> Tensor:
    """Entries 2k and 2k + 1 are a pair (GPT-J)."""
    cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def numbers(x: Tensor, angles: Tensor) -> Tensor:
    """The same pairs as complex numbers (Meta's Llama)."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(3)


FORMS = {"halves": halves, "neighbours": neighbours, "complex numbers": numbers}


class Block(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.before, self.between = OwnNorm(), nn.RMSNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, HEADS * HEAD), nn.Linear(HEADS * HEAD, WIDTH)
        self.key, self.value = nn.Linear(WIDTH, SHARED * HEAD), nn.Linear(WIDTH, SHARED * HEAD)
        self.gate, self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        rates = 100 ** -(torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
        self.register_buffer("angles", torch.outer(torch.arange(32, dtype=torch.float64), rates))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        y = self.before(x)
        query, key, value = (
            layer(y).view(batch, steps, -1, HEAD).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        query, key = (FORMS[self.form](z, self.angles[:steps]) for z in (query, key))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, steps, -1))
        y = self.between(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self, form: str):
        super().__init__()
        self.words, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.first, self.second, self.norm = Block(form), Block(form), OwnNorm()

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(self.words(words)))))


@pytest.mark.parametrize("form", FORMS)
def test_heads_width_and_mlp_can_go(form: str) -> None:
    torch.manual_seed(0)
    words, longer = torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (3, 11))
    teacher = trace(Decoder(form).double(), words)
    small = shrink(teacher, ratio=0.5)
    kept = {path: width for path, (_, width) in small.report.widths.items()}
    block = {"query": 32, "key": 16, "value": 16, "out": 16, "gate": 32, "up": 32, "down": 16}
    expected = {f"{name}.{layer}": width for name in ("first", "second") for layer, width in block.items()}
    assert kept == {"words": 16, "head": 50} | expected
    with torch.no_grad():
        got = small.value.graph_module(longer)
        assert (got - run_masked(teacher, small.report, longer)).abs().max() < 1e-12
        assert torch.equal(source_of(small.value).build()(longer), got)


def test_equal_sizes_of_a_block_are_one_argument() -> None:
    teacher = trace(Decoder("complex numbers").double(), torch.randint(0, 50, (2, 6)))
    small = shrink(teacher, widths={"first.query": 48, "second.query": 16, "first.gate": 40})
    text = source_of(small.value).text
    assert "def __init__(self, query_out, key_out, gate_out, size, size_2):" in text
    assert "self.first = Block(query_out=48, key_out=24, gate_out=40, size=6, size_2=3)" in text
