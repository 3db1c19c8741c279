"""The verifier finds each kind of damage, all of it at once, and a pass that writes into its input."""

from __future__ import annotations

import operator

import pytest
import torch

import indistill_fx as ifx
from indistill_fx.passes.contract import signature_of, unchanged, verify
from tests.nets import Residual, images, seeded


@pytest.fixture
def traced():
    return ifx.trace(seeded(Residual), images())


def test_a_traced_graph_is_whole(traced):
    verify(traced.graph_module, after="trace", signature=("x",))


def test_all_violations_are_told_at_once(traced):
    graph_module = traced.graph_module
    first, second = list(graph_module.graph.nodes)[1:3]
    graph_module.delete_submodule(str(second.target))
    with graph_module.graph.inserting_before(first):
        graph_module.graph.call_function(operator.add, (second, second))
        graph_module.graph.create_node("get_attr", "nowhere.weight")
    with pytest.raises(ifx.VerifyError) as caught:
        verify(graph_module, after="broken", signature=("x", "y"))
    told = [str(violation) for violation in caught.value.violations]
    assert len(told) == 4
    assert "stands later" in told[0]
    assert "`nowhere.weight`, which is missing" in told[1]
    assert f"calls module `{second.target}`, which is missing" in told[2]
    assert told[3] == "`inputs`: ('x',); expected ('x', 'y')"
    assert "after pass `broken`" in str(caught.value)


def test_a_graph_that_does_not_end_in_its_output(traced):
    with traced.graph_module.graph.inserting_after(list(traced.graph_module.graph.nodes)[-1]):
        traced.graph_module.graph.call_function(torch.zeros, (1,))
    with pytest.raises(ifx.VerifyError, match="the last node; expected the output"):
        verify(traced.graph_module, after="broken")


DAMAGE = {
    "weight": lambda model: model.module.fc.weight.detach().add_(1),
    "flag": lambda model: model.module.layer1.train(not model.module.layer1.training),
    "gradient flag": lambda model: model.module.fc.weight.requires_grad_(False),
    "graph": lambda model: setattr(list(model.graph_module.graph.nodes)[1], "target", "fc"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_pass_that_changes_its_input_is_caught(traced, damage):
    with pytest.raises(ifx.PassError, match="Pass `bad` changed its input"), unchanged(traced, by="bad"):
        DAMAGE[damage](traced)


def test_a_pure_pass_is_not(traced):
    with unchanged(traced, by="good"):
        ifx.instrument(traced, ["layer1"])
    assert signature_of(traced.graph_module) == ("x",)
