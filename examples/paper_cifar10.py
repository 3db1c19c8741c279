"""The paper's own pair on CIFAR-10 images: assistant Cnn32, student Cnn32_Small, warm-up then PKT.

    python examples/paper_cifar10.py --data DIR --teacher cnn32_assistant_cifar10.pt            the paper's schedule (hours)
    python examples/paper_cifar10.py --data DIR --teacher cnn32_assistant_cifar10.pt --quick    about five minutes on two cores

DIR is an image folder with train/<class>/ and test/<class>/. The teacher's weights are a state dict with the authors'
names. Three students are trained from the same initial weights: on labels alone, by PKT alone, and by the InDistill
warm-up followed by PKT. All three get the same number of epochs in total.

Source: Sarridis et al., "InDistill", arXiv:2205.10003: section 4, CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.data.dataset import Data
from indistill_fx.data.open import open_data
from indistill_fx.evaluation.accuracy import embed, evaluate
from indistill_fx.evaluation.retrieval import retrieval
from indistill_fx.training.compare import compare

NAMES = {"labels": "cross-entropy", "pkt": "PKT", "indistill": "InDistill + PKT"}


class Cnn32(nn.Module):
    """Three blocks of convolution, norm, ReLU and max-pool, then two linear layers.

    With these widths the paper's assistant; `Cnn32_Small`, the student, has half of them.
    """

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64), hidden: int = 128):
        super().__init__()
        first, second, third = widths
        self.conv1, self.conv1_bn = nn.Conv2d(3, first, 3), nn.BatchNorm2d(first)
        self.conv2, self.conv2_bn = nn.Conv2d(first, second, 3), nn.BatchNorm2d(second)
        self.conv3, self.conv3_bn = nn.Conv2d(second, third, 3), nn.BatchNorm2d(third)
        self.fc1, self.fc2 = nn.Linear(4 * third, hidden), nn.Linear(hidden, 10)
        self.pool = nn.MaxPool2d(2)

    def embedding(self, x: Tensor) -> Tensor:
        """The penultimate features, which retrieval uses."""
        x = self.pool(F.relu(self.conv1_bn(self.conv1(x))))
        x = self.pool(F.relu(self.conv2_bn(self.conv2(x))))
        x = self.pool(F.relu(self.conv3_bn(self.conv3(x))))
        return F.relu(self.fc1(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        return self.fc2(self.embedding(x))


def make_teacher(weights: str) -> Cnn32:
    """The assistant with the authors' weights."""
    teacher = Cnn32()
    teacher.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return teacher


def make_student() -> Cnn32:
    """Cnn32_Small."""
    return Cnn32((8, 16, 32), 64)


def measure(student: nn.Module, data: Data, *, queries: int | None) -> dict[str, float]:
    """Test accuracy, and retrieval: test images as queries, training images as database."""
    accuracy = evaluate(student, data.test).accuracy
    query, query_labels = embed(student.embedding, data.test)
    database, database_labels = embed(student.embedding, data.train_plain)
    keep = slice(None) if queries is None else slice(None, None, max(1, len(query) // queries))
    found = retrieval(query[keep], query_labels[keep], database, database_labels)
    return {
        "accuracy": accuracy,
        "map_cosine": found.map_cosine,
        "map_euclidean": found.map_euclidean,
        "p100_cosine": found.precision_cosine,
        "p100_euclidean": found.precision_euclidean,
    }


def main() -> None:
    """Train the three students and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="image folder with train/ and test/")
    parser.add_argument("--teacher", required=True, metavar="FILE", help="state dict of the assistant Cnn32")
    parser.add_argument("--out", default="runs/paper", metavar="DIR", help="where runs, plan and results go")
    parser.add_argument("--quick", action="store_true", help="1-1-1 epochs of warm-up and 6 in all, every tenth query")
    parser.add_argument("--resume", action="store_true", help="go on with what is in --out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warmup, total = ([1, 1, 1], 6) if options.quick else ([3, 4, 5], 70)
    data = open_data(f"imagefolder:{options.data}", batch_size=128, seed=options.seed)
    teacher = make_teacher(options.teacher)
    torch.manual_seed(options.seed)
    initial = make_student()
    x = torch.randn(2, 3, 32, 32)
    plan = ifx.align(teacher, initial, example_inputs=x)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    plan.save(out / "plan.json")
    arms = compare(
        teacher,
        initial,
        data.train,
        plan=plan,
        curriculum=ifx.Curriculum(lengths=warmup),
        main="pkt",
        epochs=total,
        example_inputs=x,
        run_dir=out,
        resume=options.resume,
        seed=options.seed,
        schedule="step",
        milestones=[total - max(1, total // 7)],
        announce=lambda arm: print(f"{NAMES[arm]}:", flush=True),
    )
    queries = 1000 if options.quick else None
    results = {
        NAMES[name]: {**measure(arm.student, data, queries=queries), "seconds": arm.record.seconds}
        for name, arm in arms.items()
    }
    results = {
        "teacher": {**measure(teacher, data, queries=queries), "seconds": 0.0},
        **results,
    }
    (out / "results.json").write_text(
        json.dumps({"command": vars(options), "results": results}, indent=2) + "\n", encoding="utf-8"
    )
    show(results)


def show(results: dict[str, dict[str, float]]) -> None:
    """The table."""
    table = Table(
        Column("model", no_wrap=True),
        "top-1",
        "mAP cosine",
        "mAP Euclid",
        "P@100 cosine",
        "P@100 Euclid",
        "time",
    )
    for name, row in results.items():
        head = "—" if "PKT" in name else f"{100 * row['accuracy']:.2f}"
        cells = [f"{100 * row[key]:.2f}" for key in ("map_cosine", "map_euclidean", "p100_cosine", "p100_euclidean")]
        table.add_row(name, head, *cells, f"{row['seconds']:.0f} s")
    Console().print(
        table, "PKT trains the penultimate features only; its class scores are those of an untrained last layer."
    )


if __name__ == "__main__":
    main()
