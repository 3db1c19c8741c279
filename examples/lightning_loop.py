"""Lightning trains the stages: a stage is an ordinary module that takes a batch and gives its loss.

    pip install lightning
    python examples/lightning_loop.py [--epochs 10] [--limit 1000]

The networks are those of the demo, on scikit-learn's digits.
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    """A teacher, then a student stage by stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int, default=1000)
    asked = parser.parse_args()
    torch.manual_seed(0)
    data = open_data("digits", batch_size=64, limit=asked.limit)
    teacher, student = DigitsTeacher(), DigitsStudent()
    ifx.train(teacher, data.train, epochs=asked.epochs, progress=False)
    for stage in ifx.compile_stages(
        teacher, student, example_inputs=torch.zeros(2, 1, 8, 8), curriculum=ifx.Curriculum(lengths=1)
    ):
        trainer = lightning.Trainer(
            max_epochs=stage.budget.length if stage.budget else asked.epochs, accelerator="cpu",
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Distilled(stage), data.train)
        print(f"{stage.name}: {trainer.global_step} steps")
    for name, model in (("teacher", teacher), ("student", student)):
        print(f"{name}: accuracy {evaluate(model, data.test).accuracy:.1%}")


if __name__ == "__main__":
    main()
