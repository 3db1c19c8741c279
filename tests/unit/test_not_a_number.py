"""Numbers that are none: found before the first step, by name, and in no JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.data.loaders import MemoryLoader
from indistill_fx.runs.directory import RunDirectory
from indistill_fx.system.files import json_text, save_json


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    first = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(8 * width, 3))


def loader() -> MemoryLoader:
    images = torch.randint(256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return MemoryLoader(images, torch.arange(24) % 3, mean=(0.5,), std=(0.2,), batch_size=8, shuffle=True)


def distil(teacher: nn.Module, student: nn.Module, place: Path) -> None:
    ifx.distill(
        teacher,
        student,
        loader(),
        curriculum=Curriculum(lengths=1),
        epochs=1,
        run_dir=place,
        progress=False,
        device="cpu",
    )


PLACES = ["0.0.weight", "0.1.running_mean", "1.0.bias", "1.1.running_var", "3.weight"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_that_is_not_finite_is_refused_by_the_name_of_the_tensor(tmp_path, place, role, value):
    models = {"teacher": net(8), "student": net(4)}
    dict(models[role].state_dict())[place].view(-1)[1] = value
    with pytest.raises(ifx.ConfigError, match=rf"The {role}'s `{place}` is not finite") as caught:
        distil(models["teacher"], models["student"], tmp_path / "run")
    assert caught.value.where == place
    assert not (tmp_path / "run").exists()  # before any work


def test_a_teacher_that_is_all_nan_names_three_and_counts_the_rest(tmp_path):
    teacher = net(8)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(ifx.ConfigError, match=r"`0.0.weight`, `0.0.bias`, `0.1.weight` and 7 more are not finite"):
        distil(teacher, net(4), tmp_path)


def test_training_on_labels_looks_too(tmp_path):
    student = net(4)
    student.register_buffer("scale", torch.tensor(torch.nan))
    with pytest.raises(ifx.ConfigError, match="The student's `scale` is not finite"):
        ifx.train(student, loader(), epochs=1, run_dir=tmp_path / "run", progress=False)


def test_masks_and_observers_may_be_infinite_and_stay_so(tmp_path):
    student = net(4)
    student.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    student.register_buffer("least", torch.tensor(torch.inf))
    record = ifx.train(student, loader(), epochs=1, run_dir=tmp_path / "run", progress=False)
    assert record.steps == 3


def test_a_mask_that_becomes_nan_while_training_is_not_saved(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = net(4), 0
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

        def forward(self, x):
            self.calls += self.training
            if self.calls == 2:
                self.mask.mul_(0)
            return self.net(x)

    with pytest.raises(ifx.TrainError, match="`mask` is not finite"):
        ifx.train(Masked(), loader(), epochs=1, run_dir=tmp_path / "run", checkpoint_every_steps=1, progress=False)


def test_nothing_is_measured_of_logits_that_are_nan():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.log(x.mean((1, 2, 3)) - 0.1)[:, None].expand(-1, 3) * torch.tensor([1.0, 2.0, 0.5])

    with pytest.raises(ifx.ConfigError, match="Odd gives NaN for a sample after the first"):
        ifx.evaluate(Odd(), loader())


def no_words(text: str) -> object:
    return json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))


def test_json_holds_no_nan(tmp_path):
    values = {"a": float("nan"), "b": [float("inf"), {"c": -float("inf")}], "d": (1.0, float("nan")), "e": 2.5}
    wanted = {"a": None, "b": [None, {"c": None}], "d": [1.0, None], "e": 2.5}
    assert no_words(json_text(values)) == wanted
    save_json(tmp_path / "x.json", values)
    assert no_words((tmp_path / "x.json").read_text()) == wanted
    with RunDirectory(tmp_path / "run", resume=False) as directory:
        directory.begin(resumed=False, about=values)
        directory.log({"kind": "epoch", "epochs": 1, "step": 1, "val_loss": float("inf")})
    assert no_words((tmp_path / "run" / "run.json").read_text())
    assert no_words((tmp_path / "run" / "metrics.jsonl").read_text())
    with pytest.raises(TypeError):
        json_text({"tensor": torch.ones(1)})  # nothing is made text unasked
