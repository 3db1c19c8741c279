"""Find the units of a network's channels and what ties them: one walk along the graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping

from torch import fx, nn

from indistill_fx.graph.computed_weights import why_opaque
from indistill_fx.graph.edit import own_place
from indistill_fx.graph.ops import attribute, op_name
from indistill_fx.passes.channels.attention import BY_LETTERS, PRODUCTS, letters, operands_of
from indistill_fx.passes.channels.call import Call, axis_of, read_call
from indistill_fx.passes.channels.joining import POOLS, REDUCTIONS, WITH_PLACES
from indistill_fx.passes.channels.keys import taken
from indistill_fx.passes.channels.norms import mixed_axis
from indistill_fx.passes.channels.rules import consult
from indistill_fx.passes.channels.selection import Blocked, Cut, Propagation
from indistill_fx.passes.channels.space import reduced_axes
from indistill_fx.passes.pruning.dependencies import PARTS, Axis, Coupling, Made, follow, freeze_beside_places
from indistill_fx.passes.pruning.dependency_rules import COUPLERS
from indistill_fx.passes.pruning.groups import join
from indistill_fx.passes.pruning.recurrent import WHOLE
from indistill_fx.traced import NodeFacts

_TELLS_SIZES = frozenset(
    "size shape getattr dim numel ndimension len is_floating_point is_cuda device dtype assert".split()
)

_ALONG_AXIS = WITH_PLACES | REDUCTIONS | {"unbind"}
"""Operations of several results that go along one axis and leave the others as they are."""
_EXTREMES = frozenset("max min amax amin median nanmedian mode kthvalue".split())
_RESHAPES = frozenset("view reshape unflatten".split())
_NORMS_OF_VECTORS = frozenset("normalize layer_norm rms_norm".split())
_WINDOWED = frozenset("conv conv_transpose max_pool avg_pool adaptive_avg_pool interpolate".split())
_READS_MAPS = _WINDOWED | {"batch_norm"}


def couple(graph_module: fx.GraphModule, facts: Mapping[str, NodeFacts]) -> Coupling:
    """Find the units of a graph and what ties them."""
    inputs = [facts[node.name] for node in graph_module.graph.find_nodes(op="placeholder") if node.name in facts]
    found = Coupling(
        facts, next((known.shape[known.batch_axis] for known in inputs if known.batch_axis is not None), None)
    )
    found.heads |= _split_off(graph_module, facts, _ends)
    found.pieces |= _split_off(graph_module, facts, _taken_ends)
    _find_shuffles(found, graph_module)
    for node in graph_module.graph.nodes:
        found.ops[node.name] = op_name(node)
        if node.op == "output":
            for source in node.all_input_nodes:
                _freeze_whole(found, source, "an output of the network")
        elif node.name in found.shuffles:
            _shuffle(found, node, found.shuffles[node.name])
        elif node.op not in ("placeholder", "get_attr") and node.name not in found.vanished and not _is_returned(node):
            _visit(found, node)
    for node in graph_module.graph.find_nodes(op="get_attr"):  # parameters that the walk has tied
        known = facts.get(node.name)
        tied = (axis for axis in range(len(known.shape) if known else 0) if found.is_tied(node, axis))
        found.axes.update({(node.name, axis): units for axis in tied if (units := found.of(node, axis)) is not None})
    _made_by_parameters(found, graph_module)
    return found


def _made_by_parameters(found: Coupling, graph_module: fx.GraphModule) -> None:
    """Let a parameter make the free units of its last axis if no layer does: tables of vectors that the code itself reads or adds."""
    class_of = join(found)
    known = [*(one.units for one in found.made), *(units for units, _ in found.frozen)]
    made = {k for units in known for k in class_of[units].tolist()}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = attribute(graph_module, str(node.target))
        units = found.weights.get((id(value), value.dim() - 1)) if isinstance(value, nn.Parameter) else None
        if units is not None and value.dim() > 1 and made.isdisjoint(class_of[units].tolist()):
            found.made.append(Made("", 0, str(node.target), value.detach().movedim(-1, 0).flatten(1), units))


def _is_returned(node: fx.Node) -> bool:
    """Whether the node makes a named tuple or dataclass that the network returns, alone or in another one."""
    return isinstance(node.target, type) and all(user.op == "output" or _is_returned(user) for user in node.users)


def _visit(found: Coupling, node: fx.Node) -> None:
    call = read_call(node, found.facts)
    read = _read(found, call)
    if read is None:
        return
    for source in node.all_input_nodes:
        known = found.facts.get(source.name)
        several = source.op == "call_module" or found.ops[source.name] in PARTS | POOLS | _ALONG_AXIS | {
            "PackedSequence"
        }
        followed = node.target in (operator.getitem, getattr) or (source.name, WHOLE) in read
        if known is None and several and not followed:
            _freeze_whole(found, source, _why(call))
        for axis in range(len(known.shape) if known else 0):
            if (source.name, axis) in read:
                continue
            if found.has_units(source, axis):
                alone = known is not None and known.shape[axis] == 1
                found.freeze(
                    found.of(source, axis),
                    f"`{node.name}` ({call.op}) reads the only one" if alone else _why(call, slides=axis >= 2),
                )


def _freeze_whole(found: Coupling, node: fx.Node, reason: str) -> None:
    """All units of a node's tensor must stay; for a tuple of results, the units of the node that makes it."""
    if node.name in found.facts:
        found.freeze_all(node, reason)
        return
    all_units = [units for (name, _), units in found.axes.items() if name in (node.name, str(node.target))]
    for units in all_units:
        found.freeze(units, reason)
    for source in () if all_units else node.all_input_nodes:
        _freeze_whole(found, source, reason)


