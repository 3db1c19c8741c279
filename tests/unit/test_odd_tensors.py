"""Models whose buffers are sparse, quantised, complex, nested or empty are digested, traced and put back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import indistill_fx as ifx
from indistill_fx.graph.module_state import digest
from indistill_fx.graph.values import Values

ODD: dict[str, tuple[Callable[[float], Tensor], Callable[[Tensor], Tensor]]] = {
    "sparse": (lambda v: (torch.eye(4) * v).to_sparse(), lambda b: torch.sparse.mm(b, torch.ones(4, 1)).sum()),
    "csr": (lambda v: (torch.eye(4) * v).to_sparse_csr(), lambda b: b.to_dense().sum()),
    "csc": (lambda v: (torch.eye(4) * v).to_sparse_csc(), lambda b: b.to_dense().sum()),
    "boolean": (lambda v: torch.tensor([True, v > 1]), lambda b: b.float().sum()),
    "complex": (lambda v: torch.full((4,), v, dtype=torch.complex64), lambda b: b.abs().sum()),
    "conjugate": (lambda v: torch.full((4,), v * 1j).conj(), lambda b: b.imag.sum()),
    "quantised": (lambda v: torch.quantize_per_tensor(torch.full((4,), v), 0.1, 0, torch.quint8), lambda b: b.dequantize().sum()),
    "per channel": (
        lambda v: torch.quantize_per_channel(torch.full((4, 2), v), torch.ones(4), torch.zeros(4, dtype=torch.int64), 0, torch.qint8),
        lambda b: b.dequantize().sum(),
    ),
    "per channel, zero points not whole": (
        lambda v: torch.quantize_per_channel(torch.full((4, 2), v), torch.ones(4), torch.zeros(4), 0, torch.quint8),
        lambda b: b.dequantize().sum(),
    ),
    "one number": (lambda v: torch.tensor(v), lambda b: b),
    "bfloat16": (lambda v: torch.full((4,), v, dtype=torch.bfloat16), lambda b: b.float().sum()),
    "transposed": (lambda v: torch.full((4, 2), v).t(), lambda b: b.sum()),
    "mkldnn": (lambda v: torch.full((4, 4), v).to_mkldnn(), lambda b: b.to_dense().sum()),
    "nested": (lambda v: torch.nested.nested_tensor([torch.full((2,), v), torch.full((3,), v)]), lambda b: b.unbind()[1].sum()),
}  # fmt: skip


class Holds(nn.Module):
    def __init__(self, buffer: Tensor, read: Callable[[Tensor], Tensor] | None):
        super().__init__()
        self.conv, self.head, self.read = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), read
        self.register_buffer("buffer", buffer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        y = y if self.read is None else y + self.read(self.buffer)
        return self.head(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # torch announces that some of these are prototypes
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("used", [False, True])
@torch.no_grad()
def test_odd_buffers(name, used):
    make, read = ODD[name]
    net, x = Holds(make(1.0), read if used else None), torch.randn(2, 3, 8, 8)
    before, expected = digest(net), net(x)
    if name != "nested" or not used:
        for role in ("teacher", "student"):
            traced = ifx.trace(net, x, role=role)
            torch.testing.assert_close(traced.graph_module(x), expected)
            assert ifx.shrink(traced, ratio=0.5).value.facts_of("conv").shape[1] == 4
    assert digest(net) == before
    net.buffer = make(2.0)
    assert digest(net) != before


NO_COPY = "per channel, zero points not whole"
"""Torch has no clone of these, so that their values are not kept."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in ODD if name not in ("conjugate", "transposed", NO_COPY)])
def test_values_of_odd_tensors_are_put_back(name):
    make, _ = ODD[name]
    tensor = make(1.0)
    values = Values([tensor])
    assert not values.changed()
    if name in ("sparse", "mkldnn", "nested"):
        tensor.data = make(2.0)
    else:
        tensor.copy_(make(2.0))
    assert values.put_back()
    assert not values.changed()


def test_an_empty_buffer_does_not_stop_a_shrink():
    net, x = Holds(torch.empty(0), lambda b: b.abs().sum()), torch.randn(2, 3, 8, 8)
    assert ifx.shrink(ifx.trace(net, x), ratio=0.5).value.facts_of("conv").shape[1] == 4
