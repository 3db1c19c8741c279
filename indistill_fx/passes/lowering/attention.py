"""Give attention its tokens in the order (length, batch, channels) in memory.

`nn.MultiheadAttention(batch_first=True)` transposes its inputs before it projects them. Without a copy that is a view with batch and length
exchanged, and PyTorch multiplies such a tensor by a frozen weight as one small product per position (`aten::bmm`): it folds both axes
into one large product only where that needs no copy, or where the weight needs a gradient. A student's weights do; a teacher's do not.
An eager CPU runs a kernel of its own for a frozen attention, so only compiled graphs gain.
"""

from __future__ import annotations

from torch import Tensor, fx, nn

from indistill_fx.graph.edit import copy_graph
from indistill_fx.graph.ops import attribute
from indistill_fx.passes.contract import PassResult, Rewrite


def attention_sequence_first(graph_module: fx.GraphModule) -> PassResult[fx.GraphModule, Rewrite]:
    """Lay the inputs of every batch-first `nn.MultiheadAttention` out as (length, batch, channels)."""
    if not any(_is_batch_first(node, graph_module) for node in graph_module.graph.nodes):
        return PassResult(graph_module, Rewrite())
    new, _ = copy_graph(graph_module)
    done = []
    for node in list(new.graph.nodes):
        if not _is_batch_first(node, new):
            continue
        names = ("query", "key", "value")
        inputs = [*node.args[:3], *(node.kwargs[name] for name in names if name in node.kwargs)]
        # One copy of each: that query, key and value are the same object tells attention to project them at once.
        for source in dict.fromkeys(value for value in inputs if isinstance(value, fx.Node)):
            with new.graph.inserting_before(node):
                laid = new.graph.call_function(sequence_first, (source,))
            node.replace_input_with(source, laid)
        done.append(f"{node.name}: inputs as (length, batch, channels) in memory")
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(done)))


def sequence_first(x: Tensor) -> Tensor:
    """The same tensor (batch, length, channels), with the tokens of one position beside each other in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 and not x.is_nested else x


def _is_batch_first(node: fx.Node, graph_module: fx.GraphModule) -> bool:
    if node.op != "call_module":
        return False
    module = attribute(graph_module, str(node.target))
    return type(module) is nn.MultiheadAttention and bool(module.batch_first)
