"""Convolutions with filters of each sample's own: one operation, where models write them as one large grouped convolution.

Models lay a batch out as the channels of one image, `conv2d(x.view(1, b * c, h, w), filters.view(b * n, …), groups=b * g)`, and take
the result apart again. In that form the number of groups depends on the batch, and no channel has a place of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from indistill_fx.graph.edit import copy_graph, writes_alive
from indistill_fx.graph.ops import op_name

Shape = tuple[int, ...]
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_PLAIN = {"bias": None, "stride": 1, "padding": 0, "dilation": 1}


def conv_per_sample(
    input: Tensor, weight: Tensor, groups: int = 1, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Tensor:
    """Convolve each sample with its own filters.

    Args:
        input: (batch, channels, H, W).
        weight: (batch, filters, channels / groups, h, w).
        groups: of one sample's channels.
        stride: as in `conv2d`.
        padding: as in `conv2d`, in numbers.
        dilation: as in `conv2d`.

    Returns:
        (batch, filters, H', W').
    """
    if torch.compiler.is_exporting():
        return _by_matrices(input, weight, groups, *map(_both, (stride, padding, dilation)))
    as_one_sample = input.reshape(1, -1, *input.shape[2:])
    out: Tensor = functional.conv2d(
        as_one_sample, weight.flatten(0, 1), None, stride, padding, dilation, groups * input.shape[0]
    )
    return out.view(input.shape[0], weight.shape[1], *out.shape[2:])


def _by_matrices(
    input: Tensor,
    weight: Tensor,
    groups: int,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """The same convolution by matrix products: ONNX has no groups that depend on the batch."""
    kernel = tuple(weight.shape[3:])
    patches: Tensor = functional.unfold(input, kernel, dilation, padding, stride).unflatten(1, (groups, -1))
    out: Tensor = (weight.unflatten(1, (groups, -1)).flatten(3) @ patches).flatten(1, 2)
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    ]
    apart: Tensor = out.unflatten(2, sizes)
    return apart


def _both(value: Any) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def write_per_sample(
    graph_module: fx.GraphModule, runs: Sequence[Mapping[str, Shape]], batches: Sequence[int]
) -> tuple[fx.GraphModule, bool]:
    """Write the grouped convolutions over a whole batch as the operation they are.

    Args:
        graph_module: the captured graph; it is not changed.
        runs: per run the shapes of all tensors.
        batches: the size of the batch in each run; at least two differ, or nothing is written.

    Returns:
        The new graph, in which all nodes keep their names, and whether anything changed.
    """
    if len(set(batches)) < 2 or not any(_is_grouped_by_batch(node) for node in graph_module.graph.nodes):
        return graph_module, False
    new, _ = copy_graph(graph_module)
    changed = False
    for node in filter(_is_grouped_by_batch, list(new.graph.nodes)):
        changed |= _rewrite(node, runs, batches)
    if changed:
        new.graph.eliminate_dead_code(
            is_impure_node=lambda node: node.op in ("placeholder", "output") or writes_alive(node)
        )
        new.graph.lint()
        new.recompile()
    return (new, True) if changed else (graph_module, False)


def _is_grouped_by_batch(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) == "conv" and isinstance(_arguments(node)["groups"], fx.Node)


def _arguments(node: fx.Node) -> dict[str, Any]:
    return {"groups": 1, **_PLAIN, **dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}


def _rewrite(node: fx.Node, runs: Sequence[Mapping[str, Shape]], batches: Sequence[int]) -> bool:
    given = _arguments(node)
    if isinstance(given["padding"], str):
        return False
    full_input, filters = (
        _parted(given["input"], runs, batches),
        _parted(given["weight"], runs, batches) or given["weight"],
    )
    first, weight = runs[0], runs[0].get(given["weight"].name, ())
    if full_input is None or len(weight) != 4 or weight[0] % batches[0]:
        return False
    channels, count = first[full_input.name][1], weight[0] // batches[0]
    joined = [user for user in node.users if op_name(user) in ("view", "reshape")]
    others = {op_name(user) for user in node.users if user not in joined}
    if not joined or others - {"size", "shape", "getattr"} or channels % weight[1]:
        return False
    bias = given["bias"]
    if bias is not None and any(run[bias.name] != (n * count,) for run, n in zip(runs, batches, strict=True)):
        return False
    for user in joined:
        if any(run[user.name] != (n, count, *run[node.name][2:]) for run, n in zip(runs, batches, strict=True)):
            return False
    settings = {name: given[name] for name in ("stride", "padding", "dilation")}
    for user in joined:
        with node.graph.inserting_before(user):
            replacement = node.graph.call_function(*_in_order(filters, first[filters.name], count, weight))
        replacement.meta = dict(node.meta)
        convolved: tuple[Any, ...] = (full_input, replacement, channels // weight[1])
        user.op, user.target, user.args, user.kwargs = "call_function", conv_per_sample, convolved, settings
        if bias is not None:
            with node.graph.inserting_before(user):
                alone = node.graph.call_function(conv_per_sample, convolved, settings)
                added = (_parted(bias, runs, batches) or bias, (-1, count, 1, 1))
                shift = node.graph.call_function(torch.reshape, added)
            alone.meta, shift.meta = dict(node.meta), dict(node.meta)
            user.target, user.args, user.kwargs = operator.add, (alone, shift), {}
    return True


def _in_order(node: fx.Node, shape: Shape, count: int, weight: Shape) -> tuple[Any, tuple[Any, ...]]:
    """The call that makes (batch, filters, channels, h, w) of filters in any other form."""
    if shape == weight:
        return torch.unflatten, (node, 0, (-1, count))
    if shape[1:] == (count * weight[1], *weight[2:]):
        return torch.unflatten, (node, 1, (count, weight[1]))
    return torch.reshape, (node, (-1, count, *weight[1:]))


def _parted(node: Any, runs: Sequence[Mapping[str, Shape]], batches: Sequence[int]) -> fx.Node | None:
    """The tensor whose batch and channel axes a view merges into one axis."""
    source = node.args[0] if isinstance(node, fx.Node) and op_name(node) in ("view", "reshape") else None
    if not isinstance(source, fx.Node) or any(source.name not in run for run in runs):
        return None
    return source if all(run[source.name][0] == n for run, n in zip(runs, batches, strict=True)) else None
