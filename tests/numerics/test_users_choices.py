"""What the user has decided about the models stays so: frozen layers, norms in eval mode, a teacher that stands still, names."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import digest
from indistill_fx.losses.base import Outputs
from indistill_fx.losses.registry import main_loss
from indistill_fx.training.distill import distill
from indistill_fx.training.supervised import train


class Net(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(width)
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
            self.body = nn.Sequential(
                nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.5)
            )
            self.head = nn.Linear(width, 5)
            for norm in (self.stem[1], self.body[1]):
                nn.init.uniform_(norm.running_mean, -0.5, 0.5)
                nn.init.uniform_(norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 3, 16, 16, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(3)
    ]


def run(student: nn.Module, teacher: nn.Module | None = None, **options: Any) -> Any:
    options = {"curriculum": ifx.Curriculum(lengths=1), "epochs": 1, "learning_rate": 0.05} | options
    return distill(Net(16) if teacher is None else teacher, student, batches(), progress=False, device="cpu", **options)


def state(part: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in part.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_frozen_stem_stays_frozen_its_pair_is_left_out_and_the_rest_is_trained(tmp_path: Path) -> None:
    student = Net(8).train()
    for parameter in student.stem.parameters():
        parameter.requires_grad = False
    student.stem.eval()
    before = state(student.stem), state(student.body), state(student.head)
    record = run(student, run_dir=tmp_path)
    assert same(before[0], state(student.stem))  # the statistics of its norm too
    assert not same(before[1], state(student.body)) and not same(before[2], state(student.head))
    assert [stage.name for stage in record.stages] == ["body.2", "main"]
    told = json.loads((tmp_path / "run.json").read_text())
    assert any(
        "left out, no parameter of the student up to there requires a gradient" in line for line in told["schedule"]
    )
    assert not student.stem.training and student.body.training


def test_norms_in_eval_mode_keep_their_statistics_and_others_do_not() -> None:
    student, control = Net(8).train(), Net(8).train()
    student.body[1].eval()
    run(student)
    run(control)
    assert torch.equal(student.body[1].running_mean, Net(8).body[1].running_mean)
    assert not torch.equal(student.stem[1].running_mean, Net(8).stem[1].running_mean)
    assert not torch.equal(control.body[1].running_mean, Net(8).body[1].running_mean)


def test_a_model_that_came_in_eval_mode_is_trained_but_for_its_frozen_norms() -> None:
    student = Net(8).eval()
    for parameter in student.stem[1].parameters():
        parameter.requires_grad = False
    run(student)
    assert torch.equal(student.stem[1].running_mean, Net(8).stem[1].running_mean)
    assert not torch.equal(student.body[1].running_mean, Net(8).body[1].running_mean)


def test_a_run_on_labels_keeps_them_too() -> None:
    student = Net(8).train()
    student.body.eval()
    train(student, batches(), epochs=1, progress=False, device="cpu")
    assert torch.equal(student.body[1].running_mean, Net(8).body[1].running_mean)
    assert not torch.equal(student.stem[1].running_mean, Net(8).stem[1].running_mean)


def test_a_pair_that_cannot_train_is_left_out_with_a_warning_and_nothing_at_all_is_refused() -> None:
    student = Net(8)
    for parameter in student.stem.parameters():
        parameter.requires_grad = False
    with pytest.warns(UserWarning, match="left out, no parameter of the student up to there requires a gradient"):
        stages = ifx.compile_stages(Net(16), student, example_inputs=batches()[0][0])
    assert len(stages) == 2 and stages[-1].name == "main"
    student.requires_grad_(False)
    with pytest.raises(ConfigError, match="has nothing to train"):
        ifx.compile_stages(Net(16), student, example_inputs=batches()[0][0])


def moved_average(teacher: nn.Module) -> None:
    for parameter in teacher.parameters():
        parameter.data.mul_(0.9).add_(0.01)  # raises no version


CHANGES = {
    "an average through .data": moved_average,
    "an average in place": lambda teacher: [p.detach().mul_(0.9) for p in teacher.parameters()],
    "a load": lambda teacher: teacher.load_state_dict({k: v + 1 for k, v in teacher.state_dict().items()}),
    "statistics": lambda teacher: teacher.train()(batches()[0][0]),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_stage_for_which_the_teacher_was_narrowed_refuses_one_that_changes(how: str) -> None:
    teacher = Net(16).eval()
    *warm, _ = ifx.compile_stages(teacher, Net(8), example_inputs=batches()[0][0])
    for stage in warm:
        stage(batches()[0]).backward()
    teacher.load_state_dict(copy.deepcopy(teacher.state_dict()))  # the same values: no change
    for stage in warm:
        stage(batches()[0])
    CHANGES[how](teacher)
    for stage in warm:
        for _ in range(2):
            with pytest.raises(ConfigError, match="The teacher's weights have changed since the stage was compiled"):
                stage(batches()[0])
        with pytest.raises(ConfigError, match="give `compile_stages` a copy"):
            stage.teacher(batches()[0][0])


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("width", [8, 16])
def test_stages_follow_a_teacher_that_changes(how: str, width: int) -> None:
    """The main stage follows any teacher, warm-up stages one of the student's widths."""
    teacher, student = Net(16).eval(), Net(width).eval()
    stages = ifx.compile_stages(teacher, student, example_inputs=batches()[0][0])
    stages = stages if width == 16 else stages[-1:]
    before = [stage(batches()[0]).item() for stage in stages]
    CHANGES[how](teacher)
    after = [stage(batches()[0]).item() for stage in stages]
    teacher.eval()
    anew = ifx.compile_stages(copy.deepcopy(teacher), student, example_inputs=batches()[0][0])
    assert after == pytest.approx([stage(batches()[0]).item() for stage in anew[-len(stages) :]], rel=1e-5)
    assert after != pytest.approx(before, rel=1e-4)


