"""Code that changes a tensor entry by entry and treats all channels alike, such as stochastic depth as people write it.

Rules, in order:
  1. What is computed from the tensor's values keeps every entry in its place: an elementwise operation, `where`, `masked_fill`.
  2. Masks and factors are drawn or filled in with sizes that are not constants, and changed entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.utils._pytree import tree_leaves

from indistill_fx.graph.ops import BINARY, UNARY, op_name

_TELLS = frozenset("size getattr dim".split())
_LIKE = frozenset(
    "empty_like full_like ones_like zeros_like rand_like randn_like new_empty new_full new_ones new_zeros".split()
)
_MAKERS = _LIKE | frozenset(
    "getitem empty full ones zeros rand randn randint bernoulli uniform normal exponential".split()
)
"""What makes a tensor whose entries are all drawn, or filled in, alike."""
_CHOICES = frozenset("where masked_fill lerp".split())
_MASKING = frozenset(
    "lt le gt ge eq ne less greater less_equal greater_equal floor ceil round trunc rsub logical_not logical_and logical_or bitwise_not "
    "bool type double bfloat16 max_pool avg_pool".split()
)
_SHAPING = frozenset("view reshape unsqueeze expand".split())
"""What is done to masks, apart from `UNARY` and `BINARY`: it looks at no entry's place among the channels."""


def is_elementwise(nodes: Iterable[fx.Node], tensor: fx.Node) -> bool:
    """Whether nodes, in order, change a tensor entry by entry; masks that they make may take a size from it, but no values."""
    changed = {tensor}
    for node in nodes:
        name = op_name(node)
        if node.op not in ("call_function", "call_method"):
            return False
        if name in _TELLS | _LIKE or not changed.intersection(node.all_input_nodes):
            if not _is_mask(node, name):
                return False
        elif name in UNARY | BINARY | _CHOICES:
            changed.add(node)
        else:
            return False
    return True


def _is_mask(node: fx.Node, name: str) -> bool:
    """Whether a node reads a size, makes a tensor whose size is not a constant, or works on such a tensor entry by entry."""
    if name in _TELLS or (name == "getitem" and op_name(node.args[0]) in _TELLS):  # type: ignore[arg-type]
        return True
    if name in UNARY | BINARY | _CHOICES | _MASKING:
        return True
    sizes = node.args[-1] if name == "randint" else (node.args, node.kwargs)
    return name in _MAKERS | _SHAPING and not any(isinstance(n, int) and n > 1 for n in tree_leaves(sizes))
