from __future__ import annotations

import errno
import os
import random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from indistill_fx.errors import ConfigError, TrainError
from indistill_fx.runs import checkpoint
from indistill_fx.system import tensor_files
from indistill_fx.training.options.optimizers import make_optimizer


def stepped(name: str, seed: int, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = make_optimizer(name, list(module.parameters()), learning_rate=0.1, weight_decay=0.0, momentum=0.9)
    advance(module, optimizer, steps)
    return module, optimizer


def advance(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        module(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_model_and_optimiser_go_on_from_a_checkpoint_with_the_same_bits(tmp_path, name):
    module, optimizer = stepped(name, seed=0)
    tensors, values = checkpoint.optimizer_tensors(optimizer)
    path = tmp_path / "last.safetensors"
    checkpoint.save_checkpoint(path, checkpoint.model_tensors(module, None) | tensors, {"optimizer": values, "x": 0.1})
    other, fresh = stepped(name, seed=1, steps=1)
    saved, state = checkpoint.load_checkpoint(path)
    checkpoint.restore_model(checkpoint.model_tensors(other, None), saved)
    checkpoint.restore_optimizer(fresh, saved, state["optimizer"])
    assert state["x"] == 0.1
    advance(module, optimizer, 4)
    advance(other, fresh, 4)
    for mine, theirs in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_without_the_optimisers_state_the_bits_differ(tmp_path):  # the check above is not vacuous
    module, optimizer = stepped("adam", seed=0)
    other, fresh = stepped("adam", seed=0, steps=0)
    other.load_state_dict(module.state_dict())
    advance(module, optimizer, 2)
    advance(other, fresh, 2)
    assert not torch.equal(module[0].weight, other[0].weight)


def test_tied_weights_are_stored_once_and_exported_under_every_name(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert sorted(checkpoint.model_tensors(module, None)) == ["student/0.bias", "student/0.weight", "student/1.bias"]
    tensor_files.save_tensors(tmp_path / "student.safetensors", checkpoint.state_tensors(module))

    fresh = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    fresh.load_state_dict(load_file(tmp_path / "student.safetensors"))
    assert torch.equal(fresh[1].weight, module[0].weight)


def test_the_stages_own_tensors_are_kept_and_the_teachers_are_not():
    student = nn.Linear(2, 2)
    stage = nn.ModuleDict({"student": student, "teacher": nn.Linear(2, 2), "criterion": nn.BatchNorm1d(2)})
    names = checkpoint.model_tensors(student, stage, without=stage["teacher"])
    assert {name for name in names if name.startswith("student/")} == {"student/weight", "student/bias"}
    assert {name.split(".")[0] for name in names if name.startswith("stage/")} == {"stage/criterion"}


@pytest.mark.parametrize("fails", ["save_file", "fsync", "replace"])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "last.safetensors"
    checkpoint.save_checkpoint(path, {"x": torch.ones(3)}, {"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        *{"save_file": (tensor_files, "save_file"), "fsync": (os, "fsync"), "replace": (os, "replace")}[fails], full
    )
    with pytest.raises(TrainError, match=r"No space left on device.*What was there before is unchanged"):
        checkpoint.save_checkpoint(path, {"x": torch.zeros(3)}, {"step": 2})
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.safetensors"]
    tensors, state = checkpoint.load_checkpoint(path)
    assert state == {"step": 1} and torch.equal(tensors["x"], torch.ones(3))


def test_anything_else_is_no_checkpoint(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoint.load_checkpoint(path)
    tensor_files.save_tensors(path, {"x": torch.ones(2)})
    with pytest.raises(ConfigError, match="not a checkpoint"):
        checkpoint.load_checkpoint(path)
    whole = path.read_bytes()
    for length in random.Random(0).sample(range(len(whole)), 10):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="not a checkpoint"):
            checkpoint.load_checkpoint(path)


def test_another_models_checkpoint_is_refused_and_writes_nothing():
    module = nn.Linear(2, 2)
    before = module.weight.clone()
    for saved in (
        {"student/weight": torch.zeros(2, 2)},
        {"student/weight": torch.zeros(2, 3), "student/bias": torch.zeros(2)},
    ):
        with pytest.raises(ConfigError, match="another model"):
            checkpoint.restore_model(checkpoint.model_tensors(module, None), saved)
    assert torch.equal(module.weight, before)


def test_a_number_that_a_checkpoint_lacks_is_called_absent_and_the_live_one_is_not():
    with pytest.raises(ConfigError, match=r"`student/x` is absent there, not \(\)\."):
        checkpoint.restore_model({"student/x": torch.tensor(1.0)}, {})


def test_not_finite_names_the_tensors():
    tensors = {"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")]), "c": torch.tensor([1, 2])}
    assert checkpoint.not_finite(tensors) == ["b"]


@pytest.mark.parametrize("parameters", [1, 100], ids=["of one parameter", "of all"])
def test_an_optimiser_state_that_lacks_an_entry_is_refused(parameters):
    """It was torch's own `KeyError`, exit code 1."""
    _, optimizer = stepped("adam", 0)
    tensors, values = checkpoint.optimizer_tensors(optimizer)
    lost = [name for name in tensors if name.endswith("/step")][:parameters]
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    _, other = stepped("adam", 1)
    checkpoint.restore_optimizer(other, tensors, values)
    with pytest.raises(ConfigError, match="belongs to another optimiser"):
        checkpoint.restore_optimizer(other, kept, values)
