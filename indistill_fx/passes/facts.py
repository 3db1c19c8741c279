"""Find the facts of every node by running the graph on two batch sizes, and compare it with the module on the way.

One run gives shapes, MACs and the check against the module; the second, with another batch size, tells which axis is the batch
and refuses graphs in which the batch size has been frozen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from indistill_fx.errors import FrontendError
from indistill_fx.graphs import batch_of, batch_size, output_node, tensor_nodes
from indistill_fx.ops import attribute
from indistill_fx.passes.channel_axis import channel_axes
from indistill_fx.traced import Kind, NodeFacts

_SIZES = (2, 3)
_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Known:
    """Facts per node, the node of the main output, and the comparisons made."""

    facts: dict[str, NodeFacts]
    logits: str
    checked: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one run showed of a node's tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    macs: int


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep fused inference kernels off: their operations cannot be counted."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Recorder(nn.Module):
    """Runs a graph node by node and notes shapes and MACs. Wraps the graph so that buffers can be swapped for copies."""

    def __init__(self, graph_module: fx.GraphModule):
        super().__init__()
        self.graph_module = graph_module
        self.seen: dict[str, _Seen] = {}

    def forward(self, *args: Any) -> Any:
        seen, counter = self.seen, FlopCounterMode(display=False, custom_mapping=_ATTENTION)
        untold: dict[fx.Node, int] = {}

        class Run(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                before = counter.get_total_flops()
                value = super().run_node(n)
                macs = (counter.get_total_flops() - before) // 2
                if isinstance(value, Tensor):
                    macs += sum(untold.pop(source, 0) for source in n.all_input_nodes)
                    seen[n.name] = _Seen(tuple(value.shape), value.dtype, macs)
                elif macs:  # a tuple: its work is told at the first of its parts
                    untold[n] = macs
                return value

        with counter:
            return Run(self.graph_module).run(*args)


def _count_attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _count_attention}


def infer_facts(
    graph_module: fx.GraphModule, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], *, logits: str | int | None = None
) -> Known:
    """Facts of all nodes whose value is one tensor.

    Args:
        graph_module: the captured graph, in the mode (train or eval) it was captured in.
        module: what it was captured from, in the same mode. Buffers written by a train-mode forward are put back.
        inputs: example arguments.
        kwargs: example keyword arguments.
        logits: key or index of the main output among several.

    Raises:
        FrontendError: the module fails on the example (where="forward"), or graph and module disagree.
    """
    example = batch_size((inputs, kwargs))
    runs: list[dict[str, _Seen]] = []
    checked, notes = [], []
    for size in (*_SIZES, example) if example not in _SIZES else _SIZES:
        if size == example and len(runs) == 2:
            break
        batch = batch_of((inputs, dict(kwargs)), size, example_size=example)
        expected, failure = _run_module(module, *batch)
        if failure is not None and size != example and not runs:
            notes.append(f"the module itself fails with batch size {size} ({failure}); only {example} was checked")
            continue
        if failure is not None:
            raise FrontendError(
                f"the forward of {type(module).__name__} fails on the example input {_shapes(batch)}: {failure}",
                where="forward",
                hint="Check --input (or example_inputs): one sample's shape, channels first, such as 3x224x224.",
            )
        seen, difference = _compare(graph_module, batch, expected, size)
        runs.append(seen)
        checked.append((size, difference))
    facts = _assemble(graph_module, runs, [size for size, _ in checked], example)
    return Known(facts, _logits_node(graph_module, facts, logits), tuple(checked), tuple(notes))


def _run_module(module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, str | None]:
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    torch.manual_seed(0)
    try:
        with torch.no_grad(), _plain_attention():
            return torch.func.functional_call(module, buffers, inputs, dict(kwargs)), None
    except Exception as error:  # the caller's code may raise anything
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _compare(graph_module: fx.GraphModule, batch: Any, expected: Any, size: int) -> tuple[dict[str, _Seen], float]:
    recorder = _Recorder(graph_module)
    buffers = {name: buffer.clone() for name, buffer in recorder.named_buffers()}
    inputs, kwargs = batch
    torch.manual_seed(0)
    try:
        with torch.no_grad(), _plain_attention():
            result = torch.func.functional_call(recorder, buffers, (*inputs, *kwargs.values()))
    except Exception as error:
        raise FrontendError(f"the graph fails with batch size {size}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    wanted = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    got = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if [leaf.shape for leaf in wanted] != [leaf.shape for leaf in got]:
        raise FrontendError(f"with batch size {size} the graph's outputs have other shapes than the module's")
    difference = max((_difference(a, b) for a, b in zip(wanted, got, strict=True)), default=0.0)
    if not difference <= _TOLERANCE:
        raise FrontendError(f"with batch size {size} the graph differs from the module by {difference:.1e} of the largest value")
    return recorder.seen, difference


def _difference(expected: Tensor, got: Tensor) -> float:
    """Largest difference relative to the largest finite value; NaN and infinity must stand at the same places."""
    a, b = expected.double(), got.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().clamp_min(1e-30)
    return float((a - b)[finite].abs().max() / scale)


def _shapes(batch: Any) -> str:
    return ", ".join("x".join(map(str, leaf.shape)) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))


def _assemble(graph_module: fx.GraphModule, runs: list[dict[str, _Seen]], sizes: list[int], example: int) -> dict[str, NodeFacts]:
    first, last = runs[0], runs[-1]
    axes = {name: _batch_axis(seen.shape, last[name].shape, sizes) for name, seen in first.items() if name in last}
    shapes = {name: _at_batch(first[name].shape, axis, sizes[0], example) for name, axis in axes.items()}
    channels = channel_axes(graph_module, shapes, {name: seen.dtype for name, seen in first.items()})
    space = next((shape[2:] for n in graph_module.graph.nodes if n.op == "placeholder" and len(shape := shapes.get(n.name, ())) > 2), ())
    facts = {}
    for node in graph_module.graph.nodes:
        if node.name not in axes:
            continue
        shape, axis, seen = shapes[node.name], channels[node.name], first[node.name]
        kind = _kind(shape, axes[node.name], axis)
        own = tuple(n for k, n in enumerate(shape) if k not in (axes[node.name], axis))
        facts[node.name] = NodeFacts(
            shape=shape,
            dtype=seen.dtype,
            kind=kind,
            batch_axis=axes[node.name],
            channel_axis=axis,
            stride=tuple(a / b for a, b in zip(space, own, strict=True)) if kind == "map" and len(space) == len(own) and 0 not in own else None,
            macs=seen.macs // sizes[0],
            parameters=_parameters(node, graph_module),
            module=_enclosing(node),
        )
    return facts


def _batch_axis(shape: tuple[int, ...], other: tuple[int, ...], sizes: list[int]) -> int | None:
    if len(sizes) == 1:
        return 0 if shape and shape[0] == sizes[0] else None
    return next((axis for axis, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b), None)


def _at_batch(shape: tuple[int, ...], axis: int | None, size: int, example: int) -> tuple[int, ...]:
    """The shape at the example's batch size: the batch axis may hold several entries per sample (windows)."""
    return tuple(n // size * example if k == axis else n for k, n in enumerate(shape))


def _kind(shape: tuple[int, ...], batch_axis: int | None, channel_axis: int | None) -> Kind:
    if batch_axis is None or channel_axis is None or batch_axis == channel_axis:
        return "other"
    kinds: dict[int, Kind] = {2: "vector", 3: "tokens", 4: "map", 5: "map"}
    return kinds.get(len(shape), "other")


def _parameters(node: fx.Node, graph_module: fx.GraphModule) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in attribute(graph_module, str(node.target)).parameters())
    if node.op == "get_attr":
        value = attribute(graph_module, str(node.target))
        return value.numel() if isinstance(value, nn.Parameter) else 0
    return 0


def _enclosing(node: fx.Node) -> str:
    """Path of the module whose forward made the node; for a leaf module's node, the module around it."""
    stack = [str(key).split("@")[0] for key in node.meta.get("nn_module_stack", {})]
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1] if stack else ""


def _logits_node(graph_module: fx.GraphModule, facts: Mapping[str, NodeFacts], wanted: str | int | None) -> str:
    value: Any = output_node(graph_module.graph).args[0]
    if isinstance(value, fx.Node) and value.name not in facts and value.args:
        fields = getattr(value.target, "_fields", ())
        value = dict(zip(fields, value.args, strict=False)) or value.args
    if wanted is not None and not isinstance(value, fx.Node):
        try:
            value = value[wanted]
        except (KeyError, IndexError, TypeError):
            legal = list(value) if isinstance(value, dict) else range(len(value))
            raise FrontendError(
                f"the output has no entry {wanted!r}; it has {', '.join(map(str, legal))}", where="forward", hint="Give one of these as logits."
            ) from None
    named = [node.name for node in tensor_nodes(value) if node.name in facts]
    if not named:
        raise FrontendError("the graph's output holds no tensor", where="forward", hint="The forward must return a tensor, or a dict or tuple with one.")
    return named[0]
