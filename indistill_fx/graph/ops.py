"""What a graph node computes, whatever form the model's author wrote it in.

`nn.ReLU()`, `F.relu`, `torch.relu`, `x.relu()`, `x.relu_()` and `aten.relu.default` are one operation with one name here. The passes ask
`op_name` and never look at classes or targets themselves, so a rule is written once for all forms. Operations that torch has for
convenience (`dstack`, `broadcast_to`) are written as the basic ones that they are (`basic_form`).
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

_BY_CLASS: dict[str, str] = {
    **{f"Conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "conv_transpose" for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": "batch_norm" for n in (1, 2, 3)},
    **{f"InstanceNorm{n}d": "instance_norm" for n in (1, 2, 3)},
    **{f"MaxPool{n}d": "max_pool" for n in (1, 2, 3)},
    **{f"AvgPool{n}d": "avg_pool" for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": "adaptive_avg_pool" for n in (1, 2, 3)},
    **{f"AdaptiveMaxPool{n}d": "adaptive_max_pool" for n in (1, 2, 3)},
    **{f"Dropout{n}d": "dropout" for n in (1, 2, 3)},
    "SyncBatchNorm": "batch_norm",
    "LocalResponseNorm": "local_response_norm",
    "NonDynamicallyQuantizableLinear": "linear",
    "MultiheadAttention": "multihead_attention",
}
_BY_NAME: dict[str, str] = {
    **{f"conv{n}d": "conv" for n in (1, 2, 3)},
    "_convolution": "conv",
    "convolution": "conv",
    **{f"conv_transpose{n}d": "conv_transpose" for n in (1, 2, 3)},
    **{f"max_pool{n}d": "max_pool" for n in (1, 2, 3)},
    **{f"avg_pool{n}d": "avg_pool" for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": "adaptive_avg_pool" for n in (1, 2, 3)},
    **{f"adaptive_max_pool{n}d": "adaptive_max_pool" for n in (1, 2, 3)},
    **{f"dropout{n}d": "dropout" for n in (1, 2, 3)},
    **{f"feature_dropout{n}d": "dropout" for n in (1, 2, 3)},
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "_assert": "assert",
    **dict.fromkeys(("swapaxes", "swapdims"), "transpose"),
    "moveaxis": "movedim",
    "reshape_as": "reshape",
    "view_as": "view",
    "_unsafe_view": "view",
    **{f"unsafe_{kind}": kind for kind in ("chunk", "split", "split_with_sizes")},
    "narrow_copy": "narrow",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    **{
        f"upsample_{kind}": "interpolate"
        for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d")
    },
    "linalg_vector_norm": "vector_norm",
    "linalg_norm": "norm",
    "alias": "identity",
    "_threshold": "threshold",
    "clip": "clamp",
    "hard_swish": "hardswish",
}
_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")

UNARY = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid softplus softsign "
    "log_sigmoid threshold dropout alpha_dropout identity clone contiguous detach abs neg exp log sqrt rsqrt square float half to "
    "type_as clamp clamp_min clamp_max pow stochastic_depth drop_path only_in_training".split()
)
"""Elementwise operations on one tensor: every entry of the output depends on the entry at the same place alone."""

_INPLACE_OPERATORS = frozenset(
    {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow, operator.iand, operator.ior}
)

BINARY = frozenset("add sub mul div maximum minimum".split())
"""Elementwise operations on two broadcast operands."""


_COMPACT = {name.replace("_", ""): name for name in (*UNARY, "layer_norm", "group_norm", "pixel_shuffle", "softmax")}


def attribute(root: nn.Module, path: str) -> Any:
    """The module, parameter or buffer that a `call_module` or `get_attr` node names, by its dotted path."""
    value: Any = root
    for name in path.split(".") if path else ():
        children = value.__dict__.get("_modules")  # faster than getattr, where torch looks for modules last
        value = children[name] if children and name in children else getattr(value, name)
    return value


def has_attribute(root: nn.Module, path: str) -> bool:
    """Whether `attribute` finds something."""
    try:
        attribute(root, path)
    except AttributeError:
        return False
    return True


def op_name(node: fx.Node) -> str:
    """The operation's canonical name: `conv`, `batch_norm`, `relu`, `add`, …; placeholders, attributes and outputs by their fx name.

    A module with no rule of its own is called by its class name in snake case, and one whose forward is not torch's by its class name as
    it is (`MyBlock`), so that a user's `Dropout` is not taken for torch's. Nor is a user's function `relu`, which is called `relu()`, or
    a user's operator, which is called `their_library::relu`.
    """
    if node.op == "call_module":
        owner = node.graph.owning_module
        if owner is None:
            raise RuntimeError(f"node {node.name} stands in a graph without a module")
        return module_op(attribute(owner, str(node.target)))
    if node.op in ("call_function", "call_method"):
        name = function_name(node.target)
        return _TRANSPOSED.get(str(node.args[1]), name) if name == "getattr" else name
    return node.op


_TRANSPOSED = {"mT": "mt", "mH": "mt", "H": "mt", "T": "numpy_t"}
"""What an attribute of a tensor computes, such as `x.mT`."""


def module_op(module: nn.Module) -> str:
    """The canonical name of what a module does (see `op_name`)."""
    kind = type(module)
    name = _class_op(kind.__name__)
    plain = name in _BY_NAME_ALONE or package_of(getattr(kind, "forward", None)) in _LIBRARIES
    return name if plain else kind.__name__


_BY_NAME_ALONE = frozenset({"stochastic_depth", "drop_path"})
"""What torch has no class for, and every library one of its own that does the same."""


@functools.lru_cache(1024)
def _class_op(name: str) -> str:
    if name in _BY_CLASS:
        return _BY_CLASS[name]
    return _COMPACT.get(name.lower(), _WORDS.sub("_", name).lower())


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """What `module.parameters()` gives; faster for a layer without parts."""
    if module._modules:
        yield from module.parameters()
    else:
        yield from {id(p): p for p in module._parameters.values() if p is not None}.values()


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `tensor` with `value` at `index`: what `tensor[index] = value` makes, out of place."""
    result = tensor.clone()
    result[index] = value
    return result


