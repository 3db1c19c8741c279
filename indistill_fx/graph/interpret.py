"""Run a graph node by node, and look at the values on the way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from indistill_fx.graph.edit import output_node
from indistill_fx.graph.ops import attribute

Look = Callable[[fx.Node, Any], Any]
"""Called with every node and its value; what it returns, unless None, takes the value's place."""
Instead = Callable[[fx.Node, Mapping[fx.Node, Any]], Any]
"""Called with every node and the values so far, before the node is computed; what it returns, unless None, is its value."""


class Runner:
    """Runs a graph node by node, as `fx.Interpreter` does, which spends more on each node than a small layer takes.

    Attributes:
        module: the graph's module.
        env: the values so far that are still needed, by node.
    """

    def __init__(self, graph_module: fx.GraphModule):
        self.module = graph_module
        self.env: dict[fx.Node, Any] = {}
        self._inputs: Iterator[Any] = iter(())

    def run(self, *args: Any) -> Any:
        """The graph's output on these inputs, in order."""
        graph = self.module.graph
        self._inputs = iter(graph.process_inputs(*args))
        last_uses = _last_uses(graph)
        for node in graph.nodes:
            self.env[node] = self.run_node(node)
            for read in last_uses.get(node, ()):
                del self.env[read]
        return graph.process_outputs(self.env.pop(output_node(graph)))

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The values of what a node reads."""
        return map_arg(node.args, self.env.__getitem__), map_arg(node.kwargs, self.env.__getitem__)

    def run_node(self, node: fx.Node) -> Any:
        """The value of one node."""
        args, kwargs = self.arguments(node)
        if node.op == "call_module":
            return attribute(self.module, str(node.target))(*args, **kwargs)
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return attribute(self.module, str(node.target))
        return next(self._inputs, *args) if node.op == "placeholder" else args[0]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes whose last reader it is."""
    found: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                found.setdefault(node, []).append(read)
    return found


class _Looking(Runner):
    def __init__(self, graph_module: fx.GraphModule, on_value: Look, override: Instead | None):
        super().__init__(graph_module)
        self._look, self._instead = on_value, override

    def run_node(self, node: fx.Node) -> Any:
        value = self._instead(node, self.env) if self._instead is not None else None
        value = super().run_node(node) if value is None else value
        changed = self._look(node, value)
        return value if changed is None else changed


def run_looking(graph_module: fx.GraphModule, on_value: Look, *args: Any, override: Instead | None = None) -> Any:
    """Run a graph and call `on_value` with every value as soon as it is computed.

    Args:
        graph_module: the graph.
        on_value: see `Look`; an exception it raises ends the run.
        args: the graph's inputs, in order.
        override: see `Instead`.

    Returns:
        The graph's output.
    """
    return _Looking(graph_module, on_value, override).run(*args)


def run_part(node: fx.Node, needed: Container[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
    """The value of a node that depends on no input.

    Args:
        node: in a graph that a GraphModule owns.
        needed: the node and all that it is computed from.
        known: values of some of these.
    """
    owner = node.graph.owning_module
    assert owner is not None
    run = Runner(owner)
    with torch.no_grad():
        for other in node.graph.nodes:
            if other in needed:
                run.env[other] = known[other] if other in known else run.run_node(other)
    return run.env[node]


def run_keeping(graph_module: fx.GraphModule, names: Iterable[str], *args: Any) -> tuple[Any, dict[str, Tensor]]:
    """Run a graph and keep the tensors of some nodes.

    Args:
        graph_module: the graph.
        names: of the nodes.
        args: the graph's inputs, in order.

    Returns:
        The graph's output, and the tensors by node name.
    """
    wanted, found = frozenset(names), dict[str, Tensor]()

    def keep(node: fx.Node, value: Any) -> None:
        if node.name in wanted and isinstance(value, Tensor):
            found[node.name] = value

    return run_looking(graph_module, keep, *args), found
