"""A loss is tried on the first batch and everything is as it was; what cannot be trained by is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from indistill_fx.errors import ConfigError
from indistill_fx.graph.module_state import digest
from indistill_fx.training.trial import require_loss

BATCH = torch.ones(4, 3)


class Loss(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.net, self.last = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout()), last
        self.register_buffer("calls", torch.zeros(()))
        self.memory = 0

    def forward(self, batch):
        self.calls += 1
        self.memory += 1
        torch.rand(1)
        return self.last(self.net(batch))


def test_nothing_is_changed():
    module = Loss(torch.sum)
    before, state = digest(module), torch.get_rng_state()
    require_loss(module, BATCH, "It")
    assert digest(module) == before and module.memory == 0 and torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in module.parameters()) and module.training


@pytest.mark.parametrize(
    ("last", "told"),
    [
        (lambda y: y, r"It returns a tensor of shape \(4, 2\), not one number"),
        (lambda y: 1.0, "It returns a float"),
        (lambda y: y.sum().detach(), "would train nothing"),
        (lambda y: y.sum().long(), "not one number"),
        (lambda y: y[9], r"It fails on the first batch: IndexError: .*test_trial\.py:"),
    ],
)
def test_what_cannot_be_trained_by_is_refused(last, told):
    with pytest.raises(ConfigError, match=told):
        require_loss(Loss(last), BATCH, "It")


def test_frozen_students_are_left_alone():
    module = Loss(lambda y: y)
    module.requires_grad_(False)
    require_loss(module, BATCH, "It")


class Late(nn.Module):
    """Makes its weights at the first call, when the optimiser is there already."""

    def __init__(self):
        super().__init__()
        self.project = None

    def forward(self, y):
        if self.project is None:
            self.project = nn.Linear(2, 5)
        return self.project(y).sum()


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(2, 5)

    def forward(self, y):
        return self.project(y).sum()


def test_weights_that_nothing_trains_are_remarked():
    outside, frozen = nn.Linear(2, 3), nn.Linear(2, 3).requires_grad_(False)
    told = r"It reads weights that are not trained \({}\): to train weights of its own, let it be a module that makes them in its __init__"
    for last, shapes in ((lambda y: outside(y).square().sum(), "3x2, 3|3, 3x2"), (Late(), "5x2, 5|5, 5x2")):
        assert re.match(told.format(shapes), require_loss(Loss(last), BATCH, "It"))
    assert require_loss(Loss(lambda y: frozen(y).sum()), BATCH, "It") == ""
    assert require_loss(Loss(Own()), BATCH, "It") == ""
