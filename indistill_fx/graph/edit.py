"""Small tools on fx graphs that several passes need: copies, dead code, batches of example inputs."""

from __future__ import annotations

import copy
import linecache
import operator
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._pytree import tree_leaves, tree_map

from indistill_fx.graph.ops import attribute, is_inplace

_MOST_SOURCES = 500
# Keys of fx nodes' meta that only the functions in this file use.
_SLICE, _LAYER, _PLACE = (
    "indistill_fx slice",
    "indistill_fx layer",
    "indistill_fx place",
)


def forget_sources(most: int = _MOST_SOURCES) -> None:
    """Let go of the source texts of graphs that no longer exist, once there are more than so many.

    For its tracebacks fx keeps the text of every version of every graph for as long as the process lives, some 25 KiB a run.
    """
    texts = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", {})
    if len(texts) <= most:
        return
    codes = [getattr(kind.forward, "__code__", None) for kind in _subclasses(fx.GraphModule)]
    needed = {code.co_filename for code in codes if code is not None}
    for key in [key for key in texts if key not in needed]:
        del texts[key]
        linecache.cache.pop(key, None)


@dataclass(frozen=True, slots=True)
class SliceOf:
    """That a node computes some entries of what another one computes whole.

    Attributes:
        original: name of that node.
        axis: along which entries are kept.
        kept: which.
    """

    original: str
    axis: int
    kept: tuple[int, ...]

    def mark(self, node: fx.Node) -> None:
        """Store this on a node; copies of the node keep it."""
        node.meta[_SLICE] = self

    @staticmethod
    def at(node: fx.Node) -> SliceOf | None:
        """What `mark` stored on a node, or None."""
        found: SliceOf | None = node.meta.get(_SLICE)
        return found


def stand_in(node: fx.Node, target: str) -> None:
    """Make a node call another module, which stands for the layer it called before (see `layer_of`)."""
    node.meta.setdefault(_LAYER, str(node.target))
    node.target = target


def mark_place(node: fx.Node, place: str) -> None:
    """Note where in the model's code a node was made, such as `models.py:31: x.shape[2]`; copies of it say so too."""
    node.meta[_PLACE] = place


def own_place(node: fx.Node) -> str | None:
    """What `mark_place` noted on a node."""
    return node.meta.get(_PLACE)


def place_of(value: object, *, tensors: Container[str] = ()) -> str | None:
    """Where the first of the nodes that some arguments are computed from was made, if that was noted.

    Args:
        value: the arguments.
        tensors: names of nodes that are not looked at, nor what they are computed from.
    """
    todo, seen = tensor_nodes(value), set[fx.Node]()
    while todo:
        node = todo.pop(0)
        if node.name in tensors:
            continue
        if (place := own_place(node)) is not None:
            return place
        seen.add(node)
        todo += [source for source in node.all_input_nodes if source not in seen]
    return None


def layer_of(node: fx.Node) -> str:
    """Path of the model's layer that a `call_module` node stands for."""
    return str(node.meta.get(_LAYER, node.target))


def _subclasses(parent: type[fx.GraphModule]) -> Iterator[type[fx.GraphModule]]:
    """All subclasses that exist now. Every GraphModule has its own class, which holds its compiled forward and is deleted with it."""
    for child in parent.__subclasses__():
        yield child
        yield from _subclasses(child)


def tensor_nodes(value: object) -> list[fx.Node]:
    """The nodes in a nested structure of arguments, in order."""
    if isinstance(value, (fx.Node, int, float, str, type(None))):
        return [value] if isinstance(value, fx.Node) else []
    return [leaf for leaf in tree_leaves(value, is_leaf=lambda v: isinstance(v, fx.Node)) if isinstance(leaf, fx.Node)]


def input_nodes(graph: fx.Graph, known: Container[str]) -> list[fx.Node]:
    """The nodes that hold the tensors a graph is given: its placeholders, or their parts where a list or dict of tensors is given.

    Args:
        graph: the graph.
        known: names of the nodes that hold a tensor.
    """
    parts: dict[fx.Node, None] = {}
    for node in graph.nodes:
        first = node.args[0] if node.target is operator.getitem else None
        if node.op == "placeholder" or (first in parts and first.name not in known):
            parts[node] = None
    return [node for node in parts if node.name in known]


