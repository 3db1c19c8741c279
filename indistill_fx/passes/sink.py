"""Take a ReLU behind the max-pooling that follows it, where it mostly has a quarter of the entries.

max(relu(a), relu(b)) = relu(max(a, b)), exactly. The gradient is the same too: where a window's maximum is above 0 it is at the same
place, the first of equal ones; elsewhere both orders let nothing through.
"""

from __future__ import annotations

from torch import fx

from indistill_fx.ops import op_name
from indistill_fx.passes.lower import pooling_of


def sink(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Rewrite, in place, a graph that nobody else holds; says which ReLUs were moved. A value that others read stays where it is."""
    done = []
    for pool in list(graph_module.graph.nodes):
        relu = pool.args[0] if pooling_of(pool, graph_module) is not None else None
        if not isinstance(relu, fx.Node) or op_name(relu) != "relu" or len(relu.users) != 1 or len(relu.args) != 1:
            continue
        pool.update_arg(0, relu.args[0])
        pool.replace_all_uses_with(relu)
        pool.append(relu)  # moves it
        relu.update_arg(0, pool)
        done.append(relu.name)
    if done:
        graph_module.graph.lint()
        graph_module.recompile()
    return tuple(done)
