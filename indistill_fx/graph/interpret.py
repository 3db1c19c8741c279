"""Run a graph node by node, and look at the values on the way."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

Look = Callable[[fx.Node, Any], Any]
"""Called with every node and its value; what it returns, unless None, takes the value's place."""
Instead = Callable[[fx.Node, Mapping[fx.Node, Any]], Any]
"""Called with every node and the values so far, before the node is computed; what it returns, unless None, is its value."""


class _Looking(fx.Interpreter):
    def __init__(self, graph_module: fx.GraphModule, look: Look, instead: Instead | None):
        super().__init__(graph_module)
        self._look, self._instead = look, instead

    def run_node(self, n: fx.Node) -> Any:
        value = self._instead(n, self.env) if self._instead is not None else None
        value = super().run_node(n) if value is None else value
        changed = self._look(n, value)
        return value if changed is None else changed


def run_looking(graph_module: fx.GraphModule, look: Look, *args: Any, instead: Instead | None = None) -> Any:
    """Run a graph and show every value to `look` as soon as it is there.

    Args:
        graph_module: the graph.
        look: see `Look`; an exception it raises ends the run.
        args: the graph's inputs, in order.
        instead: see `Instead`.

    Returns:
        The graph's output.
    """
    return _Looking(graph_module, look, instead).run(*args)


def run_part(node: fx.Node, needed: Container[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
    """The value of a node that depends on no input.

    Args:
        node: in a graph that a GraphModule owns.
        needed: the node and all that it is computed from.
        known: values of some of these.
    """
    owner = node.graph.owning_module
    assert owner is not None
    run = fx.Interpreter(owner)
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
