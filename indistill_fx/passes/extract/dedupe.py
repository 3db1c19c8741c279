"""Do not compute twice: where both a tensor and a sliced copy of it are needed, select from the one instead of computing the other.

`narrow` doubles the way up to a tap. Once the outputs are fixed and dead code is gone, some originals turn out to be needed after all
(a dense block's features, a residual that a later tap reads whole); their copies are then cheaper as a selection.
"""

from __future__ import annotations

import torch
from torch import fx

from indistill_fx.graph.edit import SliceOf, add_tensor, copy_graph, sweep
from indistill_fx.passes.contract import PassResult, Rewrite


def dedupe(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Replace every sliced copy whose original is also computed by a selection of the original.

    Args:
        graph_module: a graph after `narrow`, with the outputs it is to have.

    Keeps: the value of every output.
    """
    if not any(SliceOf.at(node) for node in graph_module.graph.nodes):
        return PassResult(graph_module, Rewrite())
    new, nodes = copy_graph(graph_module)
    sweep(new)
    done = []
    remaining = {node.name: node for node in new.graph.nodes}
    for node in reversed(list(nodes.values())):
        part = SliceOf.at(node)
        if part is None or remaining.get(node.name) is not node or part.original not in remaining:
            continue
        with new.graph.inserting_before(node):
            index = new.graph.get_attr(add_tensor(new, "kept", torch.tensor(part.kept, dtype=torch.long)))
            chosen = new.graph.call_function(torch.index_select, (remaining[part.original], part.axis, index))
        chosen.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack", {}))
        node.replace_all_uses_with(chosen)
        done.append(f"{node.name}: selected from {part.original}")
    return PassResult(sweep(new), Rewrite(done=tuple(done)))
