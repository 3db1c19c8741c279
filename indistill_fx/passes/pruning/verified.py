"""Run a shrunk or narrowed network beside the original before it is handed out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from indistill_fx.errors import PassError
from indistill_fx.graph.edit import batch_of, batch_size, copy_graph, ending_at, own_module
from indistill_fx.graph.interpret import Runner
from indistill_fx.graph.module_state import evaluating
from indistill_fx.graph.ops import attribute, is_inplace
from indistill_fx.passes.capture.equivalence import relative_difference
from indistill_fx.passes.pruning.masked import Masked
from indistill_fx.system.exact_arithmetic import exact_arithmetic
from indistill_fx.system.random_state import seed_torch
from indistill_fx.traced import TracedModel

_TOLERANCE = 1e-3
"""Of the largest value, in single precision: rounding stays far below it, a wrong slice far above."""
_CROPS = (40, 64, 128)


def verify_smaller(model: TracedModel, smaller: fx.GraphModule, axes: Any) -> None:
    """Compare on the example or a crop of it, and on shorter inputs, in eval mode. Both networks are left as they were.

    Args:
        model: the original.
        smaller: what is left of it.
        axes: the entries that stay, per node and axis (see `ShrinkReport`).

    Raises:
        PassError: the smaller network fails or computes something else, which is a bug in indistill-fx.
    """
    model = _with_own_state(model)
    original = Masked(model, axes)
    _verify(model, original.run, smaller, _Words("shrink", "smaller", "original without the channels removed"))


def verify_narrowed(model: TracedModel, narrowed: TracedModel, kept: Mapping[str, Sequence[int]]) -> None:
    """Compare the channels kept at the taps with those of the whole network, on the inputs that `verify_smaller` compares on.

    Args:
        model: the original.
        narrowed: what `narrow` made of it.
        kept: per tap the channels it keeps.

    Raises:
        PassError: the narrowed network fails or computes something else, which is a bug in indistill-fx.
    """
    model, narrowed = _with_own_state(model), _with_own_state(narrowed)
    nodes = [model.node(tap) for tap in kept]
    whole = ending_at(model.graph_module, nodes)
    axes = [model.facts[node.name].channel_axis or 0 for node in nodes]

    def selected(*inputs: Any) -> list[Tensor]:
        entries = zip(Runner(whole).run(*inputs), axes, kept.values(), strict=True)
        return [tensor.index_select(axis, torch.tensor(index).to(tensor.device)) for tensor, axis, index in entries]

    small = ending_at(narrowed.graph_module, [narrowed.node(tap) for tap in kept])
    _verify(model, selected, small, _Words("narrow", "narrowed", "original's channels"))


def _with_own_state(model: TracedModel) -> TracedModel:
    """The model with copies of the tensors that its forward writes, such as a running mean."""
    nodes = model.graph_module.graph.find_nodes(op="get_attr")
    written = {
        str(node.target) for node in nodes if any(is_inplace(user) and user.args[0] is node for user in node.users)
    }
    if not written:
        return model
    own, _ = copy_graph(model.graph_module)
    for name in written:
        path, _, leaf = name.rpartition(".")
        own_module(own, path).register_buffer(leaf, attribute(own, name).detach().clone())
    return replace(model, graph_module=own)


class _Words(NamedTuple):
    """What a message says of the pass and the two networks."""

    where: str
    kind: str
    original: str


Run = Callable[..., Any]


def _verify(model: TracedModel, original: Run, smaller: fx.GraphModule, words: _Words) -> None:
    size = batch_size(model.example_values)
    rows = batch_of(model.example_values, 3 if size == 2 else 2, example_size=size)

    def alone(run: Run, module: nn.Module) -> Run:
        def call(*inputs: Any) -> Any:
            with (
                evaluating(module),
                exact_arithmetic(),
            ):  # what a forward leaves behind does not reach the other network
                seed_torch(0)
                return run(*inputs)

        return call

    both = alone(original, model.graph_module), alone(smaller, smaller)
    if _compared(*both, _crops(model, rows), words):
        return
    if not _compared(*both, (rows, model.example_values), words):
        alone(model.graph_module, model.graph_module)(*model.example_values)  # raises if the example itself is wrong
        both[0](*model.example_values)
    _compared(*both, _shorter(rows), words)


def _compared(original: Run, smaller: Run, examples: Iterable[tuple[Any, ...]], words: _Words) -> bool:
    """Compare on the first inputs of a size that the original takes; whether there were any."""
    for inputs in examples:
        with suppress(Exception):
            expected = _tensors(original(*inputs))
            break
    else:
        return False
    try:
        got = _tensors(smaller(*inputs))
    except Exception as error:
        raise PassError(
            f"The {words.kind} network does not run: {type(error).__name__}: {error}.", where=words.where, hint=_HINT
        ) from error
    worst = max((_gap(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)
    if not worst <= _TOLERANCE:
        raise PassError(
            f"The {words.kind} network is off by {worst:.1e} of the largest value from the {words.original}.",
            where=words.where,
            got=worst,
            expected=_TOLERANCE,
            hint=_HINT,
        )
    return True


_HINT = "This is a mistake of indistill-fx: please report the model. Widths for single layers may avoid it."


def _crops(model: TracedModel, rows: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Small crops of images, the cheapest first, where sizes are free."""
    pictures = _tensors(rows)
    if model.report.method == "symbolic" and all(leaf.dim() == 4 for leaf in pictures):
        side = min((n for leaf in pictures for n in leaf.shape[2:]), default=0)
        for crop in (n for n in _CROPS if n < side):
            yield tree_map(lambda leaf, n=crop: leaf[:, :, :n, :n] if isinstance(leaf, Tensor) else leaf, rows)


def _shorter(rows: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Images with fewer pixels, or sequences with fewer steps."""
    for first, last in ((2, None), (1, 2)):  # sizes after the channels; steps before the features
        lengths = {n for leaf in _tensors(rows) for n in leaf.shape[first:last] if n > 3}
        if lengths:
            yield tree_map(lambda leaf, lengths=lengths: _shortened(leaf, lengths), rows)


def _shortened(leaf: Any, lengths: Set[int]) -> Any:
    if isinstance(leaf, Tensor):
        for axis, n in enumerate(leaf.shape):
            if axis > 0 and n in lengths:
                leaf = leaf.narrow(axis, 0, 3 * n // 4 // 8 * 8 or 3 * n // 4)
    return leaf


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _gap(expected: Tensor, got: Tensor) -> float:
    return relative_difference(expected, got) if expected.shape == got.shape else float("inf")
