"""Hugging Face's Trainer trains the stages: its model is a stage, and the loss is what the stage gives.

    pip install transformers
    python examples/hugging_face_trainer.py [--epochs 4] [--limit 2000]

BERT of four layers → two, on the texts of examples/texts.py.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator
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


def arguments(epochs: float, folder: str, seed: int) -> TrainingArguments:
    """As anywhere, but that columns which a stage's signature does not name are kept."""
    return TrainingArguments(
        folder, num_train_epochs=epochs, learning_rate=3e-3, per_device_train_batch_size=64, use_cpu=True, seed=seed,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def ways(epochs: int, limit: int, seed: int) -> Iterator[tuple[str, float]]:
    """The teacher's accuracy, then the student's after each way of training for as many epochs; it has the same weights at first."""
    torch.manual_seed(seed)
    train, test = bert_loaders(limit=limit, seed=seed)
    teacher, student = bert_teacher(), bert_student()
    example = {"input_ids": train.dataset[0]["input_ids"][None]}
    with tempfile.TemporaryDirectory() as folder:
        Trainer(teacher, arguments(epochs, folder, seed), train_dataset=train.dataset).train()
        yield "teacher", evaluate(teacher, test, logits="logits").accuracy
        before = ifx.trace(teacher, example, logits="logits")
        for name, main, warm in (("student alone", "labels", 0), ("KD", "kd", 0), ("warm-up + KD", "kd", 1)):
            own = copy.deepcopy(student)
            after = ifx.trace(own, example, role="student", logits="logits")
            stages = ifx.compile_stages(
                before, after, main=main, curriculum=ifx.Curriculum(lengths=warm, penultimate=0)
            )
            for stage in stages:
                length = stage.budget.length if stage.budget else max(1, epochs - len(stages) + 1)
                StageTrainer(stage, arguments(length, folder, seed), train_dataset=train.dataset).train()
            yield name, evaluate(own, test, logits="logits").accuracy


def main() -> None:
    """Train a teacher by the Trainer as it is, and a student in three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name, accuracy in ways(asked.epochs, asked.limit, asked.seed):
        print(f"{name}: accuracy {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
