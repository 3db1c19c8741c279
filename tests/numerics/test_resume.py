"""A run that is stopped, wherever, and resumed ends with the bits of one that never stopped."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from indistill_fx.curriculum import Budget
from indistill_fx.data.augment import FlipAndCrop
from indistill_fx.data.foreign import repeatable
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.losses.task import Classification
from indistill_fx.runs.record import MetricFacts, RunRecord
from indistill_fx.stages.checks import label_check
from indistill_fx.training.options.settings import Settings
from indistill_fx.training.state import Phase
from indistill_fx.training.task import RunTask
from indistill_fx.training.trainer import Setup, Trainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIZE, BATCH = 40, 8


CLASSES = RunTask(Classification(), MetricFacts(), "", label_check(Classification(), lambda batch: torch.zeros(1, 3)))


class Student(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.norm = nn.BatchNorm2d(4)
            self.drop = nn.Dropout(0.3)
            self.second = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.drop(torch.relu(self.norm(self.first(x))).mean((2, 3))))


class Warm(nn.Module):
    """A stage with weights of its own, and noise from every generator."""

    def __init__(self, student: Student):
        super().__init__()
        self.first, self.regress = student.first, nn.Conv2d(4, 3, 1)
        nn.init.constant_(self.regress.weight, 0.1)
        nn.init.zeros_(self.regress.bias)

    def forward(self, batch: Any) -> Tensor:
        noise = 0.1 * (random.random() + float(np.random.rand()) + torch.randn(()))
        return F.mse_loss(self.regress(torch.relu(self.first(batch[0]))), batch[0] + noise)


class Main(nn.Module):
    def __init__(self, student: Student):
        super().__init__()
        self.student = student

    def forward(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.student(batch[0]), batch[1])


class Noisy(Dataset[Any]):
    """Samples whose augmentation uses the generators of torch, numpy and random."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(3, 6, 6, generator=generator) + random.random() + float(np.random.rand())
        return image + 0.1 * torch.randn(3, 6, 6), index % 3


def memory_loader() -> Any:
    images = torch.randint(256, (SIZE, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return MemoryLoader(
        images, torch.arange(SIZE) % 3, mean=(0.5,) * 3, std=(0.2,) * 3, batch_size=BATCH, shuffle=True,
        augment=FlipAndCrop(1),
    )  # fmt: skip


LOADERS = {
    "memory": memory_loader,
    "shuffled": lambda: DataLoader(Noisy(), batch_size=BATCH, shuffle=True),
    "generator": lambda: DataLoader(
        Noisy(), batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "weighted": lambda: DataLoader(Noisy(), batch_size=BATCH, sampler=WeightedRandomSampler([1.0] * SIZE, SIZE)),
    "sampler": lambda: DataLoader(
        Noisy(), batch_size=BATCH, sampler=RandomSampler(Noisy(), generator=torch.Generator().manual_seed(6))
    ),
}


class PowerCutError(Exception):
    """Stands for the power cut."""


class Cutting(nn.Module):
    """A stage in front of which the power may fail."""

    def __init__(self, stage: nn.Module, countdown: list[int]):
        super().__init__()
        self.stage, self.countdown = stage, countdown

    def forward(self, batch: Any) -> Tensor:
        self.countdown[0] -= 1
        if self.countdown[0] < 0:
            raise PowerCutError
        return self.stage(batch)


def train(student: Student, loader: Any, countdown: int = 10**9, **options: Any) -> RunRecord:
    budget, left = options.pop("budget", Budget(2)), [countdown]
    phases = [
        Phase("first", Cutting(Warm(student), left), budget),
        Phase("main", Cutting(Main(student), left), Budget(3), main=True),
    ]
    run_dir, resume = options.pop("run_dir", None), options.pop("resume", False)
    return Trainer(
        student=student, teacher=None, loader=repeatable(loader, 0, "train loader"), val_loader=None,
        settings=Settings.of({"learning_rate": 0.01, **options}), run_dir=run_dir, resume=resume, allow_changed=(), progress=False,
        logits=None, about=None,
    ).run(lambda directory, accelerator: Setup(phases=phases, task=CLASSES))  # fmt: skip


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


def interrupted_and_resumed(folder: Path, loader: Any, cuts: list[int], **options: Any) -> tuple[Student, RunRecord]:
    """A cut after so many batches each time; a new process would have a new student and a new loader."""
    saved = {"run_dir": folder, "checkpoint_every_steps": 3} | options
    for number, cut in enumerate(cuts):
        try:
            train(Student(seed=number), loader(), countdown=cut, resume=True, **saved)
        except PowerCutError:
            continue
        break
    student = Student(seed=99)
    return student, train(student, loader(), resume=True, **saved)


@pytest.mark.parametrize("name", LOADERS)
def test_with_every_kind_of_loader(tmp_path, name):
    alone = Student()
    record = train(alone, LOADERS[name]())
    for cut in (4, 13, 24):
        student, resumed = interrupted_and_resumed(tmp_path / str(cut), LOADERS[name], [cut])
        assert equal(student, alone), cut
        assert [epoch.loss for epoch in resumed.epochs] == [epoch.loss for epoch in record.epochs]


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "optimizer": st.sampled_from(["adam", "adamw", "sgd"]),
        "accumulate": st.integers(1, 6),
        "clip_norm": st.just(0.1),
        "schedule": st.just("cosine"),
        "mixed_precision": st.just("bf16"),
        "seed": st.integers(0, 3),
        "checkpoint_every_steps": st.integers(1, 4),
        "budget": st.sampled_from([Budget(7, "steps"), Budget(5, "steps"), Budget(4, patience=1, progress=0.5)]),
    },
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 25), min_size=1, max_size=4), options=OPTIONS)
def test_anywhere_with_any_options(tmp_path_factory, cuts, options):
    alone = Student()
    record = train(alone, memory_loader(), **{k: v for k, v in options.items() if k != "checkpoint_every_steps"})
    student, resumed = interrupted_and_resumed(tmp_path_factory.mktemp("run"), memory_loader, cuts, **options)
    assert resumed.steps == record.steps
    assert equal(student, alone)


def test_another_seed_gives_other_bits():  # the comparisons above are not vacuous
    one, other = Student(), Student()
    train(one, memory_loader())
    train(other, memory_loader(), seed=1)
    assert not equal(one, other)


def kills() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kills", BENCHMARKS / "kills.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kills"] = module
    spec.loader.exec_module(module)
    return module


def killed(folder: Path) -> None:
    """In a process of its own: one in which autograd has started threads cannot fork."""

    def work(place: Path) -> None:
        torch.set_num_threads(1)
        train(Student(), memory_loader(), run_dir=place, resume=True, checkpoint_every_steps=1)

    train(Student(), memory_loader())  # loads all the code: the kills are to hit training, not imports
    print(json.dumps(kills().trial(folder, kills=5, seed=0, work=work)))


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills forked processes")
def test_kill_9_at_random_moments(tmp_path):
    code = "import sys, pathlib; from tests.numerics.test_resume import killed; killed(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == 5 and result["unreadable"] == 0 and result["different"] == 0
