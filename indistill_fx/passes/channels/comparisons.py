"""Rules of operations that compare two tensors over one axis: similarities and distances. The other axes come from the operands."""

from __future__ import annotations

from torch import fx

from indistill_fx.passes.channels.call import Call, again, axis_of
from indistill_fx.passes.channels.selection import Blocked, Cut, Part, Propagation

COMPARISONS = ("cosine_similarity", "pairwise_distance", "cdist")


def _operands(call: Call) -> list[fx.Node]:
    """The two tensors; none if they are one."""
    given = [n for n in call.node.all_input_nodes if call.shape(n)]
    return given if len(given) == 2 else []


def ends_compared(call: Call) -> list[tuple[fx.Node, int]]:
    """Each operand's axis over which they are compared."""
    operands = _operands(call)
    rank = max((len(call.shape(n) or ()) for n in operands), default=0)
    dim = axis_of(int(call.get("dim", 1)), rank) if call.op == "cosine_similarity" else rank - 1
    return [(n, dim - rank + len(call.shape(n) or ())) for n in operands]


def compared(call: Call, cut: Cut) -> Propagation | Blocked:
    """An axis of the result is that of every operand that has it; of `cdist`, the last two are one operand's each."""
    operands = _operands(call)
    if not operands or cut.width > 1:
        return Blocked(f"{call.op} of a tensor with itself, or of merged axes")
    rank = max(len(call.shape(n) or ()) for n in operands)
    over, axis = dict(ends_compared(call)), cut.start
    if call.op == "cdist" and axis >= rank - 2:
        operands, axis = [operands[axis - rank + 2]], rank - 2
    elif call.op == "cosine_similarity":
        axis += axis >= max(over.values())
    cuts = []
    for n in operands:
        shape = call.shape(n) or ()
        own = axis - rank + len(shape)
        if own >= 0 and own != over[n] and shape[own] == call.output_shape[cut.start]:
            cuts.append(Cut(n, own, own + 1, cut.index))
    if not cuts:
        return Blocked(f"{call.op} has the same for every operand")
    return Propagation(again(call, cuts), tuple(Part(c) for c in cuts))
