"""One view of an operation for all its forms: named arguments, whether it is a module, a function, a method or an ATen call."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.graph.edit import place_of, tensor_nodes, with_tensors
from indistill_fx.graph.interpret import run_part
from indistill_fx.graph.ops import attribute, module_op, op_name
from indistill_fx.passes.channels.selection import (
    Cut,
    Emit,
    Emitter,
    Filters,
    Index,
    Part,
    Propagation,
    Shape,
    Slices,
    sliced,
)
from indistill_fx.traced import NodeFacts

_WINDOWS = (
    "input qkv_weight proj_weight relative_position_bias window_size num_heads shift_size attention_dropout dropout qkv_bias proj_bias "
    "logit_scale training"
)

SPECTRA = "fft ifft rfft irfft hfft ihfft fft2 ifft2 rfft2 irfft2 fftn ifftn rfftn irfftn fftshift ifftshift".split()
"""Fourier transforms of `torch.fft`."""
SIGNATURES: dict[str, str] = {
    "conv": "input weight bias stride padding dilation groups",
    "conv_transpose": "input weight bias stride padding output_padding groups dilation",
    "deform_conv2d": "input offset weight bias stride padding dilation mask",
    "conv_per_sample": "input weight groups",
    "linear": "input weight bias",
    "bilinear": "input1 input2 weight bias",
    "embedding": "input weight",
    "embedding_bag": "input weight offsets",
    "batch_norm": "input running_mean running_var weight bias training momentum eps",
    "instance_norm": "input running_mean running_var weight bias",
    "layer_norm": "input normalized_shape weight bias eps",
    "rms_norm": "input normalized_shape weight eps",
    "group_norm": "input num_groups weight bias eps",
    "prelu": "input weight",
    "cat": "tensors dim",
    "stack": "tensors dim",
    "chunk": "input chunks dim",
    "split": "input split_size dim",
    "tensor_split": "input split_size dim",
    "split_with_sizes": "input split_size dim",
    "unbind": "input dim",
    "select": "input dim index",
    "narrow": "input dim start length",
    "slice": "input dim start end step",
    "index_select": "input dim index",
    "getitem": "input key",
    "with_item": "input key value",
    **dict.fromkeys("zeros ones empty".split(), "*shape"),
    **dict.fromkeys("new_zeros new_ones new_empty".split(), "input *shape"),
    "full": "shape fill_value",
    "new_full": "input shape fill_value",
    "transpose": "input dim0 dim1",
    "movedim": "input source destination",
    "permute": "input *dims",
    "view": "input *shape",
    "reshape": "input *shape",
    "expand": "input *shape",
    "repeat": "input *repeats",
    "repeat_interleave": "input repeats dim",
    "flatten": "input start_dim end_dim",
    "unflatten": "input dim sizes",
    "squeeze": "input dim",
    "unsqueeze": "input dim",
    "pad": "input pad mode value",
    "roll": "input shifts dims",
    "flip": "input *dims",
    "rot90": "input k dims",
    **dict.fromkeys((f"fft_{kind}" for kind in SPECTRA), "input size dim norm"),
    **dict.fromkeys(("fft_fftshift", "fft_ifftshift"), "input dim"),
    "unfold": "input kernel_size dilation padding stride",
    **dict.fromkeys(
        "gather scatter scatter_add scatter_reduce index_add index_copy index_fill".split(), "input dim index src"
    ),
    "take_along_dim": "input indices dim",
    "diff": "input n dim prepend append",
    "tensordot": "input other dims",
    "fold": "input output_size kernel_size dilation padding stride",
    "softmax": "input dim",
    "log_softmax": "input dim",
    "normalize": "input p dim",
    "glu": "input dim",
    "cumsum": "input dim",
    **dict.fromkeys(("matmul", "bmm", "mm", "mv", "_grouped_mm", "grouped_mm"), "input other"),
    "addmm": "input mat1 mat2",
    "baddbmm": "input batch1 batch2",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale",
    "shifted_window_attention": _WINDOWS,
    "window_attention": _WINDOWS,
    "_get_relative_position_bias": "table index window_size",
    "pixel_shuffle": "input upscale_factor",
    "pixel_unshuffle": "input downscale_factor",
    "channel_shuffle": "input groups",
    **dict.fromkeys(
        "mean sum amax amin max min median nanmedian mode prod logsumexp argmax argmin nansum nanmean all any "
        "count_nonzero".split(),
        "input dim keepdim",
    ),
    **dict.fromkeys("cumprod cummax cummin logcumsumexp softmin softmax2d argsort".split(), "input dim"),
    "sort": "input dim descending",
    "topk": "input k dim",
    "kthvalue": "input k dim keepdim",
    "cosine_similarity": "input other dim",
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), "input dim unbiased keepdim"),
    **dict.fromkeys(("norm", "vector_norm"), "input p dim keepdim"),
}
"""Positional argument names of the functional and method forms; a star takes all that follow."""

_NUMBERS = (
    "dim",
    "dims",
    "axis",
    "dim0",
    "dim1",
    "axis0",
    "axis1",
    "start_dim",
    "end_dim",
    "groups",
    "num_groups",
    "normalized_shape",
    "chunks",
    "split_size",
    "upscale_factor",
    "downscale_factor",
    "num_heads",
    "window_size",
    "keepdim",
)
_ATEN = {
    "self": "input",
    "size": "shape",
    "split_sizes": "split_size",
    "p": "input_p",
    "axis": "dim",
    "keepdims": "keepdim",
}
_OF_TWO = {"max": "maximum", "min": "minimum"}
"""What an operation is if its second argument is a tensor."""


@dataclass(frozen=True)
class Call:
    """A node, its canonical operation, its module if it has one, and its arguments by name."""

    node: fx.Node
    op: str
    module: nn.Module | None
    arguments: Mapping[str, Any]
    places: Mapping[str, int | str]
    facts: Mapping[str, NodeFacts]

    @property
    def input(self) -> fx.Node:
        """The main operand."""
        return self.arguments["input"]  # type: ignore[no-any-return]

    @property
    def output_shape(self) -> Shape:
        """Shape of the node's own tensor."""
        return self.facts[self.node.name].shape

    def shape(self, node: Any) -> Shape | None:
        """Shape of another node's tensor; None if it holds none."""
        facts = self.facts.get(node.name) if isinstance(node, fx.Node) else None
        return facts.shape if facts else None

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or the module's attribute of that name."""
        if name in self.arguments:
            return self.arguments[name]
        return getattr(self.module, name, default) if self.module is not None else default

    def constant(self, name: str) -> Tensor | None:
        """The value of a weight: a parameter or buffer of the model, or what the graph computes from these alone."""
        value = self.get(name)
        if isinstance(value, fx.Node):
            value = constant_of(value, self.facts)
        return value if isinstance(value, Tensor) else None

    def weight(self, node: Any) -> nn.Parameter | None:
        """The parameter that a node reads; None if it reads none."""
        value = (
            attribute(_owner(node), str(node.target)) if isinstance(node, fx.Node) and node.op == "get_attr" else None
        )
        return value if isinstance(value, nn.Parameter) else None

    @property
    def computed(self) -> str | None:
        """The name of an argument that decides what the operation does with its axes, if its value is computed at run time."""
        named = ((name, self.arguments[name]) for name in _NUMBERS if name in self.arguments)
        return next((name for name, value in named if tensor_nodes(value)), None)

    @property
    def why_computed(self) -> str | None:
        """Why an operation with a computed argument cannot be analysed, and the code that reads the size; otherwise None."""
        name = self.computed
        if name is None:
            return None
        place = place_of(self.arguments[name])
        return f"its {name} is computed from sizes that the input can change" + (f" ({place})" if place else "")

    @property
    def why_open(self) -> str:
        """A note that an argument is computed from a variable input size, and the code that reads it; otherwise empty."""
        place = place_of((self.node.args, self.node.kwargs), tensors=self.facts)
        return f", by a size that the input can change ({place})" if place else ""

    @property
    def path(self) -> str:
        """The path of the module that this node calls."""
        if self.module is not None:
            return str(self.node.target)
        weight = self.arguments.get("weight")
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            return str(weight.target).rpartition(".")[0] or str(weight.target)
        return self.facts[self.node.name].path or self.node.name


