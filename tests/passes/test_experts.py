"""Mixtures of experts: a router, and products of rows with the matrix of their expert, as Hugging Face's models compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.compression.write_source import source_of
from indistill_fx.deploy.export_onnx import export_onnx
from indistill_fx.deploy.onnx_substitutes import Substitutes
from indistill_fx.passes.capture.trace import trace
from indistill_fx.passes.extract.instrument import instrument
from indistill_fx.passes.pruning.narrow import narrow
from indistill_fx.passes.pruning.shrink import shrink
from indistill_fx.traced import TracedModel
from tests.nets import unsettle
from tests.numerics.masked_reference import run_masked

WIDTH, INNER, EXPERTS = 16, 24, 4


class Experts(nn.Module):
    """Every token goes to the best two of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 4)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.reshape(-1, tokens.shape[-1])
        shares, places = self.gate(rows).softmax(-1).topk(2, -1)
        chosen = places.reshape(-1)
        order = chosen.argsort(stable=True)
        ends = torch.histc(chosen.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
        gate, up = torch._grouped_mm(rows[order // 2], self.up.transpose(1, 2), offs=ends).chunk(2, -1)
        found = torch._grouped_mm(torch.nn.functional.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        found = found * shares.reshape(-1)[order][:, None]
        return found[order.argsort()].view(-1, 2, tokens.shape[-1]).sum(1).view_as(tokens)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts, self.head = nn.Linear(6, WIDTH), Experts(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.experts(x)).mean(1))  # type: ignore[no-any-return]


X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))
MACS = 7 * (6 * WIDTH + WIDTH * EXPERTS + 2 * (2 * INNER * WIDTH + INNER * WIDTH)) + WIDTH * 5


@pytest.fixture
def model() -> TracedModel:
    torch.manual_seed(0)
    return trace(unsettle(Net()).eval(), X)


def test_experts_count_once_for_every_token_they_get(model: TracedModel) -> None:
    assert model.report.leaves == () and model.macs == MACS


def test_features_are_narrowed_exactly(model: TracedModel) -> None:
    kept = {"embed": [1, 4, 9], "experts": [0, 3, 5, 15]}
    got, _ = instrument(narrow(model, kept=kept).value, list(kept))(X)
    whole, _ = instrument(model, list(kept))(X)
    for tap, channels in kept.items():
        torch.testing.assert_close(got[tap], whole[tap][..., channels])


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_their_channels_go_as_many_at_a_time_as_torch_needs(ratio: float, model: TracedModel) -> None:
    result = shrink(model, ratio=ratio)
    small, report = result.value.graph_module, result.report
    with torch.no_grad():
        torch.testing.assert_close(small(X), run_masked(model, report, X), rtol=1e-4, atol=1e-5)
    embed, inner = report.widths["embed"][1], small.get_parameter("experts.down").shape[2]
    assert embed % 4 == inner % 4 == 0 and embed < WIDTH and inner < INNER
    assert small.get_parameter("experts.up").shape == (EXPERTS, 2 * inner, embed)
    assert small.get_parameter("experts.down").shape == (EXPERTS, embed, inner)
    assert trace(small, X).macs == result.value.macs
    small.train()(X).pow(2).mean().backward()
    assert not [name for name, parameter in small.named_parameters() if parameter.grad is None]
    student = source_of(result.value).build().eval()
    assert torch.equal(student(X), small.eval()(X))


def test_a_small_mixtral_is_halved() -> None:
    torch.manual_seed(0)
    configuration = transformers.MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
    )  # fmt: skip
    ids = {"input_ids": torch.randint(0, 40, (2, 8))}
    module = transformers.MixtralForCausalLM(configuration).eval()
    model = trace(module, ids, role="student")
    experts = 2 * (8 * 2 * 3 * 32 * 64)  # two layers; eight tokens, each to two experts of three matrices
    assert model.report.leaves == () and experts < model.macs < 2 * experts
    result = shrink(model, macs=0.5)
    small = result.value.graph_module.eval()
    assert result.value.macs <= model.macs / 2 and trace(small, ids).macs == result.value.macs
    inner = small.get_parameter("model.layers.0.mlp.experts.down_proj").shape[2]
    assert inner < 64 and inner % 4 == 0
    assert small(**ids)["logits"].shape == (2, 8, 40)


@pytest.mark.parametrize("length", [7, 1])
def test_a_file_computes_the_same(length: int, model: TracedModel, tmp_path: Path) -> None:
    """Without an operation for groups: with one token, some experts have no rows."""
    export_onnx(model.graph_module, tmp_path / "experts.onnx", X[:, :length])
    file = ifx.load(f"onnxruntime:{tmp_path / 'experts.onnx'}")
    for batch in (1, 2, 5):
        x = torch.randn(batch, length, 6)
        torch.testing.assert_close(file(x), model.graph_module(x))


def test_nothing_of_another_group_reaches_a_row() -> None:
    """Not even what is no number."""
    rows, weight = torch.randn(6, 4), torch.randn(3, 4, 5)
    rows[0] = torch.nan
    ends = torch.tensor([1, 1, 6], dtype=torch.int32)
    expected = torch._grouped_mm(rows, weight.transpose(1, 2).contiguous().transpose(1, 2), offs=ends)
    with Substitutes():
        found = torch._grouped_mm(rows, weight, offs=ends)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert not found[1:].isnan().any()
