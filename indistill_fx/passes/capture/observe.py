"""Run a graph node by node and note the shape, dtype and work of every node.

Rules, in order:
  1. The runs use tensors without data, which cost nearly nothing. Where an operation refuses those, the graph runs for real.
  2. Torch computes shapes without data in Python, which takes longer than a small network. So an operation whose result is like one of
     its inputs is not run, and a layer that takes each sample alone is run once for all of its settings, on samples of one shape.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from indistill_fx.graph.computed_weights import why_opaque
from indistill_fx.graph.interpret import run_looking
from indistill_fx.graph.module_state import parts_of, state_kept
from indistill_fx.graph.ops import BINARY, UNARY, attribute, op_name
from indistill_fx.passes.capture.captured import tensors
from indistill_fx.passes.capture.equivalence import Reference, plain_attention
from indistill_fx.passes.capture.static_values import count_of
from indistill_fx.system.random_state import seed_torch


@dataclass(frozen=True, slots=True)
class Seen:
    """What one run showed of a node's tensor; multiply-accumulates are those of the whole batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    macs: int


@dataclass(frozen=True, slots=True)
class Observed:
    """What one run showed: of every node's tensor, and how many tensors there are in a node's tuple."""

    seen: dict[str, Seen]
    counts: dict[str, int]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By node."""
        return {name: seen.shape for name, seen in self.seen.items()}


class _MacCounter(TorchDispatchMode):
    """Counts multiply-accumulates of all that runs inside it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        # every position is multiplied by the filters, as in a convolution
        if str(packet) == "torchvision.deform_conv2d":
            result = func(*args, **kwargs)
            self.macs += result.numel() * args[1][0].numel()
            return result
        if packet not in _FLOPS:
            with self:
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        result = func(*args, **kwargs)
        self.macs += _FLOPS[packet](*args, **kwargs, out_val=result) // 2
        return result


