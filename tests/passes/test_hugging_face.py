"""Models of Hugging Face's `transformers`, as its users have them: with their cache on, on padded batches of any length."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import indistill_fx as ifx
from indistill_fx.compression.basis import in_both_modes
from indistill_fx.compression.correspond import plan_of
from indistill_fx.compression.write_source import source_of
from indistill_fx.graph.caches import no_generation_cache
from indistill_fx.graph.draws import TensorDraws
from indistill_fx.passes.capture import trace as tracing
from indistill_fx.passes.capture.exported import capture_exported

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=32,
)
ENDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
DECODER = dict(**SIZES, **ENDS, num_key_value_heads=2, head_dim=8)
T5 = dict(
    vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0, dropout_rate=0.0
)
SEVERAL = dict(
    **ENDS, vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, decoder_start_token_id=2, max_position_embeddings=32,
)  # fmt: skip
MODELS = {
    "bert": ("Bert", "ForSequenceClassification", {**SIZES, "pad_token_id": 0}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {**ENDS, "vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    ),
    "llama": ("Llama", "ForCausalLM", DECODER),
    "gemma2": ("Gemma2", "ForCausalLM", {**DECODER, "sliding_window": 4}),
    "opt": ("OPT", "ForCausalLM", {**SIZES, **ENDS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "bart": ("Bart", "ForSequenceClassification", SEVERAL),
}


def build(name: str) -> nn.Module:
    """With biases and norms that are not at their neutral start."""
    torch.manual_seed(0)
    family, head, settings = MODELS[name]
    model = getattr(transformers, f"{family}{head}")(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def batch(name: str, rows: int = 2, length: int = 10, *, padding: str = "right", seed: int = 1) -> dict[str, Tensor]:
    """Token ids, a mask of padding, and what the decoder of two networks reads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=generator)
    if name == "bart":
        ids[:, -1] = 2  # each text ends once
        return {"input_ids": ids}
    places, short = torch.arange(length), torch.arange(rows)[:, None] % 3
    mask = places < length - short if padding == "right" else places >= short
    given = {"input_ids": ids, "attention_mask": mask.long()}
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(3, 64, (rows, length - 4), generator=generator)
    return given


