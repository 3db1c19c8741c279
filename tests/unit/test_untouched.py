import contextlib
import random

import numpy as np
import torch
from torch import nn

from indistill_fx.graph.module_state import evaluating, untouched


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
