"""A main loss of the user's own is given the features of a pair in one size, the larger one average-pooled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.curriculum import Curriculum
from indistill_fx.losses import Outputs
from tests.nets import unsettle


def net(width: int, stride: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        layers = [nn.Conv2d(3, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]
        return unsettle(nn.Sequential(*layers)).eval()


def attention(student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
    parts = [(own.mean(1) - teacher.features[name].mean(1)).square().mean() for name, own in student.features.items()]
    return torch.stack(parts).sum()


attention.needs = frozenset({"features"})  # type: ignore[attr-defined]


@pytest.mark.parametrize("strides", [(1, 2), (2, 1)])
def test_the_larger_map_is_pooled_whoevers_it_is(strides):
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    teacher, student = net(8, strides[0]), net(6, strides[1])
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[("5", "5")])
    plan = plan.model_copy(update={"pairs": tuple(pair for pair in plan.pairs if pair.student == "5")})
    none = Curriculum(lengths=[])
    stage = ifx.compile_stages(teacher, student, plan, example_inputs=x, main=attention, curriculum=none)[-1].eval()
    with torch.no_grad():
        own, theirs = student[:6](x), teacher[:6](x)
        assert own.shape[2:] != theirs.shape[2:]
        least = min(own.shape[2], theirs.shape[2])
        pooled = [F.adaptive_avg_pool2d(one, least).mean(1) for one in (own, theirs)]
        expected = (pooled[0] - pooled[1]).square().mean()
    assert stage((x, torch.arange(4))).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_loss_that_wants_them_as_they_are_says_so():
    x = torch.randn(2, 3, 16, 16)
    teacher, student = net(8, 1), net(6, 2)
    seen = {}

    def sizes(own: Outputs, theirs: Outputs, labels: Tensor | None) -> Tensor:
        seen.update({name: (own.features[name].shape[2], value.shape[2]) for name, value in theirs.features.items()})
        return own.features["5"].sum()

    sizes.needs, sizes.one_size = frozenset({"features"}), False  # type: ignore[attr-defined]
    plan = ifx.align(teacher, student, example_inputs=x, fixed=[("5", "5")])
    none = Curriculum(lengths=[])
    ifx.compile_stages(teacher, student, plan, example_inputs=x, main=sizes, curriculum=none)[-1]((x, torch.arange(2)))
    assert seen["5"] == (4, 8)
