"""Do not compute twice: where both a tensor and a sliced copy of it are needed, select from the one instead of computing the other.

`narrow` doubles the way up to a tap. Once the outputs are fixed and dead code is gone, some originals turn out to be needed after all
(a dense block's features, a residual that a later tap reads whole); their copies are then cheaper as a selection.
"""

from __future__ import annotations

import torch
from torch import fx

from indistill_fx.graph.edit import add_tensor, copy_graph, sweep


def dedupe(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every sliced copy whose original is also computed replaced by a selection of the original.

    Args:
        graph_module: a graph after `narrow`, with the outputs it is to have; it is not changed.

    Keeps: the value of every output.
    """
    new, nodes = copy_graph(graph_module)
    sweep(new)
    alive = {node.name: node for node in new.graph.nodes}
    for node in reversed(list(nodes.values())):
        original, axis, kept = node.meta.get("slice_of", ("", 0, ()))
        if alive.get(node.name) is not node or original not in alive:
            continue
        with new.graph.inserting_before(node):
            index = new.graph.get_attr(add_tensor(new, "kept", torch.tensor(kept, dtype=torch.long)))
            chosen = new.graph.call_function(torch.index_select, (alive[original], axis, index))
        chosen.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack", {}))
        node.replace_all_uses_with(chosen)
    return sweep(new)