def _count_attention(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _count_vectors(matrix: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * int(matrix.numel())


def _count_groups(rows: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """Every row is multiplied by one of the matrices, or every column of the weight by one of those of `rows`."""
    if weight.dim() < rows.dim():
        return 2 * int(weight.numel() * rows.shape[1])
    return 2 * int(rows.numel() * weight.shape[-1])


def _count_bilinear(first: Any, second: Any, third: Any, *expanded: Any, **kwargs: Any) -> int:
    shapes = []
    for value, axes in zip((first, second, third), expanded[:3], strict=True):
        for axis in axes:
            value = value.unsqueeze(axis)
        shapes.append(value.shape)
    return 2 * math.prod(map(int, torch.broadcast_shapes(*shapes)))


def _count_distances(first: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 2 * int(out_val.numel() * first.shape[-1])


_NORMS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm"})
_KEEPING = (UNARY - {"float", "half", "to", "type_as"}) | _NORMS | {"softmax"}
_FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    torch.ops.aten.mv: _count_vectors,
    torch.ops.aten.dot: _count_vectors,
    torch.ops.aten.addmv: lambda added, matrix, *args, **kwargs: _count_vectors(matrix),
    torch.ops.aten._grouped_mm: _count_groups,
    torch.ops.aten._trilinear: _count_bilinear,
    torch.ops.aten._cdist_forward: _count_distances,
}
_LARGE = 4_097
"""A batch that code takes apart into more pieces than two or three samples, if it does so by a number of samples."""
_ALONE = frozenset(
    {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d}
)
"""Layers that take each sample (each entry of the first axis) alone, and whose result their constants for torch's compiler decide."""


@dataclass(slots=True)
class _Layer:
    """A layer's output for samples of one shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    macs: int
    results: dict[int, Tensor]


class _Run:
    """One run.

    Args:
        graph_module: what runs.
        layers: what is known of layers of rule 2; written.
        macs: whether to count them.
    """

    def __init__(self, graph_module: fx.GraphModule, layers: dict[object, _Layer], *, macs: bool):
        self.graph_module, self.layers, self.counter = graph_module, layers, _MacCounter() if macs else None
        self.found = Observed({}, {})
        self.counted, self.known_macs = 0, 0
        self.unassigned_macs: dict[fx.Node, int] = {}
        self.keys: dict[fx.Node, tuple[object, Tensor]] = {}

    def __call__(self, *args: Any) -> Observed:
        """Run it on these inputs."""
        with torch.no_grad(), plain_attention(), self.counter or nullcontext():
            run_looking(self.graph_module, self._note, *args, override=self._instead)
        return self.found

    def _note(self, node: fx.Node, value: Any) -> None:
        macs = self.known_macs
        self.known_macs = 0
        if self.counter is not None:
            macs += self.counter.macs - self.counted
            self.counted = self.counter.macs
        if isinstance(value, Tensor):
            self._remember(node, value, macs)
        macs += sum(self.unassigned_macs.pop(source, 0) for source in node.all_input_nodes)
        if isinstance(value, Tensor):
            self.found.seen[node.name] = Seen(tuple(value.shape), value.dtype, macs)
            return
        if macs:  # the work of a tuple is counted at its first tensor, however deep
            self.unassigned_macs[node] = macs
        if (count := count_of(value)) is not None:
            self.found.counts[node.name] = count

    def _instead(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Tensor | None:
        """Rule 2."""
        sources = [values.get(source) for source in node.all_input_nodes if source.op != "get_attr"]
        first = sources[0] if sources else None
        if not isinstance(first, Tensor) or not first.is_meta or not first.is_floating_point():
            return None
        if node.op != "call_module":
            return _of_function(node, first, sources[1:])
        layer = attribute(self.graph_module, str(node.target))
        if not type(layer).__module__.startswith("torch.nn.modules") or why_opaque(layer) is not None:
            return None
        if type(layer) in _ALONE and first.dim() > 1 and len(node.args) == 1 and not node.kwargs:
            return self._known(node, layer, first)
        return first if op_name(node) in _KEEPING else None

    def _known(self, node: fx.Node, layer: nn.Module, given: Tensor) -> Tensor | None:
        """The layer's earlier output for samples of this shape, if it is known."""
        weight = layer._parameters.get("weight")
        weights = None if weight is None else (weight.shape, weight.dtype)
        kind: Any = type(layer)
        settings = repr([getattr(layer, name) for name in kind.__constants__])
        key = (kind, settings, given.shape[1:], given.dtype, weights)
        known = self.layers.get(key)
        if known is None or (self.counter is not None and known.macs < 0):
            self.keys[node] = key, given
            return None
        count = given.shape[0]
        self.known_macs = known.macs * count
        if count not in known.results:
            known.results[count] = torch.empty((count, *known.shape), dtype=known.dtype, device="meta")
        return known.results[count]

    def _remember(self, node: fx.Node, value: Tensor, macs: int) -> None:
        if (asked := self.keys.pop(node, None)) is not None and len(value) == len(asked[1]) > 0:
            key, count = asked[0], len(value)
            each = macs // count if self.counter is not None else -1
            self.layers[key] = _Layer(tuple(value.shape[1:]), value.dtype, each, {count: value})


def _of_function(node: fx.Node, first: Tensor, others: Sequence[Any]) -> Tensor | None:
    """Rule 2, of a function or a method that reads these tensors and parameters: an input that the result is like, if there is one."""
    name, reads = op_name(node), len(node.all_input_nodes)
    if name in _NORMS and not others and node.args[:1] == (node.all_input_nodes[0],):
        return first
    options = (*node.args[1:], *(value for key, value in node.kwargs.items() if key != "input"))
    if name in _KEEPING and reads == 1 and all(value is None or isinstance(value, int | float) for value in options):
        return first
    if name not in BINARY or reads != 2 or len(others) != 1:
        return None
    second = others[0]
    if not isinstance(second, Tensor) or second.dtype != first.dtype or not second.is_meta:
        return None
    shape = first.shape if first.shape == second.shape else torch.broadcast_shapes(first.shape, second.shape)
    return next((given for given in (first, second) if given.shape == shape), None)


def _most(runs: Sequence[Observed]) -> Observed:
    """The first run, with the most work that a run has counted for each node."""
    first = runs[0]
    if len(runs) == 1:
        return first
    macs = {name: max(run.seen[name].macs for run in runs if name in run.seen) for name in first.seen}
    return Observed({name: replace(seen, macs=macs[name]) for name, seen in first.seen.items()}, first.counts)


class Observer:
    """Runs graphs on the example, at several batch sizes and at other sizes of the image.

    Args:
        reference: whose example that is.
        runs: how many runs count work; of each node's, the most counts.
    """

    def __init__(self, reference: Reference, *, runs: int = 1):
        self.reference, self.runs = reference, runs
        self._layers: dict[object, _Layer] = {}

    def observe(self, graph_module: fx.GraphModule, sizes: Sequence[int]) -> list[Observed]:
        """What is seen at each batch size; multiply-accumulates are counted at the first."""
        flags = [(size, size == sizes[0]) for size in sizes for _ in range(self.runs if size == sizes[0] else 1)]
        try:
            with self.reference.kept(graph_module), _without_data(graph_module):
                found = [self._empty(graph_module, *self._shapes(size), macs=macs) for size, macs in flags]
        except Exception:  # operations may raise anything for tensors without data
            found = [self._real(graph_module, size, macs=macs) for size, macs in flags]
        return [_most(found[: self.runs]), *found[self.runs :]]

    def other_picture(self, graph_module: fx.GraphModule) -> Observed | None:
        """A run at another size of the image, without data; None if the graph accepts none."""
        tries = (self._other(graph_module, factor=factor) for factor in (2, 3))
        return next(filter(None, tries), None)

    def other_lengths(self, graph_module: fx.GraphModule) -> list[Observed]:
        """Runs with more frames or steps after the batch, in all inputs and in each, without data. Of channels a graph takes no more."""
        inputs = [t for t in tensors((self.reference.inputs, self.reference.kwargs)) if t.is_floating_point()]
        groups = [inputs, *([one] for one in inputs if len(inputs) > 1)]
        return [run for group in groups if (run := self._other(graph_module, longer=group)) is not None]

    def large_batch(self, graph_module: fx.GraphModule) -> Observed:
        """A run with a large batch, without data, as far as the graph runs on it."""
        run = _Run(graph_module, self._layers, macs=False)
        with self.reference.kept(graph_module), _without_data(graph_module), suppress(Exception), _silent_meta():
            inputs, kwargs = self._shapes(_LARGE)
            run(*inputs, *kwargs.values())
        return run.found

    def _other(self, graph_module: fx.GraphModule, **change: Any) -> Observed | None:
        with self.reference.kept(graph_module), _without_data(graph_module), suppress(Exception):
            return self._empty(graph_module, *self._shapes(2, **change), macs=False)
        return None

    def _shapes(
        self, size: int, *, factor: int = 1, longer: Sequence[Tensor] = ()
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The example with another batch size, as tensors without data.

        Args:
            size: of the batch.
            factor: images (or ids) are so many times as high and wide (or long).
            longer: the example's tensors of real numbers in which twice as many frames, or channels, follow the batch.
        """

        def empty(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            batch = [size] if leaf.dim() and leaf.shape[0] == self.reference.example else list(leaf.shape[:1])
            channels = list(leaf.shape[1:2]) if leaf.is_floating_point() else []
            rest = [n * factor for n in leaf.shape[1 + len(channels) :]]
            if any(leaf is one for one in longer):
                channels = [n * 2 for n in channels]
            return torch.empty((*batch, *channels, *rest), dtype=leaf.dtype, device="meta")

        inputs, kwargs = tree_map(empty, (self.reference.inputs, dict(self.reference.kwargs)))
        return inputs, kwargs

    def _empty(
        self, graph_module: fx.GraphModule, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], *, macs: bool
    ) -> Observed:
        with _silent_meta():
            return _Run(graph_module, self._layers, macs=macs)(*inputs, *kwargs.values())

    def _real(self, graph_module: fx.GraphModule, size: int, *, macs: bool) -> Observed:
        if self.runs == 1:
            seed_torch(0)
        inputs, kwargs = self.reference.batch(size)
        with state_kept(graph_module):
            return _Run(graph_module, {}, macs=macs)(*inputs, *kwargs.values())


@contextmanager
def _silent_meta() -> Iterator[None]:
    """Within the block, what the graph makes anew has no data either."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _without_data(graph_module: fx.GraphModule) -> Iterator[None]:
    """Within the block, the parameters and buffers of a graph are tensors without data."""
    parts = parts_of(graph_module)
    registries: list[Any] = [registry for part in parts for registry in (part._parameters, part._buffers) if registry]
    before = [dict(registry) for registry in registries]
    recurrent = [(part, part._flat_weights) for part in parts if isinstance(part, nn.RNNBase)]
    memo: dict[int, Tensor] = {}

    def empty(tensor: Tensor | None) -> Tensor | None:
        if tensor is not None and id(tensor) not in memo:
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        return None if tensor is None else memo[id(tensor)]

    try:
        for registry in registries:
            registry.update({name: empty(tensor) for name, tensor in registry.items()})
        for part, weights in recurrent:
            part.__dict__["_flat_weights"] = [empty(weight) for weight in weights]
        yield
    finally:
        for registry, tensors in zip(registries, before, strict=True):
            registry.clear()
            registry.update(tensors)
        for part, weights in recurrent:
            part.__dict__["_flat_weights"] = weights