def shape_read(node: fx.Node) -> fx.Node | None:
    """The tensor whose whole shape a node is: `x.shape`, `x.size()`."""
    whole = (node.target is getattr and node.args[1:] == ("shape",)) or (
        node.target == "size" and len(node.args) + len(node.kwargs) == 1
    )
    return node.args[0] if whole and isinstance(node.args[0], fx.Node) else None


Form = tuple[Any, tuple[Any, ...]]
"""A function, or a method by its name, and its arguments."""


def basic_form(node: fx.Node, shapes: Mapping[str, tuple[int, ...]]) -> Form | None:
    """The basic operation that a node is another spelling of (`x.expand(y.shape)` of `x.expand_as(y)`); None if it is none.

    Args:
        node: of any graph.
        shapes: of all tensors of that graph.
    """
    form = _FORMS.get(op_name(node)) if node.op in ("call_function", "call_method") else None
    ranks = [len(shapes[source.name]) for source in node.all_input_nodes if source.name in shapes]
    basic = form(ranks, *node.args, **node.kwargs) if form is not None and ranks else None
    return None if basic == (node.target, node.args) else basic


def _expanded(_: list[int], input: fx.Node, *sizes: Any, size: Any = None, implicit: bool = False) -> Form:
    given = sizes or (size,)
    like = shape_read(given[0]) if len(given) == 1 and isinstance(given[0], fx.Node) else None
    if like is not None:
        return "expand_as", (input, like)
    return "expand", (input, *(given[0] if isinstance(given[0], (tuple, list)) else given))


def _parted(axis: int, ranks: list[int], input: fx.Node, sections: Any = None, indices: Any = None) -> Form | None:
    given = sections if indices is None else indices
    return (torch.tensor_split, (input, given, axis)) if ranks[0] > max(axis, 1) else None


def _joined(axis: int, ranks: list[int], tensors: Any) -> Form | None:
    return (torch.cat, (tensors, axis)) if min(ranks) > max(axis, 1) else None


