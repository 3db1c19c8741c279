"""The reference that `shrink` is checked against: the original network, whose every reader ignores the channels that were removed.

Readers get zeros in place of removed channels, which is the same as zeroing their columns. (Zeroing the makers' rows would not do:
a bias or a norm after them makes something of the zeros.) Norms and means are taken over the channels that stay.
No weight is sliced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from indistill_fx.errors import PassError
from indistill_fx.graph.edit import batch_size
from indistill_fx.graph.interpret import Runner
from indistill_fx.passes.channels.attention import (
    BY_LETTERS,
    PRODUCTS,
    free_heads,
    letters,
    operands_of,
    with_projections,
)
from indistill_fx.passes.channels.call import Call, axis_of, read_call
from indistill_fx.passes.channels.comparisons import COMPARISONS, ends_compared
from indistill_fx.passes.channels.joining import REDUCTIONS
from indistill_fx.passes.channels.norms import mixed_axis
from indistill_fx.passes.channels.space import reduced_axes
from indistill_fx.passes.pruning.recurrent import NAMES, features, silent
from indistill_fx.traced import NodeFacts, TracedModel

_HINT = "Run the masked network on inputs of the example's size."


def _stretched(kept: Sequence[int], of: int, size: int, samples: int | None = None) -> tuple[int, ...] | None:
    """The entries that stay of an axis that holds channels and places, such as height and width, if there are more or fewer places.

    If the places are samples, their number in the example is known.

    None where the entries do not show whether the places of one channel stand together or the channels of one place.

    >>> _stretched((2, 3), 6, 9), _stretched((1, 4), 6, 9), _stretched((0, 1, 4), 6, 9)
    ((3, 4, 5), (1, 4, 7), None)
    >>> _stretched((0, 1, 4, 5, 8, 9), 12, 16), _stretched((0, 1, 4, 5, 8, 9), 12, 16, samples=3)
    (None, (0, 1, 4, 5, 8, 9, 12, 13))
    """
    stays = np.isin(np.arange(of), kept)
    together = int(np.gcd.reduce(np.flatnonzero(np.diff(stays)) + 1, initial=of))
    period = next(n for n in range(1, of + 1) if of % n == 0 and (stays.reshape(-1, n) == stays[:n]).all())
    if samples is not None:
        together = samples if (stays.reshape(-1, samples) == stays[::samples, None]).all() else 1
        period = of // samples if (stays.reshape(samples, -1) == stays[: of // samples]).all() else of
    if (together > 1) == (period < of):
        return None
    pattern = stays[:period:together]
    times, rest = divmod(size, len(pattern))
    longer = np.repeat(pattern, times) if together > 1 else np.tile(pattern, times)
    return None if rest else tuple(np.flatnonzero(longer).tolist())


class Masked(Runner):
    """Runs a graph with removed channels masked wherever channels are mixed.

    Args:
        model: the original, as it was given to `shrink`.
        axes: the entries that stay, per node and axis that lost some (`ShrinkReport.axes`).
    """

    def __init__(self, model: TracedModel, axes: Mapping[tuple[str, int | str], tuple[int, ...]]):
        super().__init__(model.graph_module)
        self.axes = axes
        self.losing = {name for name, _ in axes}
        self.facts: Mapping[str, NodeFacts] = model.facts
        self.samples = batch_size(model.example_values)

    def kept(self, node: fx.Node, axis: int, value: Tensor) -> tuple[int, ...] | None:
        """The entries that stay along an axis of a node's value, which may have another length than the example's; None if all stay.

        Raises:
            PassError: the value has other axes than the example's, or nothing says which entries of another length stay.
        """
        shape = self.facts[node.name].shape if node.name in self.losing else ()
        if node.name in self.losing and value.dim() != len(shape):
            raise PassError(f"`{node.name}` has {value.dim()} axes here, and {len(shape)} in the example.", hint=_HINT)
        kept = self.axes.get((node.name, axis))
        if kept is None or value.shape[axis] == shape[axis]:
            return kept
        samples = self.samples if axis == self.facts[node.name].batch_axis else None
        longer = _stretched(kept, shape[axis], value.shape[axis], samples)
        if longer is None:
            raise PassError(
                f"Which of the {value.shape[axis]} entries of `{node.name}` stay does not follow from the example's {shape[axis]}.",
                hint=_HINT,
            )
        return longer

    def mask(self, node: Any, axis: int, value: Tensor) -> Tensor:
        """Ones for entries that stay along an axis, zeros for the others; shaped to multiply the tensor."""
        kept = self.kept(node, axis, value)
        if kept is None:
            return value.new_ones(())
        ones = torch.zeros(value.shape[axis], dtype=value.dtype, device=value.device)
        ones[list(kept)] = 1
        return ones.view([-1 if k == axis else 1 for k in range(value.dim())])

    def run_node(self, node: fx.Node) -> Any:
        """The node's value, by the masked form of its operation if it mixes channels."""
        if not node.op.startswith("call") or not self.touches(node):
            return super().run_node(node)
        call = read_call(node, self.facts)
        changed = {
            source: self._silenced(call, source)
            for source in node.all_input_nodes
            if isinstance(self.env.get(source), Tensor)
        }
        before = {source: self.env[source] for source in changed}
        try:
            self.env.update(changed)
            masked_form = _MIXING.get(call.op)
            return masked_form(self, call) if masked_form is not None and self.losing else super().run_node(node)
        finally:
            self.env.update(before)

    def touches(self, node: fx.Node) -> bool:
        """Whether any input or output of a node is masked."""
        names = {node.name, str(node.target), *(source.name for source in node.all_input_nodes)}
        return not names.isdisjoint(self.losing)

    def _silenced(self, call: Call, source: fx.Node) -> Tensor:
        """A reader's operand with zeros in place of removed channels."""
        value: Tensor = self.env[source]
        for axis in _read_axes(call, source, value.dim()):
            mask = self.mask(source, axis, value)
            value = value * mask if mask.dim() else value
        return value


