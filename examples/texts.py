r"""Two language models into half of their layers, on a text at hand: the descriptions of data sets that scikit-learn ships with, as bytes.

BERT says from which description 64 characters are; GPT-2 foretells the next character, and is distilled token by token.

    indistill-fx train   examples/texts.py:bert_teacher --data examples/texts.py:bert_loaders -o runs/teacher
    indistill-fx distill examples/texts.py:bert_teacher@runs/teacher/student.safetensors examples/texts.py:bert_student \
        --data examples/texts.py:bert_loaders -o runs/student

and likewise `gpt_teacher`, `gpt_student`, `gpt_loaders`.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

LENGTH = 64


def texts(least: int = 2500) -> list[Tensor]:
    """Every description of at least so many bytes, in the order of their names: ASCII codes (length,)."""
    folder = resources.files("sklearn.datasets") / "descr"
    found = sorted((file.name, file.read_bytes()) for file in folder.iterdir() if file.name.endswith(".rst"))
    return [torch.tensor([min(byte, 127) for byte in text]) for _, text in found if len(text) >= least]


def parts(step: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """Windows of each description, `step` apart in the first four fifths, and side by side in the last, which is for the test."""
    whole = [(text[: len(text) * 4 // 5], text[len(text) * 4 // 5 :]) for text in texts()]
    train = [list(text.unfold(0, LENGTH, step)) for text, _ in whole]
    return train, [list(text.unfold(0, LENGTH, LENGTH // 4)) for _, text in whole]


def loaders(
    train: list[Any], test: list[Any], batch_size: int, seed: int, limit: int | None
) -> tuple[DataLoader, DataLoader]:
    """Of samples by name."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = DataLoader(train[:limit], batch_size, shuffle=True, generator=generator)  # type: ignore[arg-type]
    return shuffled, DataLoader(test[:limit], 256)  # type: ignore[arg-type]


def bert(layers: int) -> nn.Module:
    """A classifier of the descriptions."""
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, num_labels=len(texts()), pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def bert_teacher() -> nn.Module:
    """Four layers."""
    return bert(4)


def bert_student() -> nn.Module:
    """Two."""
    return bert(2)


def bert_loaders(batch_size: int = 64, seed: int = 0, limit: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Characters, and the number of the description that they are from."""
    named = [
        [{"input_ids": ids, "labels": torch.tensor(number)} for number, own in enumerate(part) for ids in own]
        for part in parts(16)
    ]
    return loaders(named[0], named[1], batch_size, seed, limit)


def gpt(layers: int) -> nn.Module:
    """A decoder of characters."""
    config = GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=layers, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def gpt_teacher() -> nn.Module:
    """Four layers."""
    return gpt(4)


def gpt_student() -> nn.Module:
    """Two."""
    return gpt(2)


def gpt_loaders(batch_size: int = 64, seed: int = 0, limit: int | None = None) -> tuple[DataLoader, DataLoader]:
    """Characters, which are their own labels: the task shifts them."""
    named = [[{"input_ids": ids, "labels": ids} for own in part for ids in own] for part in parts(16)]
    return loaders(named[0], named[1], batch_size, seed, limit)
