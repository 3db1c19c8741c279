"""What the module itself computes on the example, and whether a graph computes the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from indistill_fx.errors import FrontendError
from indistill_fx.graphs import batch_of, batch_size
from indistill_fx.passes.captured import tensors

_SIZES = (2, 3)
_TOLERANCE = 1e-5
_SMALL, _LARGE = 64, 128


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the module: its arguments, the tensors it returned, and its buffers afterwards."""

    inputs: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: list[Tensor]
    buffers: dict[str, Tensor]


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep fused inference kernels off: their operations cannot be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Reference:
    """A module and its example, run on demand on batches of several sizes. Buffers written by a run are put back.

    Args:
        module: in the mode (train or eval) in which it is traced.
        inputs: example arguments.
        kwargs: example keyword arguments.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]):
        self.module, self.inputs, self.kwargs = module, inputs, kwargs
        self.example = batch_size((inputs, kwargs))
        self.notes: tuple[str, ...] = ()
        self._runs: dict[tuple[int, bool], Run | str] = {}
        self._sizes: tuple[int, ...] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes to compare: two, or only the example's where the module accepts no other.

        Raises:
            FrontendError: the module fails on the example input itself (where="forward").
        """
        if not self._sizes:
            failures = {size: run for size in _SIZES if isinstance(run := self._run(size, small=False), str)}
            if not failures:
                self._sizes = _SIZES
                return self._sizes
            own = self._run(self.example, small=False)
            if isinstance(own, str):
                raise FrontendError(
                    f"the forward of {type(self.module).__name__} fails on the example input {self._shapes()}: {own}",
                    where="forward",
                    hint="Check --input (or example_inputs): one sample's shape, channels first, such as 3x224x224.",
                )
            size, failure = next(iter(failures.items()))
            self._sizes = (self.example,)
            self.notes = (f"the module itself fails with batch size {size} ({failure}); only {self.example} was checked",)
        return self._sizes

    def batch(self, size: int, *, small: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example with another batch size; `small`: large pictures cropped."""
        inputs, kwargs = batch_of((self.inputs, dict(self.kwargs)), size, example_size=self.example)
        return tree_map(_crop, (inputs, kwargs)) if small else (inputs, kwargs)

    def compare(self, graph_module: nn.Module, *, small: bool = False) -> tuple[tuple[int, float], ...]:
        """Run the graph beside the module, with the same seed: outputs and, in train mode, buffers must agree.

        Args:
            graph_module: takes the module's arguments, keyword arguments too, in order.
            small: large pictures may be cropped; for graphs that no size of the example has decided.

        Returns:
            (batch size, largest difference relative to the largest value) per batch size.

        Raises:
            FrontendError: they differ, or the graph fails.
        """
        if small and self._croppable():
            try:
                return tuple((size, self._difference(graph_module, size, small=True)) for size in _SIZES)
            except FrontendError:
                pass  # the module may treat small pictures otherwise
        return tuple((size, self._difference(graph_module, size, small=False)) for size in self.sizes)

    def _croppable(self) -> bool:
        given = tensors((self.inputs, self.kwargs))
        return bool(given) and all(tensor.dim() == 4 and min(tensor.shape[2:]) >= _LARGE for tensor in given)

    def _run(self, size: int, *, small: bool) -> Run | str:
        key = (size, small)
        if key not in self._runs:
            inputs, kwargs = self.batch(size, small=small)
            self._runs[key] = _run_module(self.module, inputs, kwargs)
        return self._runs[key]

    def _difference(self, graph_module: nn.Module, size: int, *, small: bool) -> float:
        run = self._run(size, small=small)
        if isinstance(run, str):
            raise FrontendError(f"the module fails with batch size {size}: {run}")
        own = _run_module(graph_module, (*run.inputs, *run.kwargs.values()), {})
        if isinstance(own, str):
            raise FrontendError(f"the graph fails with batch size {size}: {own}")
        if [leaf.shape for leaf in run.outputs] != [leaf.shape for leaf in own.outputs]:
            raise FrontendError(f"with batch size {size} the graph's outputs have other shapes than the module's")
        worst = max((_difference(a, b) for a, b in zip(run.outputs, own.outputs, strict=True)), default=0.0)
        if not worst <= _TOLERANCE:
            raise FrontendError(f"with batch size {size} the graph differs from the module by {worst:.1e} of the largest value")
        for name, buffer in own.buffers.items():
            if name in run.buffers and not _difference(run.buffers[name], buffer) <= _TOLERANCE:
                raise FrontendError(f"with batch size {size} the graph leaves another value in the buffer `{name}`")
        return worst

    def _shapes(self) -> str:
        return ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors((self.inputs, self.kwargs)))


def _run_module(module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Run | str:
    torch.manual_seed(0)
    with _buffers_kept(module):
        try:
            with torch.no_grad(), plain_attention():
                result = module(*inputs, **kwargs)
        except Exception as error:  # the caller's code may raise anything
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        written = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return Run(inputs, kwargs, tensors(result), written)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    before = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    values = [(buffer, buffer.clone()) for _, buffers in before for buffer in buffers.values() if buffer is not None]
    try:
        yield
    finally:
        for part, buffers in before:
            part._buffers.clear()
            part._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


def _crop(leaf: Any) -> Any:
    return leaf[:, :, :_SMALL, :_SMALL] if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf


def _difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest finite value; NaN and infinity must stand at the same places."""
    if not expected.numel():
        return 0.0
    if expected.is_complex():
        expected, got = torch.view_as_real(expected), torch.view_as_real(got)
    a, b = expected.double(), got.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().clamp_min(1e-30)
    return float((a - b)[finite].abs().max() / scale)