def output_node(graph: fx.Graph) -> fx.Node:
    """The graph's output node."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    return last


def depends_on_input(node: fx.Node) -> bool:
    """Whether a node computes something from an input of the graph; an input itself does not."""
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source.op == "placeholder":
                return True
            if source not in seen:
                seen.add(source)
                todo.append(source)
    return False


def set_graph(graph_module: fx.GraphModule, graph: fx.Graph) -> None:
    """Give a GraphModule a graph that is still to be changed: `recompile()` it then. Its setter compiles it at once."""
    graph_module._graph = graph
    graph.owning_module = graph_module


def copy_end(graph: fx.Graph, result: Any, old: fx.Node) -> None:
    """End a copied graph under the name of the old end: a free one may be that of a layer called `output`, under which facts are kept."""
    end = graph.output(result)
    end.meta = dict(old.meta)
    if end.name != old.name:
        end._rename(old.name)


def copy_graph(graph_module: fx.GraphModule) -> tuple[fx.GraphModule, dict[str, fx.Node]]:
    """A GraphModule with a graph of its own and the same leaf modules, parameters and buffers; and its nodes by name."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(graph_module.graph, memo)
    copy_end(graph, result, output_node(graph_module.graph))
    new = fx.GraphModule(graph_module, graph, class_name=type(graph_module).__name__)
    return new, {old.name: node for old, node in memo.items()}


def sweep(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Remove, in place, the nodes that no output needs and the modules, parameters and buffers that no node names; recompile.

    Only for a graph the caller has just made. Placeholders stay: the signature is part of the contract.
    """
    graph_module.graph.eliminate_dead_code(
        is_impure_node=lambda n: n.op in ("placeholder", "output") or writes_alive(n)
    )
    graph_module.delete_all_unused_submodules()
    _delete_unused_tensors(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module


def ending_at(graph_module: fx.GraphModule, outputs: Any) -> fx.GraphModule:
    """A copy of a graph that returns these of its nodes, in any structure, and holds nothing that they do not need."""
    new, nodes = copy_graph(graph_module)
    output_node(new.graph).args = (fx.map_arg(outputs, lambda node: nodes[node.name]),)
    return sweep(new)


def writes_alive(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads its result: it writes into what is read elsewhere, or outlasts the call."""
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None and getattr(attribute(owner, str(node.target)), "writes", False):
        return True
    while is_inplace(node) and node.all_input_nodes:  # in `x.mul_(2).add_(1)` both write into x
        node = node.all_input_nodes[0]
        if len(node.users) > 1 or node.op in ("get_attr", "placeholder"):
            return True
    return False


def _delete_unused_tensors(graph_module: fx.GraphModule) -> None:
    used = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    called = tuple(f"{node.target}." for node in graph_module.graph.nodes if node.op == "call_module")
    named = [name for name, _ in (*graph_module.named_parameters(), *graph_module.named_buffers())]
    for name in named:
        if name not in used and not name.startswith(called):
            path, _, attr = name.rpartition(".")
            delattr(own_module(graph_module, path), attr)


def own_module(graph_module: fx.GraphModule, path: str) -> nn.Module:
    """The module at a path, as one that others do not hold: a layer of which only a weight is read is the user's own."""
    module: nn.Module = graph_module
    for name in path.split(".") if path else ():
        child = attribute(module, name)
        if type(child) is not nn.Module:
            child = module._modules[name] = with_tensors(child, {})
        module = child
    return module


def add_module(graph_module: fx.GraphModule, wanted: str, module: nn.Module) -> str:
    """Register `module` under the first free name that begins with `wanted`; returns the name."""
    base = name = wanted.replace(".", "_")
    count = 0
    while hasattr(graph_module, name):
        count += 1
        name = f"{base}_{count}"
    graph_module.add_module(name, module)
    return name


MADE = "made"
"""Key in the `meta` of a node that reads a tensor which is none of the user's."""


def add_tensor(graph_module: fx.GraphModule, wanted: str, tensor: Tensor) -> str:
    """Register a parameter or buffer under the first free name that begins with `wanted`; returns the name.

    A buffer goes to the device of the graph's own tensors.
    """
    base = name = wanted.replace(".", "_")
    count = 0
    while hasattr(graph_module, name):
        count += 1
        name = f"{base}_{count}"
    if isinstance(tensor, nn.Parameter):
        graph_module.register_parameter(name, tensor)
    else:
        own = chain(graph_module.parameters(), graph_module.buffers())
        graph_module.register_buffer(name, tensor.to(next(own, tensor).device))
    return name


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor | None], **attributes: Any) -> nn.Module:
    """A shallow copy of a leaf module with some of its own parameters, buffers and attributes replaced; the original stays as it is."""
    new = _shallow_copy(module)
    new.__dict__["_parameters"] = dict(module._parameters)
    new.__dict__["_buffers"] = dict(module._buffers)
    new.__dict__["_modules"] = dict(module._modules)
    for name, tensor in tensors.items():
        if name in new._parameters and tensor is not None:
            new._parameters[name] = nn.Parameter(
                tensor, requires_grad=tensor.requires_grad and tensor.is_floating_point()
            )
        elif name in new._parameters:
            new._parameters[name] = None
        else:
            new._buffers[name] = tensor
    for name, value in attributes.items():
        setattr(new, name, value)
    return new