def test_a_mean_teacher_in_a_loop_of_ones_own_is_that_of_plain_pytorch() -> None:
    def mean_teacher(step: Callable[[nn.Module, nn.Module], Callable[[Tensor, Tensor], Tensor]]) -> list[float]:
        student = Net(8).train()
        student.body[3].p = 0.0  # a dropout draws
        teacher = copy.deepcopy(student).eval()
        loss, optimizer, seen = step(teacher, student), torch.optim.SGD(student.parameters(), 0.1), []
        for x, y in batches() * 2:
            optimizer.zero_grad()
            value = loss(x, y)
            value.backward()
            optimizer.step()
            with torch.no_grad():
                for mean, own in zip(teacher.state_dict().values(), student.state_dict().values(), strict=True):
                    mean.copy_(own) if not mean.is_floating_point() else mean.lerp_(own, 0.2)
            seen.append(value.item())
        return seen

    def ours(teacher: nn.Module, student: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        none = ifx.Curriculum(lengths=[])
        (stage,) = ifx.compile_stages(teacher, student, curriculum=none, example_inputs=batches()[0][0])
        return lambda x, y: stage.train()([x, y])

    def plain(teacher: nn.Module, student: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                told = teacher(x)
            return main_loss("kd", student_shapes={}, teacher_shapes={})(logits_of(student(x)), logits_of(told), y)

        def logits_of(x: Tensor) -> Outputs:
            return Outputs(x, None, {})

        return loss

    found = mean_teacher(ours)
    assert found == pytest.approx(mean_teacher(plain), rel=1e-4) and len(set(found)) == len(found) > 3


def test_a_copied_stage_has_its_teacher_still() -> None:
    teacher = Net(16).eval()
    stage = copy.deepcopy(ifx.compile_stages(teacher, Net(8), example_inputs=batches()[0][0])[-1])
    assert torch.isfinite(stage(batches()[0]))


def test_models_that_torch_compile_has_wrapped_are_the_users_own(tmp_path: Path) -> None:
    plain = Net(8)
    expected = run(plain)
    student = torch.compile(Net(8))
    found = run(student, torch.compile(Net(16)), run_dir=tmp_path)
    assert [stage.name for stage in found.stages] == [stage.name for stage in expected.stages]
    assert found.digest == expected.digest == digest(plain)
    assert load_file(tmp_path / "student.safetensors").keys() == plain.state_dict().keys()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["student"]["name"] == "Net" and all("_orig_mod" not in pair["student"] for pair in plan["pairs"])
