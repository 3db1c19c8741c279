"""Texts without labels: the teacher is followed where there are tokens, not in the padding behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.losses.positions import IGNORED, without_padding
from indistill_fx.losses.task import Language

LENGTH, WORDS = 7, 11


class Tagger(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = (
            nn.Embedding(WORDS, width),
            nn.Linear(width, width),
            nn.Linear(width, WORDS),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.hidden(self.embedding(input_ids)).relu() * attention_mask[..., None])


class Translator(Tagger):
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:  # type: ignore[override]
        source = (self.embedding(input_ids) * attention_mask[..., None]).mean(1, keepdim=True)
        return self.head(
            self.hidden(self.embedding(decoder_input_ids) * decoder_attention_mask[..., None] + source).relu()
        )


IDS = torch.randint(0, WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(LENGTH) < torch.tensor([7, 5, 3, 2])[:, None]).long()
OTHER = MASK.flip(0)
TEXTS = {"input_ids": IDS, "attention_mask": MASK}
BOTH = {"input_ids": IDS, "attention_mask": OTHER, "decoder_input_ids": IDS.flip(1), "decoder_attention_mask": MASK}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("kind", "batch"), [(Tagger, TEXTS), (Translator, BOTH)], ids=["encoder", "encoder and decoder"]
)
def test_padding_does_not_count(kind: type[Tagger], batch: dict[str, Tensor], shift: bool) -> None:
    torch.manual_seed(0)
    teacher, student = kind(16).eval(), kind(8)
    options = {"weight_labels": 0.0, "temperature": 2.0}
    stage = ifx.compile_stages(
        teacher, student, example_inputs=batch, curriculum=ifx.Curriculum(lengths=[]), main="kd", main_options=options,
        task=Language(shift=shift),
    )[-1]  # fmt: skip
    with torch.no_grad():
        z_s, z_t, mask = student(**batch), teacher(**batch), MASK.bool()
        if shift:
            z_s, z_t, mask = z_s[:, :-1], z_t[:, :-1], mask[:, 1:]
        log_s, log_t = ((z / 2).log_softmax(-1)[mask] for z in (z_s, z_t))
        expected = 4 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()
        everywhere = (
            4 * ((z_t / 2).softmax(-1) * ((z_t / 2).log_softmax(-1) - (z_s / 2).log_softmax(-1))).sum(-1).mean()
        )
    assert stage(batch).item() == pytest.approx(float(expected) * stage.criterion.weight, rel=1e-5)
    assert abs(float(everywhere - expected)) > 1e-3
    with_labels = {**batch, "labels": torch.where(MASK > 0, IDS, -100)}
    assert stage(with_labels).item() == pytest.approx(stage(batch).item(), rel=1e-6)
    other = {**batch, "labels": IDS}
    assert stage(other).item() == pytest.approx(float(everywhere) * stage.criterion.weight, rel=1e-5)


def test_a_mask_of_another_size_says_nothing() -> None:
    class Pooled(Tagger):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids, attention_mask)[:, ::2]

    torch.manual_seed(0)
    stage = ifx.compile_stages(
        Pooled(16).eval(), Pooled(8), example_inputs=TEXTS, curriculum=ifx.Curriculum(lengths=[]), main="kd",
        main_options={"weight_labels": 0.0}, task=Language(shift=False),
    )[-1]  # fmt: skip
    kept = {**TEXTS, "labels": torch.zeros(4, 4, dtype=torch.long)}
    assert stage(TEXTS).item() == pytest.approx(stage(kept).item(), rel=1e-6)


@pytest.mark.parametrize(
    "mask",
    [MASK.float(), MASK.bool(), (1.0 - MASK) * -1e9, torch.where(MASK > 0, 0.0, -torch.inf), MASK.half()],
    ids=["floats", "bools", "added", "added, infinite", "halves"],
)
def test_every_kind_of_mask(mask: Tensor) -> None:
    assert torch.equal(without_padding(mask), torch.where(MASK > 0, 0, IGNORED))


def test_a_mask_that_adds_nothing_hides_nothing() -> None:
    assert torch.equal(without_padding(torch.zeros(4, LENGTH)), torch.zeros(4, LENGTH, dtype=torch.int64))