def _written(ranks: list[int], input: fx.Node, src: fx.Node, dim: int, entry: int | slice) -> Form:
    return with_item, (input, (*[slice(None)] * (dim % ranks[0]), entry), src)


def _slice_written(
    ranks: list[int], input: fx.Node, src: fx.Node, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Form:
    return _written(ranks, input, src, dim, slice(start, end, None if step == 1 else step))


def _entry_written(ranks: list[int], input: fx.Node, src: fx.Node, dim: int, index: int) -> Form:
    return _written(ranks, input, src, dim, index)


def _size_of_part(_: list[int], part: Any, dim: Any = None) -> Form | None:
    """`x[:, :, -1].size(1)` is `x.size(1)`: what is taken is not read."""
    key = part.args[1] if part.target is operator.getitem and isinstance(part.args[1], tuple) else ()
    if not isinstance(dim, int) or not all(type(entry) is int or entry == slice(None) for entry in key):
        return None
    whole = [axis for axis, entry in enumerate(key) if entry == slice(None)]
    return ("size", (part.args[0], whole[dim])) if 0 <= dim < len(whole) else None


def _tiled(ranks: list[int], input: fx.Node, *given: Any, dims: Any = None) -> Form:
    first = given[0] if given else dims
    times = first if isinstance(first, (tuple, list)) else given
    return "repeat", (input, *[1] * (ranks[0] - len(times)), *times)


_FORMS: dict[str, Callable[..., Form | None]] = {
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    **{name: functools.partial(_parted, axis) for name, axis in {"vsplit": 0, "hsplit": 1, "dsplit": 2}.items()},
    **{
        name: functools.partial(_joined, axis)
        for name, axis in {"vstack": 0, "row_stack": 0, "hstack": 1, "column_stack": 1, "dstack": 2}.items()
    },
    "slice_scatter": _slice_written,
    "select_scatter": _entry_written,
    "tile": _tiled,
    "size": _size_of_part,
}
"""Operations that are other spellings of basic ones."""


def function_name(target: Any) -> str:
    """The canonical name of what a function, or a method by its name, does (see `op_name`)."""
    schema = getattr(target, "_schema", None)
    operator = schema.name if schema is not None else getattr(target, "_qualified_op_name", None)
    if operator is not None:
        library, _, name = str(operator).rpartition("::")
        if library not in _OPERATORS:
            return f"{library}::{name}"
    else:
        name = str(getattr(target, "__name__", target))
        if is_users_function(target) and name not in _BY_NAME_ALONE:
            return f"{name}()"
    name = _BY_NAME.get(name, name)
    if name.endswith("_") and not name.endswith("__"):
        name = name.rstrip("_")
    return _BY_NAME.get(name, name)


def is_users_function(target: Any) -> bool:
    """Whether a function, or an object that is called, is neither torch's nor Python's own nor ours."""
    package = package_of(target)
    return package is not None and package not in _LIBRARIES


def package_of(target: Any) -> str | None:
    """The top-level package that a function, or the class of an object that is called, comes from; None if it does not say."""
    module = getattr(target, "__module__", None)
    return module.partition(".")[0] if isinstance(module, str) else None


_OPERATORS = frozenset({"aten", "prims", "torchvision"})
_LIBRARIES = frozenset({"torch", "torchvision", "indistill_fx", "_operator", "math", "builtins"})


def is_inplace(node: fx.Node) -> bool:
    """Whether the node writes into its first argument."""
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and getattr(attribute(owner, str(node.target)), "inplace", False) is True
    return writes_first(node.op, node.target, node.kwargs)


def writes_first(op: str, target: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `target` writes into its first argument."""
    if op == "call_method":
        name = str(target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if op != "call_function":
        return False
    schema = getattr(target, "_schema", None)
    if schema is not None:
        name = schema.name.split("::")[-1]
        return name.endswith("_") and not name.endswith("__")
    if kwargs.get("inplace") is True or target is operator.setitem or target in _INPLACE_OPERATORS:
        return True
    name = str(getattr(target, "__name__", ""))
    return name.endswith("_") and not name.endswith("__") and package_of(target) in _LIBRARIES