def _read_axes(call: Call, source: fx.Node, rank: int) -> list[int]:
    """The axes of an operand that the operation sums over."""
    if call.op in ("conv", "conv_transpose", "deform_conv2d", "conv_per_sample") and source is call.input:
        return [1]
    if (call.op == "linear" and source is call.input) or call.op in (
        "multihead_attention",
        "head_attention",
        "shifted_window_attention",
        "bilinear",
    ):
        return [rank - 1] if source.op != "get_attr" else []
    if call.op in NAMES or (call.op == "PackedSequence" and source is features(call.node)):
        return [rank - 1]
    if call.op in PRODUCTS:
        left, right = operands_of(call)
        return [rank - 1] if source is left else [max(rank - 2, 0)] if source is right else []
    if call.op in BY_LETTERS and (parsed := letters(call)) is not None:
        name = parsed[0][parsed[2].index(source)] if source in parsed[2] else ""
        return [k for k, letter in enumerate(name) if letter not in parsed[1]]
    return []


def _moments(x: Tensor, mask: Tensor, dims: list[int], eps: float) -> Tensor:
    weight = mask.expand_as(x)
    count = weight.sum(dims, keepdim=True).clamp_min(1)  # of a group that went, nothing is read
    mean = (x * weight).sum(dims, keepdim=True) / count
    var = ((x - mean).square() * weight).sum(dims, keepdim=True) / count
    return (x - mean) / (var + eps).sqrt()


