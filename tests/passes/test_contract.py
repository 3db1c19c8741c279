"""The verifier finds each kind of damage, all of it at once, and a pass that writes into its input."""

from __future__ import annotations

import operator
from functools import partial

import pytest
import torch
from torch import fx

import indistill_fx as ifx
from indistill_fx.graph.edit import copy_graph
from indistill_fx.passes.contract import (
    PassResult,
    Rewrite,
    graph_text,
    run_passes,
    signature_of,
    unchanged,
    verify,
)
from indistill_fx.passes.extract.instrument import cut
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


def relu_removed(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    new, nodes = copy_graph(graph_module)
    nodes["stem_2"].replace_all_uses_with(nodes["stem_2"].args[0])
    new.graph.erase_node(nodes["stem_2"])
    new.recompile()
    return PassResult(new, Rewrite(done=("stem_2: removed",), skipped=("layer1_0_relu: not asked for",)))


def impure(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    next(graph_module.parameters()).data.zero_()
    next(iter(graph_module.graph.nodes)).meta["seen"] = True
    next(graph_module.children()).train(False)
    return PassResult(graph_module, Rewrite())


def broken(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    new, nodes = copy_graph(graph_module)
    nodes["stem_0"].target = "nowhere"
    return PassResult(new, Rewrite())


def refusing(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    raise ifx.MatchError("No.", where="layer1")


def crashing(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    raise KeyError("lost")


def test_the_runner_tells_what_every_pass_did():
    traced = ifx.trace(seeded(Residual), images())
    result = run_passes(traced, [("cut", partial(cut, taps=["layer1"])), ("remove", relu_removed)])
    first, second = result.report
    assert (first.name, second.name, second.done) == ("cut", "remove", ("stem_2: removed",))
    assert second.skipped == ("layer1_0_relu: not asked for",)
    assert first.after == second.before == graph_text(cut(traced, ["layer1"]).value)
    assert second.after == graph_text(result.value)
    assert next(line for line in second.diff(context=0) if line.startswith("-")) == "-stem_2 = stem_2:ReLU(stem_1)"
    assert first.changed and second.changed


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (impure, ifx.PassError, "Pass `bad` changed its input"),
        (broken, ifx.VerifyError, "broken after pass `bad`"),
        (crashing, ifx.PassError, "Pass `bad` failed: KeyError: 'lost'"),
    ],
)
def test_the_runner_holds_passes_to_their_contract(bad, error, message):
    traced = ifx.trace(seeded(Residual), images())
    with pytest.raises(error, match=message):
        run_passes(traced, [("cut", partial(cut, taps=["layer1"])), ("bad", bad)])


def test_what_a_pass_refuses_says_which_pass_it_was():
    traced = ifx.trace(seeded(Residual), images())
    with pytest.raises(ifx.MatchError, match=r"No\.") as caught:
        run_passes(traced, [("cut", partial(cut, taps=["layer1"])), ("bad", refusing)])
    assert caught.value.__notes__ == ["In pass `bad`, after cut."]


def test_long_runs_of_lines_are_shortened():
    traced = ifx.trace(seeded(Residual), images())
    record = run_passes(traced, [("cut", partial(cut, taps=["stem"]))]).report[0]
    gone = len(record.before) - len(record.after) + 1
    assert f"-… {gone - 8} lines" in record.diff()


def test_a_stage_tells_pass_by_pass_what_was_done_and_skipped():
    pair = seeded(lambda: Residual(16)), seeded(lambda: Residual(8))
    stages = ifx.compile_stages(*pair, example_inputs=images())
    told = str(stages[0].report)
    assert [record.name for record in stages[0].report.teacher][:3] == ["narrow", "cut", "dedupe"]
    assert "teacher, narrow: layer1: 8 of 16 channels" in told
    assert "teacher, fold: stem_1: folded" in told
    assert "student, adapt layer1, skipped: layer1: has the common shape already" in told
    assert next(record.name for record in stages[-1].report.teacher) == "cut"
