"""Which axis of each tensor holds the channels: carried along the graph from the operations that fix it.

Convolutions put channels on axis 1 and linear layers on the last; layout operations move the axis; everything else keeps it. Where a
reshape parts the channels over several axes (a channel shuffle) none of them holds the channels, until another reshape joins them again.
A layer that reads another axis than that of the channels (the tokens of a Mixer) takes it for the channels, until a layer reads the
other one again; a sum with what no such layer has turned is as that. Where weights give every number of the input a vector (the
tokens of a table's columns), the entries of the vectors are the channels.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from math import prod

import torch
from torch import fx

from indistill_fx.graph.edit import tensor_nodes
from indistill_fx.graph.ops import op_name

_FIRST = frozenset(
    "conv conv_transpose batch_norm instance_norm group_norm max_pool avg_pool adaptive_avg_pool adaptive_max_pool".split()
)
_LAST = frozenset("linear bilinear embedding embedding_bag layer_norm rms_norm multihead_attention".split())
_RECURRENT = frozenset("lstm gru rnn".split())
_ATTENTION = frozenset("multihead_attention head_attention".split())
_RESHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze".split())
_PERMUTES = frozenset("permute transpose t mt numpy_t".split())
_DESCRIBES = frozenset("size getattr dim ndimension numel nelement len".split())
"""What is asked of a tensor that says nothing of what it holds: sizes, its dtype and device."""
_KEEPS_FEATURES = frozenset("batch_norm layer_norm instance_norm group_norm rms_norm".split())
"""Layers behind which a tensor's channels are still the features of the input."""
_MATMULS = frozenset("matmul bmm".split())
_PRODUCTS = frozenset("matmul bmm baddbmm einsum".split())
_KEEPS_PARTS = frozenset("contiguous clone dropout identity".split())
_USUAL = {2: 1, 3: 2, 4: 1, 5: 1}
"""The axis of channels by the number of axes, where nothing else shows it."""
Shape = tuple[int, ...]


def channel_axes(
    graph_module: fx.GraphModule,
    shapes: Mapping[str, Shape],
    dtypes: Mapping[str, torch.dtype],
    batch: Mapping[str, int | None],
) -> dict[str, int | None]:
    """The channel axis of every node in `shapes`; None where no axis holds channels, as in one value for each sample (`batch`)."""
    axes: dict[str, int | None] = {}
    split_axes: dict[str, Shape] = {}
    turned: set[str] = set()
    features: set[str] = set()
    heads: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.name in shapes:
            source = _main_source(node, shapes, axes, turned, batch)
            if node.op == "placeholder" or (source is not None and source.name in features and _keeps_features(node)):
                features.add(node.name)
            has_axis = dtypes[node.name].is_floating_point and (
                len(shapes[node.name]) > 1 or batch.get(node.name) is None
            )
            axes[node.name] = _axis(node, shapes, axes, source) if has_axis else None
            if (
                has_axis
                and source is not None
                and source.name in features
                and _embeds(node, source, shapes, axes, batch)
            ):
                axes[node.name] = len(shapes[node.name]) - 1
                features.discard(node.name)
            if node.name in axes and _is_of_heads(node, shapes, heads):
                axes[node.name] = None
            if has_axis and axes[node.name] is None:
                axes[node.name] = _parts(node, shapes, axes, split_axes)
                if axes[node.name] is None and (node.name in split_axes or _is_of_heads(node, shapes, heads)):
                    heads.add(node.name)
            if has_axis and axes[node.name] is None:
                axes[node.name] = _lent(node, shapes, axes)
            other = source is not None and op_name(node) in _FIRST | _LAST and axes[node.name] != axes[source.name]
            if source is not None and (source.name in turned) != other:
                turned.add(node.name)
    return axes


def _is_of_heads(node: fx.Node, shapes: Mapping[str, Shape], heads: Container[str]) -> bool:
    """Whether channels are split over axes there, as over the heads of an attention: a bias for each head does not tell where they are."""
    if node.op == "call_module" and op_name(node) in _FIRST | _LAST:
        return False
    rank = len(shapes[node.name])
    return any(n.name in heads and len(shapes[n.name]) == rank for n in _read(node, shapes))


def _keeps_features(node: fx.Node) -> bool:
    """Whether no layer makes new channels there."""
    return node.op != "call_module" if op_name(node) not in _FIRST | _LAST else op_name(node) in _KEEPS_FEATURES


