"""The penultimate vectors as the warm-up's last pair."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.errors import ConfigError
from indistill_fx.stages.compile import joint_teachers, warmup_plan
from indistill_fx.target import Target
from indistill_fx.training.distill import distill
from tests.nets import Cnn32, seeded, unsettle
from tests.unit.test_feature_cache import loader

LAST = ifx.Curriculum(lengths=[], penultimate=2)


def pair() -> tuple[nn.Module, nn.Module]:
    return unsettle(seeded(Cnn32)).eval(), unsettle(seeded(Cnn32, (8, 16, 32), 64, seed=1)).eval()


def penultimate(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    seen = []
    with module.fc2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])), torch.no_grad():
        module(x)
    return seen[0]


def test_the_last_stage_compares_the_vectors_before_the_classifier():
    teacher, student = pair()
    x = torch.randn(5, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x)
    stages = ifx.compile_stages(teacher, student, plan, example_inputs=x, curriculum=ifx.Curriculum(penultimate=6))
    assert [stage.budget.length for stage in stages[:-1]] == [3, 4, 5, 6]
    kept = list(plan.embedding.kept)
    assert len(kept) == 64 and kept == sorted(set(kept)) and kept[-1] < 128
    expected = nn.functional.mse_loss(penultimate(student, x), penultimate(teacher, x)[:, kept])
    torch.testing.assert_close(stages[3].eval()(x).detach(), expected)
    # without being asked for, nothing of it
    assert len(ifx.compile_stages(teacher, student, plan, example_inputs=x)) == 4


def test_the_main_loss_still_reads_the_whole_vector():
    teacher, student = pair()
    x = torch.randn(5, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x)
    traced = ifx.trace(teacher, x, role="teacher"), ifx.trace(student, x, role="student")
    both = [ifx.compile_stages(*traced, plan, main="pkt", curriculum=c) for c in (LAST, ifx.Curriculum(lengths=[]))]
    values = [stages[-1].eval()(x) for stages in both]
    assert [stage.name for stage in both[0]] == [plan.embedding.student, "main"]
    assert torch.equal(*values)
    joint = joint_teachers(*traced, warmup_plan(plan, LAST)[0], both[0], Target())
    assert [[stage.name for stage in group] for group, _ in joint] == [[plan.embedding.student], ["main"]]
    (((_, one)), (_, other)) = joint
    assert [next(iter(graph(x)[0].values())).shape for graph in (one, other)] == [(5, 64), (5, 128)]


def test_with_the_cache_it_trains_the_same(tmp_path):
    teacher, student = pair()
    twin = copy.deepcopy(student)
    settings = {"epochs": 1, "curriculum": LAST, "main": "pkt", "progress": False}
    records = [distill(teacher, student, loader(), **settings)]
    records.append(distill(teacher, twin, loader(), feature_cache=tmp_path, **settings))
    for one, other in zip(records[0].stages, records[1].stages, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
    assert [stage.steps for stage in records[0].stages] == [10, 5]


def test_a_pair_that_has_the_vector_already_is_not_doubled():
    teacher, student = pair()
    x = torch.randn(2, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x)
    last = plan.embedding
    fixed = ifx.align(teacher, student, example_inputs=x, fixed=[(last.teacher, last.student)])
    assert any(pair.student == last.student for pair in fixed.pairs)
    assert fixed.with_penultimate() is fixed
    none = plan.model_copy(update={"embedding": None})
    assert none.with_penultimate() is none


def test_a_plan_of_an_earlier_version_is_completed_for_the_warm_up_and_refused_for_keeping():
    teacher, student = pair()
    x = torch.randn(5, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x)
    old = plan.model_copy(update={"embedding": plan.embedding.model_copy(update={"kept": None})})
    stages = [
        ifx.compile_stages(teacher, student, one, example_inputs=x, curriculum=LAST)[0].eval() for one in (plan, old)
    ]
    assert torch.equal(stages[0](x), stages[1](x))  # the same channels: narrow ranks them as align does
    with pytest.raises(ConfigError, match="does not say which channels of the teacher's penultimate vector"):
        ifx.compile_stages(teacher, student, old, example_inputs=x, curriculum=ifx.Curriculum(keep=0.1))


def test_models_without_penultimate_vectors_are_warmed_up_without_them_and_cannot_keep_them():
    teacher, student = pair()
    x = torch.randn(5, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x).model_copy(update={"embedding": None})
    stages = ifx.compile_stages(
        teacher, student, plan, example_inputs=x, curriculum=ifx.Curriculum(lengths=1, penultimate=3)
    )
    assert [stage.name for stage in stages] == ["pool", "pool@2", "pool@3", "main"]
    with pytest.raises(ConfigError, match="kept in the main stage, because the plan has no such vectors"):
        ifx.compile_stages(teacher, student, plan, example_inputs=x, curriculum=ifx.Curriculum(keep=0.1))


@pytest.mark.parametrize(("main", "unit"), [("kd", 1.0), ("pkt", 1e-3), (lambda s, t, labels: s.logits.mean(), 1.0)])
def test_the_main_stage_may_keep_the_loss_of_the_last_pair(main, unit):
    teacher, student = pair()
    batch = torch.randn(5, 3, 32, 32), torch.arange(5)
    plan = ifx.align(teacher, student, example_inputs=batch[0])
    curricula = [ifx.Curriculum(lengths=[], keep=keep) for keep in (0, 0.5)]
    values = []
    for curriculum in curricula:
        (stage,) = ifx.compile_stages(teacher, student, plan, main=main, example_inputs=batch[0], curriculum=curriculum)
        values.append(stage.eval()(batch).detach())
    kept = list(plan.embedding.kept)
    feature = nn.functional.mse_loss(penultimate(student, batch[0]), penultimate(teacher, batch[0])[:, kept])
    torch.testing.assert_close(values[1] - values[0], 0.5 * unit * feature, rtol=1e-4, atol=1e-6)
    assert feature > 0.01


@pytest.mark.parametrize("loss", ["mse", "pkt"])
def test_a_wider_student_is_compared_on_its_first_channels(loss):
    student, teacher = pair()
    x = torch.randn(5, 3, 32, 32)
    plan = ifx.align(teacher, student, example_inputs=x)
    assert plan.embedding.kept is None
    stages = [
        ifx.compile_stages(
            teacher,
            student,
            plan,
            main="pkt",
            example_inputs=x,
            curriculum=ifx.Curriculum(lengths=[], keep=keep, loss=loss),
        )[0].eval()
        for keep in (0, 2)
    ]
    vectors = penultimate(student, x), penultimate(teacher, x)
    pkt = stages[0](x).detach()  # works across widths, and is the main loss itself
    expected = nn.functional.mse_loss(vectors[0][:, :64], vectors[1]) if loss == "mse" else pkt
    torch.testing.assert_close((stages[1](x) - stages[0](x)).detach(), 0.002 * expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("keep", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(keep):
    with pytest.raises(ConfigError, match="keep"):
        ifx.Curriculum(keep=keep)


@pytest.mark.parametrize(
    ("has", "remarks"),
    [(True, []), (False, ["penultimate vectors: no warm-up stage of their own, because the plan has none"])],
)
def test_the_schedule_says_if_there_are_none(has, remarks, tmp_path):
    teacher, student = pair()
    plan = ifx.align(teacher, student, example_inputs=torch.randn(2, 3, 32, 32))
    plan = plan if has else plan.model_copy(update={"embedding": None})
    distill(teacher, student, loader(), plan=plan, curriculum=LAST, epochs=1, progress=False, run_dir=tmp_path)
    schedule = json.loads((tmp_path / "run.json").read_text())["schedule"]
    schedule = [line for line in schedule if "normalisation" not in line]
    stages = [f"{plan.embedding.student}: 2 epochs, adam, learning rate 0.001"] if has else []
    assert schedule == [*stages, "main: 1 epoch, adam, learning rate 0.001", *remarks]
