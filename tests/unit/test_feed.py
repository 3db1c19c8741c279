"""All segments in one stage, each fed with the teacher's features."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import indistill_fx as ifx
from indistill_fx.curriculum import PAIRS, SEGMENTS, Curriculum
from tests.nets import Cnn32, Residual, TinyTransformer, images, seeded, unsettle

FED = Curriculum(feed="teacher")


def pair_of(make=Residual, size=16, **kwargs):
    """A teacher, and a student made of it with half its channels."""
    teacher = unsettle(seeded(make, **kwargs))
    traced = ifx.trace(teacher, (images(4, size),), role="teacher")
    small = ifx.shrink(traced, ratio=0.5).value.graph_module
    for parameter in small.parameters():
        parameter.requires_grad_()
    return traced, ifx.trace(small, (images(4, size),), role="student")


def test_one_stage_for_all_pairs_with_a_plus_one_epochs():
    teacher, student = pair_of()
    stages = ifx.compile_stages(teacher, student, curriculum=FED)
    assert [stage.name for stage in stages] == [SEGMENTS, "main"]
    assert stages[0].budget.length == 3
    assert len(stages[0].pairs) > 1
    assert stages[0].inputs == stages[1].inputs
    lengths = [Curriculum(feed="teacher", lengths=n).chosen(["a", "b"])[SEGMENTS].length for n in (6, [4])]
    assert lengths == [6, 4]
    assert Curriculum(feed="teacher", lengths=0).chosen(["a", "b"]) == {}
    with pytest.raises(ifx.ConfigError, match="3 lengths for the one stage"):
        Curriculum(feed="teacher", lengths=[1, 2, 3]).chosen(["a", "b"])
    with pytest.raises(ifx.ConfigError, match="feed is 'pupil'"):
        Curriculum(feed="pupil")


def test_gradients_are_those_of_segments_cut_out_by_hand():
    """The same student, its segments run one by one on the teacher's features."""
    teacher = unsettle(seeded(Cnn32)).eval().double()
    small = unsettle(seeded(Cnn32, (8, 16, 32), 64, seed=1), seed=1).double()
    x, example = images(6, 32, seed=2).double(), images(2, 32).double()
    plan = ifx.align(teacher, small, example_inputs=example)
    stage = ifx.compile_stages(teacher, small, plan, curriculum=FED, example_inputs=example)[0].train()
    assert [pair.student for pair in plan.pairs] == ["pool", "pool@2", "pool@3"]
    by_hand = copy.deepcopy(small).train()
    stage(x).backward()

    def block(net: nn.Module, k: int, value: torch.Tensor) -> torch.Tensor:
        return net.pool(F.relu(getattr(net, f"conv{k}_bn")(getattr(net, f"conv{k}")(value))))

    with torch.no_grad():
        features = [x]
        for k in (1, 2, 3):
            features.append(block(teacher, k, features[-1]))
        fed = [x, *(f[:, list(pair.kept)] for f, pair in zip(features[1:], plan.pairs, strict=True))]
    for k in (1, 2, 3):
        F.mse_loss(block(by_hand, k, fed[k - 1]), fed[k]).backward()
    checked = 0
    for (name, got), (_, expected) in zip(small.named_parameters(), by_hand.named_parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), name
        if got.grad is not None:
            assert torch.allclose(got.grad, expected.grad, rtol=1e-6, atol=1e-9), name
            checked += 1
    assert checked == 12


@pytest.mark.parametrize(("make", "size"), [(Residual, 16), (TinyTransformer, 16), (Cnn32, 32)])
def test_a_perfect_student_has_no_loss(make, size):
    """A student that is the teacher gives, segment by segment, what it is to give."""
    teacher = unsettle(seeded(make)).eval()
    same = copy.deepcopy(teacher)
    stages = ifx.compile_stages(teacher, same, curriculum=FED, example_inputs=images(4, size))
    with torch.no_grad():
        assert float(stages[0].eval()(images(5, size, seed=1))) < 1e-9


