"""A frozen batch-first attention projects its inputs by one large product each once its graph is compiled, and computes the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import indistill_fx as ifx
from indistill_fx.passes.extract.instrument import cut
from indistill_fx.passes.lowering.attention import attention_sequence_first


class Attends(nn.Module):
    """Self-attention, then attention to a memory of another length."""

    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.own = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.memory = nn.Parameter(torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.own(x, x, value=x, need_weights=False)[0]
        y: Tensor = self.out(x + self.cross(x, self.memory, self.memory)[0])
        return y


def frozen(net: nn.Module, x: Tensor) -> fx.GraphModule:
    return cut(ifx.trace(net.eval().requires_grad_(False), x, role="teacher"), ["out"]).value


def products(graph: fx.GraphModule, x: Tensor) -> Counter[str]:
    """What torch.compile makes of a graph's products: it does not use the fast path of an eager attention."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            recorded = make_fx(graph)(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return Counter(str(node.target).removesuffix(".default") for node in recorded.graph.nodes)


@pytest.mark.parametrize("batch_first", [True, False])
def test_projections_are_single_products_and_the_values_are_the_same(batch_first: bool) -> None:
    torch.manual_seed(0)
    net = Attends(batch_first=batch_first)
    x = torch.randn(3, 7, 6) if batch_first else torch.randn(7, 3, 6)
    graph = frozen(net, x)
    text = graph.code
    result = attention_sequence_first(graph)
    assert graph.code == text
    assert len(result.report.done) == (2 if batch_first else 0)
    assert (result.value is graph) is not batch_first
    before, after = products(graph, x), products(result.value, x)
    assert before["aten.bmm"] - after["aten.bmm"] == (3 if batch_first else 0)  # qkv; q, and kv of the memory
    with torch.no_grad():
        torch.testing.assert_close(result.value(x)[0]["out"], graph(x)[0]["out"])


def test_it_runs_where_a_teacher_is_compiled_on_a_cpu_and_nowhere_else() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 7, 6)
    for target in (ifx.Target(compiled=True), ifx.Target()):
        teacher, student = Attends(), Attends()
        plan = ifx.align(teacher, student, example_inputs=x)
        stage = ifx.compile_stages(teacher, student, plan, example_inputs=x, target=target)[0]
        halves = {
            role: {record.name for record in getattr(stage.report, role) if record.done}
            for role in ("teacher", "student")
        }
        assert ("attention_sequence_first" in halves["teacher"]) is target.compiled
        assert "attention_sequence_first" not in halves["student"]


@pytest.mark.parametrize("x", [torch.randn(7, 6), torch.randn(3, 7, 6)])
def test_an_input_without_a_batch_is_left_as_it_is(x: Tensor) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.MultiheadAttention(6, 2, batch_first=True)
            self.out = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.own(x, x, x)[0])
            return y

    graph = frozen(Alone(), x)
    with torch.no_grad():
        torch.testing.assert_close(attention_sequence_first(graph).value(x)[0]["out"], graph(x)[0]["out"])
