"""Every pass on every net: it leaves the caller's module alone (digest), gives the same result twice, and a graph that is whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.contract import verify
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.structure.stages import spine
from tests.nets import Cnn32, Overwritten, PreActivation, Residual, TinyTransformer, images, seeded

NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "chain": (lambda: seeded(Cnn32), images(2, 32)),
    "residual": (lambda: seeded(Residual, dropout=0.3), images()),
    "overwritten": (lambda: seeded(Overwritten), images()),
    "pre-activation": (lambda: seeded(PreActivation), images()),
    "transformer": (lambda: seeded(TinyTransformer), images()),
}


def middle(traced: ifx.TracedModel) -> str:
    """A tap in the middle of the network that has channels to choose from."""
    nodes = [node for node in spine(traced) if node.facts.kind in ("map", "tokens") and node.op != "placeholder"]
    return nodes[len(nodes) // 2].tap


def half(traced: ifx.TracedModel) -> dict[str, int]:
    return {middle(traced): traced.facts_of(middle(traced)).channels // 2}


PASSES: dict[str, Callable[[ifx.TracedModel], Any]] = {
    "instrument": lambda traced: ifx.instrument(traced, [middle(traced)]),
    "cut": lambda traced: cut(traced, [middle(traced)]),
    "fold": lambda traced: fold(traced.graph_module).value,
    "narrow": lambda traced: ifx.narrow(traced, widths=half(traced)).value.graph_module,
    "shrink": lambda traced: ifx.shrink(traced, ratio=0.5).value.graph_module,
    "stages": lambda traced: (
        ifx.compile_stages(
            traced, ifx.trace(copy.deepcopy(traced.module), traced.example_inputs, role="student"), main="kd"
        )[-1].teacher
    ),
}


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("net", NETS)
def test_pure_deterministic_and_whole(net, name):
    make, x = NETS[net]
    module = make()
    module.train()
    before, random = digest(module), torch.get_rng_state()
    traced = ifx.trace(module, x)
    code = traced.graph_module.code
    results: list[fx.GraphModule] = [PASSES[name](traced) for _ in range(2)]
    assert digest(module) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert traced.graph_module.code == code
    for graph in results:
        verify(graph, after=name)
    assert results[0].code == results[1].code
    values = [graph.eval()(x) for graph in results]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


@pytest.mark.parametrize("net", NETS)
def test_writing_into_a_narrowed_teacher_does_not_reach_the_callers(net):
    make, x = NETS[net]
    module = make()
    before = digest(module)
    traced = ifx.trace(module, x)
    slim = ifx.narrow(traced, widths=half(traced)).value.graph_module
    shared = {id(parameter) for parameter in module.parameters()}
    written = [parameter for parameter in slim.parameters() if id(parameter) not in shared]
    assert written, "nothing was sliced"
    with torch.no_grad():
        for parameter in written:
            parameter.add_(1)
    assert digest(module) == before


def test_the_digest_sees_a_pass_that_writes():
    """Negative control."""
    module = seeded(Residual)
    before = digest(module)
    ifx.trace(module, images()).graph_module.get_submodule("fc").weight.data.add_(1e-3)
    assert digest(module) != before