def results(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model(**given)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_graphs_equal_the_model_on_batches_of_other_sizes_and_paddings(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced = ifx.trace(model, batch(name))
    assert traced.report.method == "shapes" and traced.report.leaves == ()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for rows, length, padding in ((3, 10, "right"), (2, 7, "left"), (4, 15, "right")):
        given = batch(name, rows, length, padding=padding, seed=length)
        with no_generation_cache(model):
            wanted = results(model, given)
        got = results(traced.graph_module, given)
        assert len(wanted) == len(got)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_the_embedding_width_of_a_bart_goes_where_the_logits_alone_are_returned():
    """Its code takes one channel to read the length of a text, and the tokens that end it by a mask."""

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("bart")

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids=input_ids).logits  # type: ignore[no-any-return]

    report = ifx.shrink(ifx.trace(Logits().eval(), batch("bart")), ratio=0.5).report
    assert {frozen.reason for frozen in report.frozen} == {"an output of the network"}
    assert report.widths["inner.model.shared"] == (32, 16)


def test_the_cache_is_off_only_while_the_model_is_traced_and_the_report_says_so():
    model = build("t5")
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    uses = {key: config.use_cache for key, config in configs.items()}
    assert True in uses.values()
    report = ifx.trace(model, batch("t5")).report
    assert {key: config.use_cache for key, config in configs.items()} == uses
    assert any("use_cache=False" in note for note in report.notes)
    with pytest.raises(ZeroDivisionError), no_generation_cache(model) as found:
        assert found and not any(config.use_cache for config in configs.values())
        1 / 0  # noqa: B018  # puts back what it changed also after an error
    assert {key: config.use_cache for key, config in configs.items()} == uses
    with no_generation_cache(nn.Linear(2, 2)) as found:
        assert not found


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_students_in_source_code_return_what_the_original_does(name, tmp_path):
    model = build(name)
    small = ifx.shrink(in_both_modes(ifx.trace(model, batch(name))), ratio=0.5)
    assert small.report.macs[1] < 0.4 * small.report.macs[0]
    written = source_of(small.value)
    kind = "SequenceClassifierOutput" if name == "bert" else "Caus"
    assert f"from transformers.modeling_outputs import {kind}" in written.text and "indistill_fx" not in written.text
    student, given = written.build().eval(), batch(name)
    got = student(**given)
    assert isinstance(got, transformers.utils.ModelOutput)
    assert torch.equal(got.logits, small.value.graph_module.eval()(*given.values()).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_networks_that_torch_export_captured_lose_channels_too(name, monkeypatch):
    """Operators of torch take their sizes as lists."""
    monkeypatch.setattr(tracing, "_METHODS", {"export": capture_exported})
    small = ifx.shrink(
        ifx.trace(build(name), batch(name)), ratio=0.5
    )  # compared with the original without the channels
    assert small.report.macs[1] < 0.4 * small.report.macs[0] and len(small.report.frozen) == 1


class Chosen(nn.Module):
    """Takes some positions by a mask that the input makes, and counts positions of a tensor without channels."""

    def __init__(self):
        super().__init__()
        self.table, self.places, self.head = nn.Embedding(16, 8), nn.Embedding(32, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        given = nn.functional.dropout(self.table(ids), 0.1, self.training)
        rows, length = given[:, :, -1].shape
        torch._check(rows > 0)
        hidden = given + self.places(torch.arange(0, length))
        return self.head(hidden[ids.eq(2), :].view(rows, -1, 8)[:, -1])


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_choice_by_a_mask_of_the_input_is_no_draw_and_lengths_stay_open(role):
    torch.manual_seed(0)
    model = Chosen().train(role == "student")
    ids = torch.cat([torch.randint(3, 16, (2, 9)), torch.full((2, 1), 2)], 1)
    traced = ifx.trace(model, ids, role=role)
    assert traced.report.method == "shapes" and traced.report.leaves == () and traced.report.specialisations == ()
    longer = torch.cat([torch.randint(3, 16, (3, 14)), torch.full((3, 1), 2)], 1)
    model.eval(), traced.graph_module.eval()
    torch.testing.assert_close(traced.graph_module(longer), model(longer))


def test_only_the_mask_decides_how_many_values_are_chosen():
    mask = torch.tensor([True, False, True])
    with TensorDraws() as draws:
        drawn = torch.rand(3)
        assert not draws.sized(drawn[mask]) and not draws.sized(drawn.masked_select(mask))
        assert (
            draws.sized(drawn[drawn > 0.5])
            and draws.sized(mask.masked_select(drawn > 0.5))
            and draws.sized(drawn.nonzero())
        )


class ByData(nn.Module):
    """Looks at the data unless it is exported, as attention masks of `transformers` do."""

    def __init__(self, *, honest: bool):
        super().__init__()
        self.layer, self.honest = nn.Linear(4, 4), honest

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and bool((x > -9).all()):
            return self.layer(x)
        return self.layer(torch.where(x > -9, x, -9.0)) + (0.0 if self.honest else 1.0)


def test_code_that_decides_by_the_data_is_recorded_on_its_way_for_export():
    model, x = ByData(honest=True).eval(), torch.randn(3, 4)
    report = ifx.trace(model, x).report
    assert report.method == "shapes" and any("torch.export" in note for note in report.notes)
    assert not torch.compiler.is_exporting() and not torch.compiler.is_compiling()


def test_another_result_on_the_way_for_export_is_refused():
    traced = ifx.trace(nn.Sequential(ByData(honest=False), nn.ReLU()).eval(), torch.randn(3, 4))
    assert traced.report.method == "leaves" and traced.report.leaves == ("0",)


def test_a_single_channel_that_is_spread_over_an_axis_stays():
    """Funnel's attention splits its scores of two segments, and spreads each over the positions."""
    config = transformers.FunnelConfig(
        vocab_size=64, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=48, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.FunnelForSequenceClassification(config).eval()
    small = ifx.shrink(ifx.trace(model, batch("bert")), ratio=0.5)  # compared with the original without the channels
    name = "funnel.encoder.blocks.0.0.attention.seg_embed"
    assert small.value.graph_module.get_parameter(name).shape[0] == model.get_parameter(name).shape[0] == 2
    assert small.report.macs[1] < small.report.macs[0]


def test_blocks_that_return_several_tensors_are_paired_with_those_of_source_code_that_return_one():
    """T5's blocks return hidden states and what the next one reads beside them; in student.py nothing that no one reads is returned."""
    teacher = ifx.trace(build("t5"), batch("t5"), logits="logits")
    small = ifx.shrink(teacher, ratio=0.5)
    student = ifx.trace(source_of(small.value).build(), batch("t5"), role="student", logits="logits")
    pair = plan_of(teacher, student, small.report.axes).pairs[0]
    assert (pair.teacher, pair.student) == ("encoder.block.0[0]", "encoder.block.0")
    seen = ifx.instrument(teacher, [pair.teacher])(*batch("t5").values())[0][pair.teacher]
    own = ifx.instrument(student, [pair.student]).eval()(*batch("t5").values())[0][pair.student]
    assert (seen.shape, own.shape) == (pair.teacher_shape, pair.student_shape)
    assert seen.shape[:2] == own.shape[:2] and len(pair.kept or range(seen.shape[2])) == own.shape[2]


class HooksItself(nn.Module):
    """Installs its hooks in the first forward pass, as `transformers` does to collect hidden states."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        if not hasattr(self, "hooked"):
            self.hooked = True
            for layer in self.layers:
                layer.register_forward_hook(lambda part, given, result: self.seen.append(result))
        self.seen = seen
        for layer in self.layers:
            x = layer(x)
        return self.head(sum(seen, start=torch.zeros(())))


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_hooks_that_a_forward_installs_are_taken_off_again(role):
    torch.manual_seed(0)
    model, x = HooksItself(), torch.randn(3, 4)
    traced = ifx.trace(model, x, role=role)
    assert not hasattr(model, "hooked") and not any(part._forward_hooks for part in model.modules())
    first, second = model.layers[0](x), model.layers[1](model.layers[0](x))
    wanted = model.head(first + second)
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(traced.graph_module.eval()(x), wanted)


def test_models_that_collect_their_hidden_states_are_traced_before_their_first_forward_pass():
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16
    )
    model, images = transformers.SegformerForSemanticSegmentation(config).eval(), torch.randn(2, 3, 64, 64)
    traced = ifx.trace(model, {"pixel_values": images})
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(images).logits, model(images).logits)
