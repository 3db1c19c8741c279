"""Write the smaller network: slice every weight, and rewrite the arguments that name sizes.

The result owns all its parameters and buffers, and its modules stand under the names they had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from indistill_fx.graph.attention import HeadAttention
from indistill_fx.graph.ops import attribute, own_parameters
from indistill_fx.passes.channels.attention import free_heads, linear
from indistill_fx.passes.channels.call import Call, read_call
from indistill_fx.passes.channels.selection import Cut, sliced
from indistill_fx.passes.channels.sizes import is_size
from indistill_fx.passes.pruning.dependencies import Coupling, Units
from indistill_fx.passes.pruning.follow_sizes import FIXES
from indistill_fx.passes.pruning.recurrent import NAMES as RECURRENT
from indistill_fx.passes.pruning.recurrent import resize_recurrent
from indistill_fx.passes.pruning.rewriting import Rewriting, reordered, take_chosen, take_place
from indistill_fx.traced import NodeFacts


def rewrite(old: fx.GraphModule, found: Coupling, stays: Callable[[Units], NDArray[np.bool_]]) -> Rewriting:
    """The smaller network, and what stays where."""
    work = Rewriting(old, found, stays)
    for node in old.graph.nodes:
        if node.name in found.shuffles:
            order = found.shuffles[node.name]
            if _loses(work, node) or _loses(work, order.node):  # otherwise it stays as it is, for any size
                _write_shuffle(work, node, order)
            continue
        if not node.op.startswith("call") or node.name in found.vanished:
            continue
        call = read_call(node, work.facts)
        if call.module is not None:
            _resize_module(work, call)
        fix = FIXES.get(call.op)
        if fix is not None:
            fix(work, call, work.nodes[node.name])
    take_chosen(work)
    for name in reversed(list(work.nodes)):
        if name in found.vanished and not work.nodes[name].users:
            work.new.graph.erase_node(work.nodes.pop(name))
    for node in reversed(list(work.new.graph.nodes)):
        if not node.users and node.name not in work.facts and is_size(node):
            work.nodes.pop(node.name, None)
            work.new.graph.erase_node(node)
    work.new.graph.lint()
    work.new.recompile()
    return work


def _loses(work: Rewriting, node: fx.Node) -> bool:
    """Whether entries of any axis of a tensor go."""
    return any(work.kept(node, axis) is not None for axis in range(len(work.facts[node.name].shape)))


def _write_shuffle(work: Rewriting, node: fx.Node, order: Cut) -> None:
    """Write a channel permutation for the remaining channels."""
    take_place(work, work.nodes[node.name], reordered(work, order, node))


_SIZES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "linear": lambda m: {"in_features": m.weight.shape[1], "out_features": m.weight.shape[0]},
    **dict.fromkeys(("embedding", "embedding_bag"), lambda m: {"embedding_dim": m.weight.shape[1]}),
    "bilinear": lambda m: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)),
    "prelu": lambda m: {"num_parameters": m.weight.numel()},
    "layer_norm": lambda m: {"normalized_shape": tuple(m.weight.shape)} if m.weight is not None else {},
    "rms_norm": lambda m: {"normalized_shape": tuple(m.weight.shape)} if m.weight is not None else {},
}
"""Attributes of a module that give the sizes of its weights."""


def _resize_module(work: Rewriting, call: Call) -> None:
    """Update attributes, such as `out_channels`, to the sliced weights."""
    module: Any = attribute(work.new, str(call.node.target))
    if call.op in ("multihead_attention", "head_attention"):
        _replace_attention(work, call)
        return
    channels = (
        work.size(call.node, 1) if call.node.name in work.facts and len(work.facts[call.node.name].shape) > 1 else 0
    )
    if call.op in ("conv", "conv_transpose"):
        before = (call.shape(call.input) or (0, 0))[1]
        module.in_channels, module.out_channels = work.size(call.input, 1), channels
        module.groups = module.in_channels if call.get("groups") == before and before > 1 else module.groups
    elif call.op in ("batch_norm", "instance_norm"):
        module.num_features = channels
    elif call.op == "group_norm":
        module.num_channels = channels
        module.num_groups = work.groups(call)
    elif call.op in ("layer_norm", "rms_norm") and module.weight is None:
        axes = len(module.normalized_shape)
        rank = len(work.facts[call.node.name].shape)
        module.normalized_shape = tuple(work.size(call.node, axis) for axis in range(rank - axes, rank))
    elif call.op in RECURRENT:
        resize_recurrent(module)
    elif call.op in _SIZES:
        for name, value in _SIZES[call.op](module).items():
            setattr(module, name, value)


def _replace_attention(work: Rewriting, call: Call) -> None:
    """Replace attention by one with independent widths, on copies of the weights."""
    old, path = call.module, call.path
    free = free_heads(old) if isinstance(old, (nn.MultiheadAttention, HeadAttention)) else None
    names = ("query", "key", "value")
    keep = {name: work.keep.get((path, name)) for name in ("heads", "out", *(f"{n} columns" for n in names))}
    if free is None or all(kept is None for kept in keep.values()) or path in work.done:
        return
    work.done.add(path)
    count = free.heads if keep["heads"] is None else len(keep["heads"])
    width = free.head_dim
    rows = None if keep["heads"] is None else (keep["heads"][:, None] * width + np.arange(width)).reshape(-1)
    query, key, value = (_cut_linear(getattr(free, name), rows, keep[f"{name} columns"]) for name in names)
    out = _cut_linear(free.out, keep["out"], rows)
    new = HeadAttention(query, key, value, out, heads=count, dropout=free.dropout, batch_first=free.batch_first)
    work.new.set_submodule(path, new.train(free.training))


def _cut_linear(layer: nn.Linear, rows: NDArray[np.int64] | None, columns: NDArray[np.int64] | None) -> nn.Linear:
    weight, bias = layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone()
    for axis, kept in ((0, rows), (1, columns)):
        weight = weight if kept is None else sliced(weight, axis, kept.tolist())
    if bias is not None and rows is not None:
        bias = sliced(bias, 0, rows.tolist())
    weight.requires_grad_(layer.weight.requires_grad)
    return linear(weight, None if bias is None else bias.requires_grad_(layer.bias.requires_grad))


def new_facts(work: Rewriting, macs: Mapping[str, int]) -> dict[str, NodeFacts]:
    """Facts of the smaller network, from those of the whole."""
    found = {}
    for name, known in work.facts.items():
        node = work.nodes.get(name)
        if node is None:
            continue
        shape = tuple(
            n if (kept := work.keep.get((name, axis))) is None else len(kept) for axis, n in enumerate(known.shape)
        )
        if node.op == "get_attr":
            shape = tuple(attribute(work.new, str(node.target)).shape)
        found[name] = replace(
            known, shape=shape, macs=macs.get(name, known.macs), parameters=_parameters(work.new, node)
        )
    for name, (source, axis, count) in work.selections.items():
        shape = found[source].shape
        found[name] = replace(found[source], shape=(*shape[:axis], count, *shape[axis + 1 :]), macs=0, parameters=0)
    return found


def _parameters(root: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in own_parameters(attribute(root, str(node.target))))
    value = attribute(root, str(node.target)) if node.op == "get_attr" else None
    return value.numel() if isinstance(value, nn.Parameter) else 0
