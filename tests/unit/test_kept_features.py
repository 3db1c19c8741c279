"""The warm-up's loss on all pairs, kept in the main stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import indistill_fx as ifx
from indistill_fx.demo import DigitsStudent, DigitsTeacher
from indistill_fx.errors import ConfigError
from indistill_fx.losses import Outputs, warmup_loss
from indistill_fx.losses.stage_losses import PairsLoss


def models() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    teacher, student = DigitsTeacher(), DigitsStudent()
    for norm in (part for part in teacher.modules() if isinstance(part, nn.BatchNorm2d)):  # fresh ones hide errors
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return (
        teacher.double().eval(),
        student.double(),
        torch.randn(16, 1, 8, 8, dtype=torch.float64),
        torch.arange(16) % 10,
    )


def main_stage(teacher: nn.Module, student: nn.Module, x: Tensor, **curriculum: object) -> ifx.Stage:
    return ifx.compile_stages(
        teacher, student, main="kd", example_inputs=x[:2], curriculum=ifx.Curriculum(lengths=[], **curriculum)
    )[-1]


def test_it_is_the_mean_relative_distance_from_the_kept_channels_by_hand() -> None:
    teacher, student, x, labels = models()
    plan = ifx.align(teacher, student, example_inputs=x[:2])
    alone, kept = main_stage(teacher, student, x), main_stage(teacher, student, x, keep_features=3.0)
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _m, _i, out, key=(role + name): found.update({key: out}))
        for pair in plan.pairs
        for role, model, name in (("t", teacher, pair.teacher), ("s", student, pair.student))
    ]
    student.train()
    base = alone([x, labels])
    with torch.no_grad():
        teacher(x)
    student(x)
    parts = []
    for pair in plan.pairs:
        own, other = found["s" + pair.student], found["t" + pair.teacher][:, list(pair.kept or ())]
        constant = other.mean(0, keepdim=True).expand_as(other)
        parts.append(F.mse_loss(own, other) / F.mse_loss(constant, other))
    wanted = base + 3.0 * kept.criterion.unit * torch.stack(parts).mean()
    for handle in handles:
        handle.remove()
    got = kept([x, labels])
    assert len(parts) == 3 and torch.allclose(got, wanted, rtol=1e-9)
    first = next(iter(student.parameters()))
    gradients = [torch.autograd.grad(loss, first, retain_graph=True)[0] for loss in (got, wanted, base)]
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-2)  # it is not the main loss alone


def test_only_the_layers_of_the_curriculum_are_kept() -> None:
    teacher, student, x, labels = models()
    student.eval()
    one = main_stage(teacher, student, x, keep_features=1.0, layers=["blocks.1"])
    assert one.criterion.pairs.keys == ("blocks.1",)
    assert one([x, labels]) > main_stage(teacher, student, x)([x, labels])


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="keep_features"):
        ifx.Curriculum(keep_features=weight)


def test_a_main_loss_that_reads_features_itself_refuses_it() -> None:
    teacher, student, x, _ = models()
    with pytest.raises(ConfigError, match="compares features itself"):
        ifx.compile_stages(
            teacher, student, main="at", example_inputs=x[:2], curriculum=ifx.Curriculum(lengths=[], keep_features=1.0)
        )


def test_models_without_pairs_refuse_it() -> None:
    teacher, _, x, _ = models()
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    with pytest.raises(ifx.IndistillError, match="pair"):
        main_stage(teacher, student, x, keep_features=1.0)


def test_a_run_says_it_resumes_under_it_alone_and_trains_the_same_from_the_cache(tmp_path) -> None:
    data = ifx.open_data("digits", limit=64, batch_size=32, augment=False)
    teacher = models()[0].float()
    curriculum = ifx.Curriculum(together=True, lengths=1, keep_features=10.0)

    def run(name: str, **more: object) -> nn.Module:
        torch.manual_seed(1)
        student = DigitsStudent()
        common = {"curriculum": curriculum, "epochs": 2, "progress": False, "device": "cpu", **more}
        ifx.distill(teacher, student, data.train, run_dir=tmp_path / name, **common)
        return student

    plain, cached = run("plain"), run("cached", feature_cache=tmp_path / "features")
    for a, b in zip(plain.state_dict().values(), cached.state_dict().values(), strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=1e-4, atol=1e-5)
    assert "10 times the loss of the pairs' features" in (tmp_path / "plain" / "run.json").read_text()
    with pytest.raises(ConfigError, match="what is added to the main loss"):
        run("plain", curriculum=ifx.Curriculum(together=True, lengths=1), epochs=3, resume=True)


def test_the_recent_loss_of_a_pair_may_be_negative() -> None:
    """A loss below 0 counted as none at all, so that the mean over steps was the last step's value."""
    pairs = PairsLoss(warmup_loss(lambda student, teacher: student.mean() - teacher.mean()), ["layer"])
    teacher = Outputs(None, None, {"layer": torch.zeros(2, 3)})
    for value in (-1.0, -2.0):
        pairs(Outputs(None, None, {"layer": torch.full((2, 3), value)}), teacher, None)
    torch.testing.assert_close(pairs.recent, torch.tensor([-1.02]))


