"""Encoder-decoders: labels stand where they are predicted, also where they are the encoder's own tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import indistill_fx as ifx
from indistill_fx.losses.choose_task import compared_input


class Copier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(decoder_input_ids) + self.embedding(input_ids).mean(1, keepdim=True))
        return out


@pytest.mark.parametrize("task", [None, "language"])
def test_copied_tokens_are_measured_where_they_are_predicted(task: str | None) -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 11, (4, 6))
    decoder = torch.cat([torch.zeros(4, 1, dtype=torch.long), tokens[:, :-1]], 1)
    labels = tokens.clone()
    labels[1, 4:] = -100
    model = Copier().eval()
    measured = ifx.evaluate(model, [{"input_ids": tokens, "decoder_input_ids": decoder, "labels": labels}], task=task)
    with torch.no_grad():
        expected = cross_entropy(model(tokens, decoder).flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert measured.loss == pytest.approx(float(expected), rel=1e-6)


def test_a_mask_is_not_taken_for_a_decoders_tokens() -> None:
    tokens, mask = torch.tensor([[1, 2, 3]]), torch.ones(1, 3, dtype=torch.long)
    assert compared_input([tokens, mask], tokens) is tokens
    assert compared_input([mask, mask + 0], mask) is mask
