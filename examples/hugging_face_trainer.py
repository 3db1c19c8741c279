"""Hugging Face's Trainer trains the stages: its model is a stage, and the loss is what the stage gives.

    pip install transformers
    python examples/hugging_face_trainer.py [--epochs 4] [--limit 2000]

BERT of four layers → two, on the texts of examples/texts.py.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from texts import bert_loaders, bert_student, bert_teacher
from torch import nn
from transformers import Trainer, TrainingArguments

import indistill_fx as ifx
from indistill_fx.evaluation.accuracy import evaluate


class StageTrainer(Trainer):
    """A Trainer whose model is a stage."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        """Batches are dicts; teacher and student each get what they take."""
        loss = model(inputs)
        return (loss, {}) if return_outputs else loss


def arguments(epochs: float, folder: str) -> TrainingArguments:
    """As anywhere, but that columns which a stage's signature does not name are kept."""
    return TrainingArguments(
        folder, num_train_epochs=epochs, learning_rate=3e-3, per_device_train_batch_size=64, use_cpu=True, seed=0,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def main() -> None:
    """A teacher by the Trainer as it is, then a student stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--limit", type=int, default=2000)
    asked = parser.parse_args()
    torch.manual_seed(0)
    train, test = bert_loaders(limit=asked.limit)
    teacher, student = bert_teacher(), bert_student()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(teacher, arguments(asked.epochs, folder), train_dataset=train.dataset).train()
        example = {"input_ids": train.dataset[0]["input_ids"][None]}
        models = [
            ifx.trace(model, example, role=role, logits="logits")
            for model, role in ((teacher, "teacher"), (student, "student"))
        ]
        for stage in ifx.compile_stages(*models, curriculum=ifx.Curriculum(lengths=1)):
            epochs = stage.budget.length if stage.budget else asked.epochs
            StageTrainer(stage, arguments(epochs, folder), train_dataset=train.dataset).train()
    for name, model in (("teacher", teacher), ("student", student)):
        print(f"{name}: accuracy {evaluate(model, test, logits='logits').accuracy:.1%}")


if __name__ == "__main__":
    main()