def _why(call: Call, *, slides: bool = False) -> str:
    """Why an operation needs channels.

    Args:
        call: the operation.
        slides: they lie along an axis of space, along which convolutions and pooling slide their windows.
    """
    reason = why_opaque(call.module) if call.module is not None else None
    reason = reason or call.why_computed
    whole = own_place(call.node) if call.module is not None else None
    if reason is None and whole is not None:
        reason = f"stays one node, because its code cannot be traced ({whole})"
    verb = f"reads them in a way no rule covers{call.why_open}" if reason is None else f"reads them, and {reason}"
    if reason is None and slides and call.op in _WINDOWED:
        verb = "combines each with its neighbours: if one went, others would become neighbours"
    return f"`{call.path if call.module is not None else call.node.name}` ({call.op}) {verb}"


def _read(found: Coupling, call: Call) -> set[Axis] | None:
    """Carry units through a node; returns the axes of its inputs that are thereby covered, None if there is nothing to cover."""
    if call.computed == "split_size" and isinstance(axis := call.get("dim", 0), int):  # it decides that axis alone
        rank = len(call.shape(call.input) or ())
        return {(call.input.name, other) for other in range(rank) if other != axis_of(axis, rank)}
    reason = why_opaque(call.module) if call.module is not None else None
    if reason is not None:
        found.count_work(call, ())
        known = found.facts.get(call.node.name)
        if known is not None and known.parameters and known.channel_axis is not None:
            found.recomputed.append((known.channels, f"`{call.path}` ({call.op}) makes them, and {reason}"))
    if call.computed is not None or reason is not None:
        return set()
    coupler = COUPLERS.get(call.op)
    if coupler is not None:
        return coupler(found, call)
    if call.node.name in found.facts:
        return follow(found, call)
    dim = call.get("dim", 0) if call.op == "unbind" else mixed_axis(call)
    if call.op in _ALONG_AXIS and isinstance(dim, int):  # the other axes follow from the parts
        rank = len(call.shape(call.input) or ())
        return {(call.input.name, axis) for axis in range(rank) if axis != axis_of(dim, rank)}
    if call.op in POOLS:
        return {(call.input.name, axis) for axis in (0, 1)}
    if call.op in PARTS:
        if isinstance(dim := call.get("dim", 0), int):
            freeze_beside_places(found, call.input, axis_of(dim, len(call.shape(call.input) or ())), call.node)
        return None if all(isinstance(user.args[1], int) for user in call.node.users if len(user.args) > 1) else set()
    return None if call.op in _TELLS_SIZES else set()


def _find_shuffles(found: Coupling, graph_module: fx.GraphModule) -> None:
    """Find views and transposes that only permute one axis; treated as a permutation, their groups may lose different channels."""
    for node in graph_module.graph.nodes:
        known = found.facts.get(node.name)
        axis = known.channel_axis if known is not None else None
        for k in (
            range(1, len(known.shape)) if known is not None and node.op.startswith("call") and axis is None else (axis,)
        ):
            if (
                known is not None
                and k is not None
                and op_name(node) in ("view", "reshape", "flatten")
                and known.shape[k] > 1
            ):
                _find_shuffle(found, Cut(node, k, k + 1, tuple(range(known.shape[k]))))


def _find_shuffle(found: Coupling, wanted: Cut) -> None:
    node, chain, cut = wanted.node, list[fx.Node](), wanted
    while cut is wanted or cut.width > 1:
        step = consult(cut, found.facts)
        if (
            not isinstance(step, Propagation)
            or len(step.parts) != 1
            or step.parts[0].links
            or step.filters
            or len(step.parts[0].cut.index) != len(cut.index)
        ):
            return
        chain.append(cut.node)
        cut = step.parts[0].cut
        if cut.width == 1 and cut.node is node.args[0]:
            return
    if found.facts[cut.node.name].shape != found.facts[node.name].shape or cut.start != wanted.start:
        return
    found.shuffles[node.name] = cut
    serving = {node}
    for inner in chain[1:]:
        if all(user in serving or op_name(user) in _TELLS_SIZES for user in inner.users):
            serving.add(inner)
            found.vanished.add(inner.name)


def _shuffle(found: Coupling, node: fx.Node, order: Cut) -> None:
    source = order.node
    for axis in range(len(found.facts[source.name].shape)):
        units = found.of(source, axis)
        if axis == order.start and units is not None:
            freeze_beside_places(found, source, axis, node)
            found.axes[node.name, axis] = units[list(order.index)]
        else:
            found.freeze(units, f"`{node.name}` shuffles another axis")