def _layer_norm(run: Masked, call: Call) -> Tensor:
    """Layer norm or RMS norm, the statistics of the entries that stay."""
    x: Tensor = run.env[call.input]
    axes = len(call.get("normalized_shape"))
    dims = list(range(x.dim() - axes, x.dim()))
    mask = x.new_ones(())
    for axis in dims:
        mask = mask * run.mask(call.input, axis, x)
    if call.op == "layer_norm":
        return _affine(run, call, _moments(x, mask, dims, float(call.get("eps", 1e-5))), 0)
    eps = torch.finfo(x.dtype).eps if call.get("eps") is None else float(call.get("eps"))
    weight = mask.expand_as(x)
    squares = (x.square() * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp_min(1)
    return _affine(run, call, x * (squares + eps).rsqrt(), 0)


def _group_norm(run: Masked, call: Call) -> Tensor:
    x: Tensor = run.env[call.input]
    groups = int(call.get("num_groups"))
    mask = run.mask(call.input, 1, x).expand_as(x).unflatten(1, (groups, -1))
    grouped = x.unflatten(1, (groups, -1))
    y = _moments(grouped, mask, list(range(2, grouped.dim())), float(call.get("eps", 1e-5))).flatten(1, 2)
    return _affine(run, call, y, x.dim() - 2)


def _affine(run: Masked, call: Call, x: Tensor, spaces: int) -> Tensor:
    weight, bias = (run.env[v] if isinstance(v := call.get(name), fx.Node) else v for name in ("weight", "bias"))
    if weight is not None:
        x = x * weight.view(*weight.shape, *[1] * spaces)
    return x if bias is None else x + bias.view(*bias.shape, *[1] * spaces)


def _reduced(run: Masked, call: Call) -> Any:
    """A reduction of the entries that stay."""
    for axis in reduced_axes(call):
        _leave_out(run, call.input, axis)
    return Runner.run_node(run, call.node)


def _leave_out(run: Masked, operand: fx.Node, axis: int) -> Tensor | None:
    """Take the removed entries of an axis out of an operand; returns the places of those that stay."""
    kept = run.kept(operand, axis, run.env[operand])
    if kept is None:
        return None
    places = torch.tensor(kept, device=run.env[operand].device)
    run.env[operand] = run.env[operand].index_select(axis, places)
    return places


def _compared(run: Masked, call: Call) -> Any:
    """A similarity or distance over the entries that stay."""
    for operand, axis in ends_compared(call):
        _leave_out(run, operand, axis)
    return Runner.run_node(run, call.node)


def _along(run: Masked, call: Call) -> Tensor:
    """A softmax or norm of the entries that stay, with zeros for the others."""
    x: Tensor = run.env[call.input]
    given = mixed_axis(call)
    axes = [axis_of(dim, x.dim()) for dim in ([given] if isinstance(given, int) else given or ())]
    left = {axis: places for axis in axes if (places := _leave_out(run, call.input, axis)) is not None}
    y: Tensor = Runner.run_node(run, call.node)
    for axis, places in left.items():
        shape = [x.shape[k] if k == axis else n for k, n in enumerate(y.shape)]
        y = y.new_zeros(shape).index_copy(axis, places, y)
    return y


def _attention(run: Masked, call: Call) -> Any:
    free = free_heads(call.module)  # type: ignore[arg-type]
    args, kwargs = run.arguments(call.node)
    kept = run.axes.get((call.path, "heads"))
    if free is None or kept is None:
        return call.module(*args, **kwargs)  # type: ignore[misc]
    out = torch.nn.Linear(free.out.in_features, free.out.out_features, free.out.bias is not None).to(free.out.weight)
    columns = torch.zeros(free.heads, free.head_dim).to(free.out.weight)
    columns[list(kept)] = 1
    with torch.no_grad():
        out.weight.copy_(free.out.weight * columns.flatten())
        if free.out.bias is not None:
            out.bias.copy_(free.out.bias)
    return with_projections(free, out=out)(*args, **kwargs)


def _recurrent(run: Masked, call: Call) -> Any:
    args, kwargs = run.arguments(call.node)
    kept = run.axes.get((call.path, "hidden"))
    module = call.module if kept is None else silent(call.module, kept)  # type: ignore[arg-type]
    return module(*args, **kwargs)  # type: ignore[misc]


def _windows(run: Masked, call: Call) -> Any:
    args, kwargs = run.arguments(call.node)
    kept = run.axes.get((call.node.name, "heads"))
    place, weight = call.places["proj_weight"], run.env[call.get("proj_weight")]
    if kept is not None:
        columns = torch.zeros(int(call.get("num_heads")), weight.shape[1] // int(call.get("num_heads"))).to(weight)
        columns[list(kept)] = 1
        weight = weight * columns.flatten()
    named = dict(kwargs)
    ordered = list(args)
    if isinstance(place, int):
        ordered[place] = weight
    else:
        named[place] = weight
    return call.node.target(*ordered, **named)  # type: ignore[operator]


_MIXING = {
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    **dict.fromkeys("softmax log_softmax softmin softmax2d normalize cumsum".split(), _along),
    "group_norm": _group_norm,
    **dict.fromkeys(
        "mean sum amax amin var std norm vector_norm prod logsumexp all any nansum nanmean".split(), _reduced
    ),
    **dict.fromkeys({"count_nonzero", *REDUCTIONS}, _reduced),
    "multihead_attention": _attention,
    "head_attention": _attention,
    "shifted_window_attention": _windows,
    **dict.fromkeys(COMPARISONS, _compared),
    **dict.fromkeys(NAMES, _recurrent),
}


class MaskedLogits(Masked):
    """A masked run that keeps the main output."""

    def __init__(self, model: TracedModel, axes: Mapping[tuple[str, int | str], tuple[int, ...]]):
        super().__init__(model, axes)
        self.wanted, self.logits = model.logits, torch.zeros(())

    def run_node(self, node: fx.Node) -> Any:
        """As for every masked run."""
        value = super().run_node(node)
        if node.name == self.wanted:
            self.logits = value
        return value
