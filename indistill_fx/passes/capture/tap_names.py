"""Name every tensor of a graph as people would: by the module whose output it is, else by its place in a module.

Names, in order of preference: the outermost module that returns the tensor (`layer3`), inner ones (`layer3.1`), the second call of
a module (`layer3.1.relu@2`), a part of what a module returns (`lstm[0]`), the enclosing module and the operation (`layer3.1:add`,
the next one `layer3.1:add_1`).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping

from torch import fx

from indistill_fx.graph.ops import op_name
from indistill_fx.passes.capture.captured import Captured
from indistill_fx.traced import NodeFacts


def name_taps(captured: Captured, facts: Mapping[str, NodeFacts]) -> dict[str, tuple[str, ...]]:
    """Names for every node that has facts, the preferred one first, in graph order.

    Args:
        captured: the graph and the record of module outputs, innermost first.
        facts: nodes whose value is one tensor; others cannot be tapped.
    """
    nodes = {node.name: node for node in captured.graph_module.graph.nodes}
    modules: dict[str, list[str]] = {}
    for name, node, _ in captured.outputs:
        if name and not name.startswith("@"):
            for place, part in _tensors_of(nodes[node], facts) if node in nodes else ():
                modules.setdefault(part, []).insert(0, f"{name}{place}")
    seen: Counter[str] = Counter()
    named: dict[str, tuple[str, ...]] = {}
    for node in captured.graph_module.graph.nodes:
        if node.name in facts and node.op not in ("get_attr", "output"):
            named[node.name] = (*modules.get(node.name, ()), _local_name(node, facts[node.name].path, seen))
    return named


def _tensors_of(node: fx.Node, facts: Mapping[str, NodeFacts], place: str = "") -> Iterator[tuple[str, str]]:
    """A node's tensors and their places in its value: `[0]`, `[1][0]` of an LSTM; the node itself where it is one tensor."""
    if node.name in facts:
        yield place, node.name
        return
    for user in node.users:
        if user.target is operator.getitem and user.args[0] is node:
            yield from _tensors_of(user, facts, f"{place}[{user.args[1]}]")


def _local_name(node: fx.Node, module: str, seen: Counter[str]) -> str:
    if node.op == "placeholder":
        return f":{node.target}"
    base = f"{module}:{op_name(node)}"
    seen[base] += 1
    return base if seen[base] == 1 else f"{base}_{seen[base] - 1}"