def _shallow_copy(module: nn.Module) -> nn.Module:
    plain_torch = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.RNNBase)
    if not plain_torch and not is_parametrized(module):
        return copy.copy(module)
    # Like `copy`, but faster, and it also works where torch refuses: for modules with weight or spectral norm.
    new: nn.Module = type(module).__new__(type(module))
    new.__dict__.update(module.__dict__)
    return new


def batch_of(value: Any, size: int, *, example_size: int) -> Any:
    """The example inputs with another batch size; rows beyond the example's repeat it with a little noise.

    Tensors whose first axis is not the example's batch stay as they are. If there are lengths, a smaller batch begins with the longest
    sample, because the other inputs are padded to its length. Whole numbers in order, such as the offsets of `nn.EmbeddingBag` or sorted
    lengths, stay in order.
    """
    first = (longest_row(value, example_size) or 0) if size < example_size else 0

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0 or leaf.shape[0] != example_size:
            return leaf
        rows = (first + torch.arange(size)) % example_size
        if _in_order(leaf):
            rows = rows.sort().values
        new = leaf[rows]
        if leaf.is_floating_point() and size > example_size:
            fresh = new[example_size:]
            noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
            new = torch.cat([new[:example_size], fresh + (0.1 * noise).to(fresh)])
        return new

    return tree_map(resize, value)


def one_sample(value: Any) -> Any:
    """The example inputs with a batch of one: see `batch_of`."""
    return batch_of(value, 1, example_size=batch_size(value))


def longest_row(value: Any, example_size: int) -> int | None:
    """The row of the largest of a batch's first positive whole numbers, one for each sample: lengths, perhaps. None if there are none."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.shape == (example_size,)]
    whole = (leaf for leaf in leaves if leaf.dtype in (torch.int32, torch.int64))
    lengths = next((leaf for leaf in whole if leaf.numel() and leaf.min() > 0), None)
    return None if lengths is None else int(lengths.argmax())


def _in_order(leaf: Tensor) -> bool:
    """Whether these are whole numbers, one a sample, that rise or fall."""
    if leaf.dim() != 1 or leaf.is_floating_point() or leaf.is_complex() or leaf.dtype is torch.bool:
        return False
    steps = leaf.diff()
    return bool((steps >= 0).all() or (steps <= 0).all())


def batch_size(value: Any) -> int:
    """The batch size of example inputs: the first axis of the first tensor that has one."""
    return next((leaf.shape[0] for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.dim()), 1)