def read_call(node: fx.Node, facts: Mapping[str, NodeFacts]) -> Call:
    """The uniform view of a node."""
    module = attribute(_owner(node), str(node.target)) if node.op == "call_module" else None
    op = op_name(node) if module is None else module_op(module)
    if module is not None and len(node.args) == 1 and not node.kwargs:
        return Call(node, op, module, {"input": node.args[0]}, {"input": 0}, facts)
    schema = getattr(node.target, "_schema", None) or getattr(getattr(node.target, "default", None), "_schema", None)
    if module is not None:
        names = ["input", *(f"input_{k}" for k in range(1, len(node.args)))]
    elif schema is not None:
        names = [_ATEN.get(argument.name, argument.name) for argument in schema.arguments]
        if op == "embedding":
            names = ["weight", "input", *names[2:]]
    else:
        names = SIGNATURES.get(op, "input").split()
    arguments: dict[str, Any] = {}
    places: dict[str, int | str] = {}
    for k, value in enumerate(node.args):
        name = names[k] if k < len(names) else f"argument_{k}"
        if name.startswith("*"):
            rest = node.args[k:]
            arguments[name[1:]] = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
            break
        arguments[name], places[name] = value, k
    for key, value in node.kwargs.items():
        name = _ATEN.get(key, key)
        arguments[name], places[name] = value, key
    for name in ("shape", "repeats", "dims"):  # operators of torch take a list, methods numbers or a tuple
        if isinstance(arguments.get(name), list):
            arguments[name] = tuple(arguments[name])
    if op == "conv" and arguments.get("transposed") is True:
        op = "conv_transpose"
    second = arguments.get("dim", arguments.get("other"))
    if op in _OF_TWO and isinstance(second, fx.Node) and second.name in facts:
        op = _OF_TWO[op]
        arguments["other"] = arguments.pop("dim", second)
    if isinstance(arguments.get("normalized_shape"), fx.Node):
        arguments["normalized_shape"] = _own_sizes(arguments["normalized_shape"], arguments.get("input"), facts)
    return Call(node, op, module, arguments, places, facts)


