"""Lightning trains the stages: a stage is an ordinary module that takes a batch and gives its loss.

    pip install lightning
    python examples/lightning_loop.py [--epochs 10] [--limit 1000]

The networks are those of the demo, on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

import indistill_fx as ifx
from indistill_fx.data import open_data
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.evaluation.accuracy import evaluate


class Distilled(lightning.LightningModule):
    """One stage, for a Trainer."""

    def __init__(self, stage: ifx.Stage):
        super().__init__()
        self.stage = stage

    def training_step(self, batch: Any, number: int) -> Tensor:
        """The stage's loss."""
        return self.stage(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Of what the stage trains: the student up to its layer, and weights of the loss, if it has any."""
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 2e-3)


def fit(stages: list[ifx.Stage], loader: Iterable[Any], epochs: int) -> None:
    """Train stage after stage; a warm-up stage for as long as its budget says, the main one for so many epochs."""
    for stage in stages:
        trainer = lightning.Trainer(
            max_epochs=stage.budget.length if stage.budget else epochs, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Distilled(stage), loader)


def ways(epochs: int, limit: int, seed: int) -> Iterator[tuple[str, float]]:
    """The teacher's accuracy, then the student's after each way of training for as many epochs; it has the same weights at first."""
    torch.manual_seed(seed)
    data = open_data("digits", batch_size=64, limit=limit, seed=seed)
    teacher, student = DigitsTeacher(), DigitsStudent()
    ifx.train(teacher, data.train, epochs=epochs, progress=False)
    yield "teacher", evaluate(teacher, data.test).accuracy
    x = torch.zeros(2, 1, 8, 8)
    for name, main, warm in (("student alone", "labels", 0), ("KD", "kd", 0), ("warm-up + KD", "kd", 1)):
        own, curriculum = copy.deepcopy(student), ifx.Curriculum(lengths=warm, penultimate=0)
        stages = ifx.compile_stages(teacher, own, main=main, example_inputs=x, curriculum=curriculum)
        fit(stages, data.train, max(1, epochs - len(stages) + 1))
        yield name, evaluate(own, data.test).accuracy


def main() -> None:
    """Train a teacher and a student in three ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for name, accuracy in ways(asked.epochs, asked.limit, asked.seed):
        print(f"{name}: accuracy {accuracy:.1%}", flush=True)


if __name__ == "__main__":
    main()
