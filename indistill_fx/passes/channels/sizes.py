"""Sizes that the code computes: what they are read off, and what they come to."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from torch import fx, nn

from indistill_fx.graph.ops import attribute, op_name, shape_read
from indistill_fx.passes.channels.call import Call, axis_of


def size_read(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The tensor and the axis whose size a node is: `x.size(2)`, `x.shape[2]`, `x.size()[2]`."""
    source: Any = node.args[0] if node.args else None
    axis: Any = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    if node.target is operator.getitem and isinstance(source, fx.Node):
        source = shape_read(source)
    elif node.target != "size":
        source = None
    return (source, axis) if isinstance(source, fx.Node) and isinstance(axis, int) else None


def is_arithmetic(node: fx.Node) -> bool:
    """Whether a node computes with numbers, or takes one of several."""
    return node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator"


def is_size(node: fx.Node) -> bool:
    """Whether a node that holds no tensor is a size, a shape, or computed from such."""
    return is_arithmetic(node) or size_read(node) is not None or shape_read(node) is not None


def leaves(size: fx.Node) -> Iterator[fx.Node]:
    """What a size is computed from: sizes that are read off tensors, and anything else that is no arithmetic."""
    if size_read(size) is not None or not is_arithmetic(size):
        yield size
    else:
        for source in size.all_input_nodes:
            yield from leaves(source)


def size_of(value: Any, one: Callable[[fx.Node, int], int], whole: Callable[[fx.Node], Sequence[int]]) -> Any:
    """What a size comes to; None if it is computed from other things than sizes.

    Args:
        value: a node, or a number.
        one: the size of one axis of a tensor, where the code reads that alone.
        whole: a tensor's shape, where the code reads the whole of it, or the number of entries.
    """
    if not isinstance(value, fx.Node):
        return value
    if (read := size_read(value)) is not None:
        return one(*read)
    if (tensor := shape_read(value)) is not None:
        return tuple(whole(tensor))
    if value.target == "numel" and isinstance(value.args[0], fx.Node):
        return prod(whole(value.args[0]))
    given = [size_of(argument, one, whole) for argument in value.args] if is_arithmetic(value) else [None]
    if any(argument is None for argument in given):
        return None
    try:
        return value.target(*given)  # type: ignore[operator]
    except ArithmeticError:
        return None


def sizes_given(call: Call) -> dict[int, int | fx.Node]:
    """The sizes that a reshape's code names one by one, by axis of the output: numbers, -1, and computed ones."""
    given, first = call.arguments.get("shape"), 0
    if call.op == "unflatten":
        given, dim = call.get("sizes", call.get("unflattened_size")), call.get("dim")
        first = axis_of(dim, len(call.shape(call.input) or ())) if isinstance(dim, int) else len(call.output_shape)
    elif isinstance(given, tuple) and len(given) != len(call.output_shape):
        given = None
    entries = enumerate(given, first) if isinstance(given, (tuple, list)) else ()
    return {axis: size for axis, size in entries if isinstance(size, (fx.Node, int))}


def shape_lender(call: Call) -> fx.Node | None:
    """The tensor whose whole shape an operation takes: `x.reshape_as(y)`, `x.view(y.shape)`, `torch.zeros(y.size())`."""
    given = call.arguments.get("shape", call.arguments.get("other"))
    lender = given[0] if isinstance(given, tuple) and len(given) == 1 else given
    if isinstance(lender, fx.Node) and call.shape(lender) is None:
        lender = shape_read(lender)
    return lender if isinstance(lender, fx.Node) and call.shape(lender) == call.output_shape else None


def follows_from_sizes(node: fx.Node) -> bool:
    """Whether a tensor is computed from sizes and constants alone: no parameter and no value of an input enters it.

    So are positions by sine and cosine that the code makes anew for every input.
    """
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        at = todo.pop()
        if at in seen or _tells_no_value(at):
            continue
        root = at.graph.owning_module if at.op == "get_attr" else None
        if root is not None and not isinstance(attribute(root, str(at.target)), nn.Parameter):
            continue
        if at.op not in ("call_function", "call_method"):
            return False
        seen.add(at)
        todo += at.all_input_nodes[:1] if op_name(at) in ("to", "type_as") else at.all_input_nodes
    return True


def _tells_no_value(node: fx.Node) -> bool:
    named = node.target is getattr and node.args[1:] in (("device",), ("dtype",))
    return named or size_read(node) is not None or shape_read(node) is not None
