"""What every layer of a network costs: its parameters and multiply-accumulates."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx, nn

from indistill_fx.graph.edit import layer_of
from indistill_fx.graph.ops import op_name
from indistill_fx.traced import TracedModel


@dataclass(slots=True)
class LayerCost:
    """A layer, and what it costs.

    Attributes:
        name: path of the module; of an operation in a forward, path of the module whose forward it is in.
        op: what it computes.
        shape: of its output for one sample.
        parameters: that no layer before it has.
        macs: multiply-accumulates of one sample, in all of its calls.
    """

    name: str
    op: str
    shape: tuple[int, ...] = ()
    parameters: int = 0
    macs: int = 0


def layer_costs(traced: TracedModel) -> list[LayerCost]:
    """The layers that have parameters or multiply, in the order of computation. Together they have all that the graph has.

    Args:
        traced: the model.
    """
    found: dict[str, LayerCost] = {}
    seen: set[int] = set()
    for node in traced.graph_module.graph.nodes:
        new = {id(tensor): tensor.numel() for tensor in _parameters(traced, node) if id(tensor) not in seen}
        seen |= new.keys()
        facts = traced.facts.get(node.name)
        macs = facts.macs if facts is not None else 0
        if new or macs:
            owner = _owner(node)
            name = _name(traced, owner)
            op = "parameter" if owner.op == "get_attr" else op_name(owner)
            layer = found.setdefault(name, LayerCost(name, op))
            layer.parameters += sum(new.values())
            layer.macs += macs
            if facts is not None:
                layer.shape = tuple(n for axis, n in enumerate(facts.shape) if axis != facts.batch_axis)
    return list(found.values())


def _owner(node: fx.Node) -> fx.Node:
    """The layer whose output a node takes a part of; else the node itself."""
    source = node.args[0] if node.args else None
    taken = op_name(node) == "getitem" and isinstance(source, fx.Node) and source.op == "call_module"
    return source if taken and isinstance(source, fx.Node) else node


def _name(traced: TracedModel, node: fx.Node) -> str:
    if node.op == "call_module":
        return layer_of(node)
    facts = traced.facts.get(node.name)
    return str(node.target) if node.op == "get_attr" or facts is None else facts.path or op_name(node)


def _parameters(traced: TracedModel, node: fx.Node) -> list[Tensor]:
    if node.op == "call_module":
        return list(traced.graph_module.get_submodule(str(node.target)).parameters())
    value = traced.graph_module.get_parameter(str(node.target)) if _is_parameter(traced, node) else None
    return [] if value is None else [value]


def _is_parameter(traced: TracedModel, node: fx.Node) -> bool:
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(traced.graph_module.get_submodule(owner), name, None), nn.Parameter)