def _own_sizes(sizes: fx.Node, tensor: Any, facts: Mapping[str, NodeFacts]) -> Any:
    """The example's numbers for the sizes of a tensor's own last axes, as in `F.layer_norm(x, x.shape[1:])`; other sizes as they are."""
    shape, key = sizes.args if sizes.target is operator.getitem else (None, None)
    if not isinstance(shape, fx.Node) or shape.target not in ("size", getattr) or tensor.name not in facts:
        return sizes
    own = shape.args in ((tensor,), (tensor, "shape"))
    if own and isinstance(key, slice) and isinstance(key.start, int) and (key.stop, key.step) == (None, None):
        return facts[tensor.name].shape[key.start :]
    return sizes


def again(call: Call, cuts: Sequence[Cut], *, slices: Slices | None = None, **settings: Any) -> Emit:
    """The same operation once more, on the selected operands, with its weights sliced and some settings changed.

    Args:
        call: the operation.
        cuts: the selections of its operands, in the order their nodes are handed to the emitter.
        slices: the module's own tensors to slice: name -> (axis, index).
        settings: arguments of the function, or attributes of the module, that change. Those a form does not have are left out.
    """

    def emit(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
        swap = {cut.node: node for cut, node in zip(cuts, new, strict=True)}
        args = list(fx.map_arg(call.node.args, lambda n: swap.get(n, n)))
        kwargs = dict(fx.map_arg(call.node.kwargs, lambda n: swap.get(n, n)))
        if call.module is not None:
            tensors = {name: sliced(getattr(call.module, name), *place) for name, place in (slices or {}).items()}
            changed = {name: value for name, value in settings.items() if hasattr(call.module, name)}
            return out.module(str(call.node.target), with_tensors(call.module, tensors, **changed), *args, **kwargs)
        for name, value in settings.items():
            place = call.places.get(name)
            if isinstance(place, int):
                args[place] = value
            elif place is not None:
                kwargs[place] = value
        if call.node.op == "call_method":
            return out.method(str(call.node.target), *args, **kwargs)
        return out.function(call.node.target, *args, **kwargs)  # type: ignore[arg-type]

    return emit


def slice_weights(
    call: Call,
    wanted: Slices,
    *,
    parts: Sequence[Part] = (),
    filters: Filters | None = None,
    note: str = "",
    **settings: Any,
) -> Propagation:
    """A step that slices weights: a module's own ones on the spot, those of a functional form as graph constants."""
    wanted = {name: place for name, place in wanted.items() if call.get(name) is not None}
    cuts = [part.cut for part in parts]
    if call.module is not None:
        return Propagation(again(call, cuts, slices=wanted, **settings), tuple(parts), filters=filters, note=note)
    weights = tuple(Cut(call.get(name), axis, axis + 1, index) for name, (axis, index) in wanted.items())
    return Propagation(again(call, [*cuts, *weights], **settings), tuple(parts), weights, filters, note)


def source(out: Emitter, new: Sequence[fx.Node]) -> fx.Node:
    """The emitter of an operation that vanishes: its selected operand is the selection."""
    return new[0]


def axis_of(value: int, rank: int) -> int:
    """A dimension argument, counted from the front."""
    return value + rank if value < 0 else value


def untouched(call: Call, cut: Cut, *, operand: fx.Node | None = None, **settings: Any) -> Propagation:
    """Pass the selection on to the operand, at the same axes, and do the same operation on what comes."""
    below = Cut(operand or call.input, cut.start, cut.stop, cut.index)
    return Propagation(again(call, [below], **settings), (Part(below),))


def weight_filters(call: Call, rows: Index, *, rows_axis: int = 0) -> Filters:
    """The filters of a producer, rows first."""
    weight = call.constant("weight")
    if weight is not None and rows_axis:
        weight = weight.transpose(0, rows_axis)
    return Filters(call.node, call.path, weight, rows)


_DEEP = 40
"""Weights that take more operations than this to compute are not looked at."""


def constant_of(node: fx.Node, facts: Mapping[str, NodeFacts]) -> Any:
    """The value of a node that depends on parameters and buffers only (and on an input's type); None if it depends on more."""
    if node.op == "get_attr":
        return attribute(_owner(node), str(node.target))
    needed, pending = {node: None}, [node]
    types: dict[fx.Node, Any] = {}
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return None
        # only the dtype or device is used, not the values
        if current.target is getattr and current.args[1] in ("dtype", "device"):
            source = tensor_nodes(current.args[0])[0]
            types[current] = torch.device("cpu") if current.args[1] == "device" else facts[source.name].dtype
            continue
        for source in current.all_input_nodes:
            if source not in needed:
                needed[source] = None
                pending.append(source)
    if len(needed) > _DEEP:
        return None
    return run_part(node, needed, types)


def _owner(node: fx.Node) -> nn.Module:
    owner = node.graph.owning_module
    if owner is None:
        raise RuntimeError(f"node {node.name} stands in a graph without a module")
    return owner


def index_select(out: Emitter, node: fx.Node, start: int, stop: int, index: Index) -> fx.Node:
    """The selection itself, as a node."""
    flat = node if stop - start == 1 else out.function(torch.flatten, node, start, stop - 1)
    return out.function(torch.index_select, flat, start, out.tensor("kept", torch.tensor(index, dtype=torch.long)))
