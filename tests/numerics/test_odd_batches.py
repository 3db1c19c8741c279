"""Batches and models as users bring them that were once trained on without a word, or blamed on something else."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.errors import ConfigError


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
    )  # fmt: skip


X, Y = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def distill(teacher: nn.Module, student: nn.Module, loader: Iterable[Any], **options: Any) -> Any:
    quick: dict[str, Any] = {"epochs": 1, "progress": False, "device": "cpu", "curriculum": Curriculum(lengths=1)}
    return ifx.distill(teacher, student, loader, **(quick | options))


def test_an_empty_batch_is_left_out():
    """Its loss is NaN, and the learning rate was blamed."""
    students = [net(4), net(4)]
    distill(net(8), students[0], [(X, Y), (X[:0], Y[:0])])
    distill(net(8), students[1], [(X, Y)])
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_nan_in_the_first_batch_is_the_datas():
    """The trace was refused, as if the model were at fault."""
    with pytest.raises(ConfigError, match="first batch, or the example input, of the teacher holds NaN"):
        distill(net(8), net(4), [(X * float("nan"), Y)])


def test_a_student_that_shares_what_it_trains_with_its_teacher_is_refused():
    """It was called a defect of ours after training."""
    teacher, student = net(8), net(8)
    student[5] = teacher[5]
    with pytest.raises(ConfigError, match=r"`5\.weight` of the student is `5\.weight` of the teacher"):
        distill(teacher, student, [(X, Y)])
    with pytest.raises(ConfigError, match="training would change the teacher"):
        distill(teacher, teacher, [(X, Y)])
    student[5].requires_grad_(False)  # a classifier that is the teacher's own and stays it
    before = copy.deepcopy(teacher[5].state_dict())
    distill(teacher, student, [(X, Y)])
    assert all(torch.equal(before[name], value) for name, value in teacher[5].state_dict().items())


@pytest.mark.parametrize("epochs", [1.5, "2"])
def test_epochs_are_whole_numbers(epochs):
    with pytest.raises(ConfigError, match="epochs` is"):
        distill(net(8), net(4), [(X, Y)], epochs=epochs)


@pytest.mark.parametrize("batch", [None, 7, [(None, None)]])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(ConfigError):
        distill(net(8), net(4), [batch])


def test_a_run_whose_first_batch_is_refused_can_be_started_again_in_its_directory(tmp_path):
    """It left a begun run, which the same command, its data mended, refused to write over."""
    out_of_range = [(X, torch.full((6,), 7))]
    with pytest.raises(ConfigError, match="label"):
        distill(net(8), net(4), out_of_range, run_dir=tmp_path / "run", curriculum=Curriculum(lengths=[]))
    distill(net(8), net(4), [(X, Y)], run_dir=tmp_path / "run")
    assert '"status": "done"' in (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(ConfigError, match="already holds a run"):
        distill(net(8), net(4), [(X, Y)], run_dir=tmp_path / "run")