class Wide(nn.Module):
    def __init__(self, width: int, last: int | None = None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU())
        self.vector = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last = nn.Linear(width, last) if last else nn.Identity()
        self.fc = nn.Linear(last or width, 10)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.last(self.vector(self.body(x))))
        return scores


def refused(teacher: nn.Module, student: nn.Module, plan: ifx.AlignmentPlan, x: Tensor, role: str) -> None:
    curriculum = ifx.Curriculum(lengths=[], keep_features=1.0)
    with pytest.raises(ConfigError, match=f"reads all channels of the {role}'s"):
        ifx.compile_stages(teacher, student, plan, main="pkt", example_inputs=x, curriculum=curriculum)


def test_a_pair_whose_layer_the_main_loss_reads_whole_is_refused() -> None:
    x = torch.randn(4, 1, 8, 8)
    models = Wide(16), Wide(8)
    plan = ifx.align(*models, example_inputs=x, fixed=[("vector", "vector")], pairs=1)
    refused(*models, plan, x, "teacher")
    aliases = [tap for tap in ifx.trace(models[0], x).taps if tap.startswith("vector.") or tap.startswith("vector:")]
    assert "vector.1" in aliases  # the same tensor under another name, as a plan written by hand may have it
    (pair,) = plan.pairs
    other = plan.model_copy(update={"pairs": (pair.model_copy(update={"teacher": "vector.1"}),)})
    refused(*models, other, x, "teacher")


def test_a_pair_of_the_students_penultimate_vector_that_would_be_cut_is_refused() -> None:
    x = torch.randn(4, 1, 8, 8)
    teacher, student = Wide(16, last=24), Wide(32)
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[("vector", "vector")], pairs=1)
    assert plan.embedding is not None and plan.embedding.student == "vector" != plan.embedding.teacher
    refused(teacher, student, plan, x, "student")


@pytest.mark.parametrize("student", [DigitsTeacher, DigitsStudent])
def test_with_auto_lengths_the_stages_are_chosen_as_without_a_curriculum(
    student: type[nn.Module], tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("indistill_fx.training.recipes._LEAST_STEPS_NEW", 15)
    data = ifx.open_data("digits", limit=512, batch_size=32, augment=False)
    teacher = models()[0].float()

    def run(name: str, curriculum: ifx.Curriculum | None) -> list[tuple[str, int]]:
        common = {"epochs": 2, "progress": False, "device": "cpu", "run_dir": tmp_path / name}
        record = ifx.distill(teacher, student(), data.train, curriculum=curriculum, **common)
        return [(stage.name, stage.epochs) for stage in record.stages]

    chosen = run("chosen", None)
    assert run("kept", ifx.Curriculum(lengths="auto", keep_features=10.0)) == chosen
    assert len(chosen) == (2 if student is DigitsTeacher else 1)
    texts = [(tmp_path / name / "run.json").read_text() for name in ("chosen", "kept")]
    assert ["10 times the loss of the pairs' features" in text for text in texts] == [False, True]


def test_auto_lengths_have_no_stages_by_themselves() -> None:
    with pytest.raises(ConfigError, match="only `distill` chooses them"):
        ifx.Curriculum(lengths="auto").schedule(3)
    with pytest.raises(ConfigError, match="'none'"):
        ifx.Curriculum(lengths="none")
