"""Every pass on every net: it leaves the caller's module alone (digest), gives the same result twice, and a graph that is whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.passes.contract import PassResult, Rewrite, graph_text, verify
from indistill_fx.passes.extract.adapt import adapt, layout_of
from indistill_fx.passes.extract.dedupe import dedupe
from indistill_fx.passes.extract.fold import fold
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.table import LOWERINGS, Lowerings, lowering_passes
from indistill_fx.passes.structure.stages import main_path
from tests.nets import Cnn32, Overwritten, PreActivation, Residual, TinyTransformer, images, seeded


class BatchFirst(nn.Module):
    """Attention of torch's own over the places of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.attention = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm, self.mlp, self.head = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.patches(x).flatten(2).transpose(1, 2)
        y = y + self.attention(y, y, y, need_weights=False)[0]
        for _ in range(2):
            y = y + self.mlp(self.norm(y)).relu()
        return self.head(y.mean(1))  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "chain": (lambda: seeded(Cnn32), images(2, 32)),
    "residual": (lambda: seeded(Residual, dropout=0.3), images()),
    "overwritten": (lambda: seeded(Overwritten), images()),
    "pre-activation": (lambda: seeded(PreActivation), images()),
    "transformer": (lambda: seeded(TinyTransformer), images()),
}


def middle(traced: ifx.TracedModel) -> str:
    """A tap in the middle of the network that has channels to choose from."""
    nodes = [node for node in main_path(traced) if node.facts.kind in ("map", "tokens") and node.op != "placeholder"]
    return nodes[len(nodes) // 2].tap


def half(traced: ifx.TracedModel) -> dict[str, int]:
    return {middle(traced): traced.facts_of(middle(traced)).channels // 2}


def halved(traced: ifx.TracedModel) -> fx.GraphModule:
    return cut(traced, [middle(traced)]).value


def adapted(traced: ifx.TracedModel) -> PassResult[fx.GraphModule, Rewrite]:
    own = layout_of(traced.facts_of(middle(traced)))
    other = replace(own, channels=own.channels - 1, space=tuple(max(1, n // 2) for n in own.space))
    return adapt(halved(traced), middle(traced), own, other, may_slice=True)


def narrowed_cut(traced: ifx.TracedModel) -> fx.GraphModule:
    return cut(ifx.narrow(traced, widths=half(traced)).value, [middle(traced), f"{middle(traced)}:whole"]).value


EVERY = Lowerings(
    *(
        tuple(dict.fromkeys(n for row in LOWERINGS.values() for n in getattr(row, role)))
        for role in ("teacher", "student")
    ),
    dtype=torch.bfloat16,
)
TOLERANCES = {"cast_weights": {"rtol": 0.1, "atol": 0.1}}
"""Of passes that compute in another dtype: with 8 bits of fraction."""
FROM_GRAPH = ("dedupe", "fold", *EVERY.teacher, *EVERY.student)
"""Passes from graph to graph, which are given a graph with something to do, in the form in which the pipeline gives it."""


def given_to(name: str, traced: ifx.TracedModel) -> fx.GraphModule:
    if name == "dedupe":
        return narrowed_cut(traced)
    return fold(halved(traced)).value if name in EVERY.teacher else halved(traced)


def applied(name: str, traced: ifx.TracedModel, graph: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    own: dict[str, Any] = {"dedupe": dedupe, "fold": fold}
    for role in ("teacher", "student"):
        own.update(lowering_passes(EVERY, role, traced.facts))
    return own[name](graph)


PASSES: dict[str, Callable[[ifx.TracedModel], Any]] = {
    "instrument": lambda traced: ifx.instrument(traced, [middle(traced)]),
    "cut": halved,
    "adapt": lambda traced: adapted(traced).value,
    "narrow": lambda traced: ifx.narrow(traced, widths=half(traced)).value.graph_module,
    "shrink": lambda traced: ifx.shrink(traced, ratio=0.5).value.graph_module,
    "stages": lambda traced: (
        ifx.compile_stages(
            traced, ifx.trace(copy.deepcopy(traced.module), traced.example_inputs, role="student"), main="kd"
        )[-1].teacher
    ),
    **{name: lambda traced, name=name: applied(name, traced, given_to(name, traced)).value for name in FROM_GRAPH},
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


@pytest.mark.parametrize("name", FROM_GRAPH)
@pytest.mark.parametrize("net", NETS)
def test_what_a_pass_was_given_computes_what_it_did(net, name):
    """The graph that went in is as it was, text, tensors and values; what came out says what changed, and nothing else did."""
    make, x = NETS[net]
    traced = ifx.trace(make().eval(), x)
    graph = given_to(name, traced)
    text, before, value = graph_text(graph), digest(graph), graph(x)[0]
    result = applied(name, traced, graph)
    assert (graph_text(graph), digest(graph)) == (text, before)
    torch.testing.assert_close(graph(x)[0], value, rtol=0, atol=0)
    torch.testing.assert_close(result.value.eval()(x)[0], value, **TOLERANCES.get(name, {"rtol": 1e-4, "atol": 1e-5}))
    if graph_text(result.value) != text:
        assert result.report.done
    elif name != "fold":  # which makes tensors of its own in any case
        assert result.value is graph


@pytest.mark.parametrize("name", FROM_GRAPH)
def test_every_pass_has_something_to_do_in_one_of_the_nets(name):
    """Negative control of the two tests above."""
    done = []
    for make, x in (*NETS.values(), (lambda: seeded(BatchFirst), images())):
        traced = ifx.trace(make().eval(), x)
        done += applied(name, traced, given_to(name, traced)).report.done
    assert done


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