def _embeds(
    node: fx.Node,
    source: fx.Node,
    shapes: Mapping[str, Shape],
    axes: Mapping[str, int | None],
    batch: Mapping[str, int | None],
) -> bool:
    """Whether weights give every feature of `source` a vector: an axis for its entries is new, or had one entry, or is multiplied out."""
    before, shape = shapes[source.name], shapes[node.name]
    weights = [shapes[n.name] for n in _read(node, shapes) if batch.get(n.name) is None]
    axis = axes[source.name]
    if axis is None or len(shape) > 4 or not any(w[-1:] == shape[-1:] != (1,) for w in weights):
        return False
    if op_name(node) in _PRODUCTS and any(len(weight) > 2 for weight in weights):
        return axis in (len(shape) - 2, len(shape) - 3)
    columns = before[:-1] if len(before) == len(shape) and before[-1] == 1 else before
    return axis < len(shape) - 1 and shape[:-1] == columns


def _parts(
    node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None], split_axes: dict[str, Shape]
) -> int | None:
    """The axis on which a reshape joins split channels; else None, and the axes they are split over are stored in `split_axes`."""
    source = next(iter(_read(node, shapes)), None)
    if source is None:
        return None
    before, shape, name = shapes[source.name], shapes[node.name], op_name(node)
    axis = axes[source.name]
    axes_split = split_axes.get(source.name, ()) if axis is None else (axis,)
    if not axes_split:
        return None
    if name in _PERMUTES and axis is None:
        order = _order(node, len(shape))
        axes_split = tuple(sorted(order.index(k) for k in axes_split)) if order else ()
    elif name in _RESHAPES and axes_split == tuple(range(axes_split[0], axes_split[-1] + 1)):
        outer, count = prod(before[: axes_split[0]]), prod(before[k] for k in axes_split)
        runs = [(a, b) for a in range(len(shape)) for b in range(a + 1, len(shape) + 1)]
        axes_split = next(
            (tuple(range(a, b)) for a, b in runs if prod(shape[:a]) == outer and prod(shape[a:b]) == count), ()
        )
    elif axis is None and (gone := _axis_unbound(node, len(before))) is not None:
        axes_split = tuple(k - (gone < k) for k in axes_split if k != gone)
    elif name not in _KEEPS_PARTS or axis is not None:
        axes_split = ()
    if len(axes_split) == 1:
        return axes_split[0]
    if axes_split:
        split_axes[node.name] = axes_split
    return None


def _lent(node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None]) -> int | None:
    """The axis of a tensor whose whole shape a reshape gives back: channels that were folded into the batch are on it again."""
    lenders = (n for n in _read(node, shapes, sizes=True) if shapes[n.name] == shapes[node.name])
    return next((axes[n.name] for n in lenders if axes[n.name] is not None), None)


def _order(node: fx.Node, rank: int) -> list[int]:
    """Per axis of a permutation's result, the axis it comes from; empty where that is not known."""
    given = [d % rank for d in (_ints(node.args[1:]) or _ints(tuple(node.kwargs.values())))]
    if op_name(node) == "permute":
        return given if len(given) == rank else []
    if op_name(node) == "numpy_t":
        return list(range(rank))[::-1]
    if op_name(node) in ("t", "mt"):
        given = [rank - 2, rank - 1] if rank > 1 else []
    if len(given) != 2:
        return []
    order = list(range(rank))
    order[given[0]], order[given[1]] = given[1], given[0]
    return order


def _axis(
    node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None], source: fx.Node | None
) -> int | None:
    shape, name = shapes[node.name], op_name(node)
    rank = len(shape)
    if rank < 2 or node.op == "get_attr":
        return rank - 1 if rank else None
    if node.op == "placeholder" or name in _FIRST:
        return 1
    if name in _LAST or _is_feature_of_tuple(node):
        return rank - 1
    if source is None:
        return _USUAL.get(rank)
    before, axis = shapes[source.name], axes[source.name]
    if axis is None:
        return None if rank > 2 else 1
    if name in _PERMUTES and (name != "transpose" or _ints(node.args[1:]) or node.kwargs):
        order = _order(node, rank)
        return order.index(axis) if order else None
    if node.args[:1] == (source,) and (gone := _axis_taken(node, len(before))) is not None:
        return None if gone == axis else axis - (gone < axis)
    if name == "stack" and len(before) == rank - 1:
        new = next(iter(_ints((*node.args[1:2], *node.kwargs.values()))), 0) % rank
        return axis + (new <= axis)
    if name == "einsum" and (place := _through_einsum(node, source, shapes, axis)) is not None:
        return place
    if name in _MATMULS and _holds_columns(node, shapes, axes):
        return rank - 1
    if name in _RESHAPES or len(before) != rank:
        found = _through_reshape(before, shape, axis)
        # With one sample and one channel the two axes look alike; the first one is the batch.
        return _USUAL.get(rank) if found == 0 and axis > 0 and prod(before) != prod(shape) else found
    return axis


