import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import evaluating, untouched
from indistill_fx.graph.values import Values


class Careless(nn.Module):
    """Does what forward passes of real models do to themselves."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(1))
        self.cache = None

    def forward(self, x):
        self.count += 1
        self.cache = x
        self.bn.running_mean = x.mean(0)
        self.extra = nn.Linear(1, 1)
        return self.bn(x)


def test_everything_is_put_back_also_after_an_error():
    module = Careless().train()
    module.bn.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    identity = {k: id(v) for k, v in module.named_buffers()}
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    expected = (torch.rand(1).item(), random.random(), np.random.rand())
    for fail in (False, True):
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        with contextlib.suppress(ZeroDivisionError), untouched(module):
            module.train()
            module(torch.rand(4, 3))
            random.random(), np.random.rand()
            assert 1 / (not fail)
        assert module.training and not module.bn.training
        assert module.cache is None and not hasattr(module, "extra")
        assert {k: id(v) for k, v in module.named_buffers()} == identity
        for key, value in module.state_dict().items():
            assert torch.equal(value, before[key]), key
        assert (torch.rand(1).item(), random.random(), np.random.rand()) == expected


def test_evaluating_sets_eval_and_no_grad_without_calling_eval():
    class Refuses(nn.Linear):
        def train(self, mode=True):
            raise NotImplementedError

    module = Refuses(2, 2)
    with evaluating(module):
        assert not module.training
        assert not module(torch.rand(1, 2)).requires_grad
    assert module.training


class Halves(nn.Module):
    """Writes a part of a weight where no version counter looks, far from its first entries."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(300, 100))

    def forward(self, x):
        self.weight.data[250:].mul_(0.5)
        return x + self.weight[299, :4]


class Holds(nn.Module):
    """Writes a tensor that is not a buffer."""

    def __init__(self):
        super().__init__()
        self.loose = torch.ones(4)

    def forward(self, x):
        self.loose.mul_(1.5)
        return x * self.loose


@pytest.mark.parametrize(("make", "name"), [(Halves, "weight"), (Holds, "loose")])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_a_forward_writes_is_put_back_when_it_is_traced(make, name, role):
    module, x = make(), torch.randn(2, 4)
    before = getattr(module, name).detach().clone()
    traced = ifx.trace(module, x, role=role)
    assert torch.equal(getattr(module, name), before)
    got = traced.graph_module(x)
    with torch.no_grad():
        getattr(module, name).copy_(before)
    torch.testing.assert_close(got, module(x))


def test_a_tensor_that_got_another_dtype_is_put_back():
    kept, small = torch.zeros(4), torch.zeros(3)
    values = Values([kept, small])
    kept.data = torch.zeros(4, dtype=torch.double)
    assert values.put_back()
    assert kept.dtype == torch.float32
    assert not values.put_back()


def test_models_whose_weights_cannot_be_compared():
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(2, 4)
    traced = ifx.trace(module, x)
    with torch.no_grad():
        torch.testing.assert_close(traced.graph_module(x), module.eval()(x))
    with pytest.raises(ifx.ConfigError, match=r"`0.weight` is on the device meta"):
        ifx.trace(nn.Sequential(nn.Linear(4, 4, device="meta")), x)


class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.nothing = nn.Linear(4, 4), nn.Parameter(torch.zeros(0, 4))

    def forward(self, x):
        return self.linear(x) + self.nothing.sum()


def test_a_student_with_a_parameter_without_entries():
    module, x = Empty(), torch.randn(2, 4)
    torch.testing.assert_close(ifx.trace(module, x, role="student").graph_module(x), module(x))