def test_all_pairs_in_one_stage_from_the_students_own_features():
    """The mean of the pairs' losses, each relative to that of the teacher's mean feature; by hand in float64."""
    teacher = unsettle(seeded(Cnn32)).eval().double()
    small = unsettle(seeded(Cnn32, (8, 16, 32), 64, seed=1), seed=1).double()
    x, example = images(6, 32, seed=2).double(), images(2, 32).double()
    plan = ifx.align(teacher, small, example_inputs=example)
    joint = Curriculum(together=True)
    stages = ifx.compile_stages(teacher, small, plan, curriculum=joint, example_inputs=example)
    assert [(stage.name, stage.budget and stage.budget.length) for stage in stages] == [(PAIRS, 3), ("main", None)]
    by_hand = copy.deepcopy(small).train()
    loss = stages[0].train()(x)
    loss.backward()

    def features(net: nn.Module) -> list[torch.Tensor]:
        found = [x]
        for k in (1, 2, 3):
            found.append(net.pool(F.relu(getattr(net, f"conv{k}_bn")(getattr(net, f"conv{k}")(found[-1])))))
        return found[1:]

    wanted = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        goals = [t[:, pair.kept] for t, pair in zip(features(teacher), plan.pairs, strict=True)]
    for own, goal in zip(features(by_hand), goals, strict=True):
        wanted = wanted + F.mse_loss(own, goal) / (goal - goal.mean(0)).square().mean() / 3
    wanted.backward()
    assert torch.allclose(loss, wanted, rtol=1e-12)
    for (name, one), other in zip(small.named_parameters(), by_hand.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12), name


def test_a_batch_of_one_has_a_loss_too():
    teacher, student = pair_of()
    stage = ifx.compile_stages(teacher, student, curriculum=Curriculum(together=True))[0].eval()
    assert torch.isfinite(stage(images(1)))


def test_it_trains_and_says_the_loss_of_every_segment(tmp_path):
    teacher, student = pair_of()
    data = [(images(8, seed=k), torch.arange(8) % 5) for k in range(3)]
    before = copy.deepcopy(student.module)
    record = ifx.distill(
        teacher, student, data, curriculum=Curriculum(feed="teacher", lengths=4), epochs=1, progress=False, device="cpu"
    )
    stage = record.stages[0]
    assert stage.name == SEGMENTS
    assert stage.losses[-1] < stage.losses[0]
    assert stage.notes[-1].startswith("loss by segment: ")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), student.module.parameters(), strict=True))


def test_features_from_a_cache_feed_too():
    teacher, student = pair_of()
    stage = ifx.compile_stages(teacher, student, curriculum=FED)[0].train()
    x = images(4, seed=3)
    with torch.no_grad():
        features, _ = stage.teacher(x)
    name = stage.inputs[0]
    other = stage.without_teacher()({name: x, "teacher_features": features})
    assert torch.equal(stage(x), other)


def test_a_place_that_is_gone_around_is_refused():
    class Around(nn.Module):
        """What `first` makes goes past `second`."""

        def __init__(self, width=8):
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(cin, width, 3, padding=1) for cin in (3, width, width))
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            x = self.first(x)
            y = self.second(x)
            return self.head(self.third(y + x.tanh()).mean((2, 3)))

    teacher, student = seeded(Around, 8), seeded(Around, 4)
    shapes = ifx.align(teacher, student, example_inputs=images())
    traced = [ifx.trace(m, (images(),), role=r) for m, r in ((teacher, "teacher"), (student, "student"))]
    plan = ifx.align(*traced, fixed=[("second", "second"), ("third", "third")])
    with pytest.raises(ifx.MatchError, match="`third` also depends on `first`, past `second`"):
        ifx.compile_stages(*traced, plan, curriculum=FED)
    assert shapes is not None


def test_a_feature_of_another_size_cannot_feed():
    class Net(nn.Module):
        def __init__(self, width, stride):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, width, 3, stride, 1), nn.Conv2d(width, width, 3, 3 - stride, 1)
            self.head = nn.Linear(width, 10)

        def forward(self, x):
            return self.head(self.two(self.one(x)).mean((2, 3)))

    traced = [
        ifx.trace(seeded(Net, width, stride), (images(),), role=role)
        for width, stride, role in ((8, 2, "teacher"), (4, 1, "student"))
    ]
    plan = ifx.align(*traced, fixed=[("one", "one"), ("two", "two")])
    with pytest.raises(ifx.MatchError, match="cannot replace the student's `one`"):
        ifx.compile_stages(*traced, plan, curriculum=FED)