def _split_off(
    graph_module: fx.GraphModule, facts: Mapping[str, NodeFacts], ends: Callable[[Call], list[tuple[fx.Node, int]]]
) -> set[Axis]:
    """Axes made by a reshape that takes one axis apart, of those from which certain axes come."""
    found: set[Axis] = set()
    seen: set[tuple[fx.Node, int]] = set()
    if not any(_takes_apart(node, facts) for node in graph_module.graph.nodes):
        return found
    for node in graph_module.graph.nodes:
        if node.op.startswith("call"):
            for source, axis in ends(read_call(node, facts)):
                found |= _split_axes(source, axis, facts, seen)
    return found


def _taken_ends(call: Call) -> list[tuple[fx.Node, int]]:
    """The axes of which the largest or smallest entry is taken, or entries by number: pieces of a channel."""
    shape = call.shape(call.arguments.get("input"))
    if shape is None:
        return []
    axes: list[int] = []
    if call.op in _EXTREMES:
        axes = reduced_axes(call)
    elif call.op == "unbind":
        axes = [axis_of(int(call.get("dim", 0)), len(shape))]
    elif call.op in ("getitem", "select") and (parsed := taken(call)) is not None:
        entries = [entry for entry in parsed[0] if entry is not None]
        axes = [axis for axis, entry in enumerate(entries) if isinstance(entry, int)]
    return [(call.input, axis) for axis in axes]


def _takes_apart(node: fx.Node, facts: Mapping[str, NodeFacts]) -> bool:
    """Whether a node may split one axis into several."""
    known = facts.get(node.name)
    return known is not None and len(known.shape) > 2 and node.op.startswith("call") and op_name(node) in _RESHAPES


def _ends(call: Call) -> list[tuple[fx.Node, int]]:
    """Axes that hold no channels: those a product sums over, the rows of its left operand and the last of its right one.

    They are the width of a head. Of a map, the axes of space. Of a tensor seen as complex numbers, as rotary positions do: the pairs.
    """
    if call.node.name not in call.facts:
        return []
    if call.op in _READS_MAPS:
        return [(call.input, axis) for axis in range(2, len(call.shape(call.input) or ()))]
    if call.op == "view_as_complex":
        return _pairs(call)
    if call.op == "scaled_dot_product_attention":
        return [
            (n, len(call.shape(n) or ()) - 1)
            for n in (call.get("query"), call.get("key"), call.get("value"))
            if call.shape(n)
        ]
    if call.op in PRODUCTS:
        left, right = operands_of(call)
        ranks = [len(call.shape(n) or ()) for n in (left, right)]
        if min(ranks) < 3 or _turned(left) is _turned(right):  # products of all pairs of vectors
            return []
        return [(left, ranks[0] - 1), (left, ranks[0] - 2), (right, ranks[1] - 2), (right, ranks[1] - 1)]
    if call.op in BY_LETTERS and (parsed := letters(call)) is not None:
        names, output, nodes = parsed
        summed = [
            (n, k)
            for name, n in zip(names, nodes, strict=True)
            for k, letter in enumerate(name)
            if letter not in output
        ]
        return [*summed, (nodes[-1], len(names[-1]) - 1)]
    return []


def _turned(node: fx.Node) -> fx.Node:
    """The tensor of which a node is a transposition, else the node itself."""
    while op_name(node) in ("transpose", "permute", "mt", "contiguous") and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _pairs(call: Call) -> list[tuple[fx.Node, int]]:
    """Real and imaginary parts, the axis of the numbers, and the axis that was both before a reshape."""
    rank = len(call.shape(call.input) or ())
    axes = [(call.input, axis) for axis in range(max(1, rank - 2), rank)]
    if op_name(call.input) in _RESHAPES:
        source = read_call(call.input, call.facts).input
        axes.append((source, len(call.shape(source) or ()) - 1))
    return axes


def _split_axes(node: fx.Node, axis: int, facts: Mapping[str, NodeFacts], seen: set[tuple[fx.Node, int]]) -> set[Axis]:
    """Follow an axis upstream to the reshapes that split it from a longer one; stops at axes in `seen`."""
    found: set[Axis] = set()
    pending = [(node, axis)]
    while pending:
        at, k = current = pending.pop()
        if current in seen or at.name not in facts:
            continue
        seen.add(current)
        size = facts[at.name].shape[k]
        step = consult(Cut(at, k, k + 1, tuple(range(size))), facts)
        if (
            isinstance(step, Blocked) and op_name(at) in _NORMS_OF_VECTORS
        ):  # queries and keys are normalised along a head
            pending.append((read_call(at, facts).input, k))
        if not isinstance(step, Propagation) or step.filters is not None:
            continue
        for part in step.parts:
            if len(part.cut.index) > size and len(step.parts) == 1:
                found.add((at.name, k))
            else:
                pending += [(part.cut.node, axis) for axis in range(part.cut.start, part.cut.stop)]
    return found