def _axis_taken(node: fx.Node, rank: int) -> int | None:
    """The one axis of so many from which an entry is taken, as in `x[:, :, -1]`; None for any other operation or key."""
    if op_name(node) == "select":
        return next((d % rank for d in _ints(node.args[1:2])), None)
    key = node.args[1] if op_name(node) == "getitem" else None
    entries = list(key) if isinstance(key, tuple) else [key]
    if ... in entries:
        place = entries.index(...)
        entries[place : place + 1] = [slice(None)] * (rank - len(entries) + 1)
    numbers = [axis for axis, entry in enumerate(entries) if not isinstance(entry, slice)]
    return numbers[0] if len(numbers) == 1 and type(entries[numbers[0]]) is int else None


def _axis_unbound(node: fx.Node, rank: int) -> int | None:
    """The one axis of so many from which an entry is taken, by a key or as a part of `unbind`."""
    whole = node.args[0] if node.args else None
    if op_name(node) == "getitem" and isinstance(whole, fx.Node) and op_name(whole) == "unbind":
        return next(iter(_ints((*whole.args[1:2], *whole.kwargs.values()))), 0) % rank
    return _axis_taken(node, rank)


def _is_feature_of_tuple(node: fx.Node) -> bool:
    """Whether a node is the output or a state of a recurrent layer, or the output of an attention; not its weights."""
    places = []
    while op_name(node) == "getitem" and isinstance(node.args[0], fx.Node):
        places.append(node.args[1])
        node = node.args[0]
    return bool(places) and (op_name(node) in _RECURRENT or (op_name(node) in _ATTENTION and places == [0]))


def _main_source(
    node: fx.Node,
    shapes: Mapping[str, Shape],
    axes: Mapping[str, int | None],
    turned: Container[str],
    batch: Mapping[str, int | None],
) -> fx.Node | None:
    """The input that the output's layout follows: the first of the same shape or rank that grows with the batch, if possible not turned."""
    inputs = [n for n in _read(node, shapes) if n.op != "get_attr"]
    inputs.sort(key=lambda n: batch.get(n.name) is None)
    same = [n for n in inputs if len(shapes[n.name]) == len(shapes[node.name]) and axes[n.name] is not None]
    full = [n for n in same if shapes[n.name] == shapes[node.name]]
    full.sort(
        key=lambda n: (n.op == "call_function" and not _read(n, shapes), n.name in turned)
    )  # `zeros` tell nothing
    return next(iter((*full, *same, *inputs)), None)


def _read(node: fx.Node, shapes: Mapping[str, Shape], *, sizes: bool = False) -> list[fx.Node]:
    """The tensors that a node reads; for a tuple (the parts of a split), those that the tuple was made from.

    With `sizes`, also those of which it reads sizes alone.
    """
    if node.name not in shapes and op_name(node) in _DESCRIBES and not sizes:
        return []
    return [
        other
        for given in tensor_nodes((node.args, node.kwargs))
        for other in ([given] if given.name in shapes else _read(given, shapes, sizes=sizes))
        if other.name in shapes
    ]


def _through_einsum(node: fx.Node, source: fx.Node, shapes: Mapping[str, Shape], axis: int) -> int | None:
    """Where the channels of `source` go: to the place of their letter, or, if they are multiplied out, of the letter that weights bring."""
    equation = str(node.args[0]).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    operands = [n for n in tensor_nodes(node.args[1:]) if n.name in shapes]
    letters = terms.split(",")
    if not arrow or "." in equation or len(operands) != len(letters) or source not in operands:
        return None
    own = letters[operands.index(source)]
    if own[axis] in result:
        return result.index(own[axis])
    given = {letter for term, n in zip(letters, operands, strict=True) if n.op != "get_attr" for letter in term}
    new = [place for place, letter in enumerate(result) if letter not in given]
    return new[-1] if new else None


def _holds_columns(node: fx.Node, shapes: Mapping[str, Shape], axes: Mapping[str, int | None]) -> bool:
    """Whether the right factor of a product has its channels last, where they stay, as the values of an attention."""
    factors = _read(node, shapes)
    right = factors[-1]
    return len(factors) == 2 and len(shapes[right.name]) > 2 and axes[right.name] == len(shapes[right.name]) - 1


def _through_reshape(before: Shape, after: Shape, axis: int) -> int | None:
    """Where the axis goes when a tensor is reshaped: the axis of the same size and the same product of sizes before it.

    >>> _through_reshape((2, 64, 7, 7), (2, 64, 49), 1)
    1
    >>> _through_reshape((2, 64, 1, 1), (2, 64), 1)
    1
    >>> _through_reshape((2, 49, 64), (2, 7, 7, 64), 2)
    3
    """
    outer = prod(before[:axis])
    for k, n in enumerate(after):
        if n == before[axis] and prod(after[:k]) == outer:
            return k
    if len(after) == 2:
        return 1
    return None


def _ints(values: tuple[object, ...]) -> list[int]:
    flat = values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values
    return [v for v in flat if isinstance(v, int)]
