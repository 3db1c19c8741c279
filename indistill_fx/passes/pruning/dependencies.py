"""Which channels must stay or go together, over the whole network: union-find over single channels.

Rules, in order:
  1. Every channel a weight makes is a unit. The channel rules, asked for all channels of every axis, say which unit stands where.
  2. Where an operation needs two units at one place (a sum, heads of a product), they become one class.
  3. An axis that an operation reads in a way no rule covers is frozen: its classes stay. So are the network's outputs.
  4. A view, a transposition and a view that only permute one axis are taken as the permutation they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from indistill_fx.graph.ops import BINARY, attribute, op_name
from indistill_fx.passes.channels.call import Call, axis_of, read_call
from indistill_fx.passes.channels.rules import consult
from indistill_fx.passes.channels.selection import Cut, Propagation
from indistill_fx.passes.channels.sizes import follows_from_sizes, leaves, size_read, sizes_given
from indistill_fx.traced import NodeFacts

Units = NDArray[np.int64]
Axis = tuple[str, int | str]
"""A node and an axis of its tensor, or the name of something inside it (`heads`)."""


@dataclass(frozen=True, slots=True)
class Made:
    """Weights that make units.

    Attributes:
        node: on whose channel axis the units stand; empty for those inside an attention layer.
        axis: that axis.
        path: where the weights live, as people name the module.
        weight: (rows, inputs, *kernel).
        units: of each row.
    """

    node: str
    axis: int
    path: str
    weight: Tensor
    units: Units


@dataclass
class Coupling:
    """Units and what ties them, as they are found along the graph.

    Attributes:
        facts: of the graph's nodes.
        batch: the example's; a batch axis of another size has other axes folded into it, such as heads.
        axes: the unit of every channel, per node and axis. An axis without an entry is fixed.
        weights: the same for axes of parameters and buffers, by the tensor's identity.
        shapes: units of the axes of modules that have a shape but no weights, by the module's identity.
        work: (node, multiply-accumulates of one sample, the unit arrays its cost is proportional to the length of).
        made: filters, for ranking.
        pairs: units that are one class.
        frozen: units that stay, and why.
        shuffles: reshapes that end a mere permutation of one axis, and the tensor, axis and order it is.
        vanished: nodes that only serve a shuffle.
        heads: axes made by taking an axis apart that products sum over: the width of a head, not the heads.
        pieces: axes made likewise of which one entry is taken, the largest or one by its number: a channel's pieces, not the channels.
        filled: units of tensors of one value, which nothing makes.
        chosen: axes of tensors of which a node takes the entries that are left: (the node, the tensor, the axis).
        ops: what each node computes, for those that were looked at.
        recomputed: how many channels layers make whose weights nobody can slice, and why.
        mixing: nodes that compute something over channels, what that is (a mean or a norm), and these channels.
    """

    facts: Mapping[str, NodeFacts]
    batch: int | None = None
    axes: dict[Axis, Units] = field(default_factory=dict)
    weights: dict[tuple[int, int], Units] = field(default_factory=dict)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    shapes: dict[tuple[int, int], Units | None] = field(default_factory=dict)
    work: list[tuple[str, int, tuple[Units, ...]]] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    pairs: list[tuple[Units, Units]] = field(default_factory=list)
    recomputed: list[tuple[int, str]] = field(default_factory=list)
    frozen: list[tuple[Units, str]] = field(default_factory=list)
    heads: set[Axis] = field(default_factory=set)
    pieces: set[Axis] = field(default_factory=set)
    filled: set[int] = field(default_factory=set)
    chosen: dict[tuple[str, str, int], Units] = field(default_factory=dict)
    shuffles: dict[str, Cut] = field(default_factory=dict)
    vanished: set[str] = field(default_factory=set)
    ops: dict[str, str] = field(default_factory=dict)
    mixing: list[tuple[str, str, Units]] = field(default_factory=list)
    count: int = 0

    def fresh(self, size: int) -> Units:
        """New units."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def tie(self, first: Units | None, second: Units | None, reason: str) -> Units | None:
        """Tie two arrays of units element by element; if one axis is fixed, freeze the other."""
        if first is None or second is None:
            self.freeze(first if second is None else second, reason)
        elif first is not second:
            self.pairs.append((first, second))
        return second if first is None else first

    def freeze(self, units: Units | None, reason: str) -> None:
        """Units that must stay."""
        if units is not None and len(units):
            self.frozen.append((units, reason))

    def note_mixing(self, call: Call, units: Units | None) -> None:
        """Note that an operation computes a statistic over channels, which changes when channels are removed."""
        results = [node.name for node in (call.node, *call.node.users) if node.name in self.facts]
        if units is not None and results:
            self.mixing.append((results[0], call.op, units))

    def of(self, value: Any, axis: int) -> Units | None:
        """Units along an axis of a node's tensor, or of a parameter."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            owner = value.graph.owning_module
            value = attribute(owner, str(value.target)) if owner is not None else None
        if isinstance(value, Tensor):
            key = id(value), axis
            if key not in self.weights:
                self.weights[key], self.tensors[id(value)] = self.fresh(value.shape[axis]), value
            return self.weights[key]
        return self.axes.get((value.name, axis)) if isinstance(value, fx.Node) else None

    def tie_weight(self, call: Call, name: str, axis: int, units: Units | None) -> None:
        """Tie an axis of a weight to these units."""
        value = call.get(name)
        if value is None:
            return
        if isinstance(value, Tensor) and (id(value), axis) not in self.weights and units is not None:
            self.weights[id(value), axis], self.tensors[id(value)] = units, value
        else:
            own = self.of(value, axis)
            if own is None and units is not None and isinstance(value, fx.Node):
                own = lent(self, Cut(value, axis, axis + 1, tuple(range(len(units)))), call.node)
            computed = isinstance(value, fx.Node) and value.op != "get_attr"
            why = "computed in a way no rule covers" if computed else "shared with a fixed layer"
            self.tie(own, units, f"the {name} of `{call.path}` is {why}")

    def freeze_all(self, node: fx.Node, reason: str) -> None:
        """All units of a node's tensor must stay."""
        known = self.facts.get(node.name)
        for axis in range(len(known.shape) if known else 0):
            if self.has_units(node, axis):
                self.freeze(self.of(node, axis), reason)

    def is_tied(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis of a parameter or buffer has units already."""
        owner = node.graph.owning_module
        value = attribute(owner, str(node.target)) if node.op == "get_attr" and owner is not None else None
        return (id(value), axis) in self.weights

    def has_units(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis has units, or is one of a parameter or buffer, whose units a later layer may tie."""
        if node.op == "get_attr" and node.name in self.facts:
            known = self.facts[node.name]
            return (known.dtype.is_floating_point and known.shape[axis] > 1) or self.is_tied(node, axis)
        return (node.name, axis) in self.axes

    def holds_samples(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis is the batch, with nothing folded into it."""
        known = self.facts[node.name]
        return axis == known.batch_axis and known.shape[axis] == self.batch

    def count_work(self, call: Call, summed: Iterable[Units | None]) -> None:
        """Note the cost of an operation: in proportion to its output's axes and to those it sums over."""
        known = self.facts.get(call.node.name)
        if known is not None and known.macs and all(name != call.node.name for name, _, _ in self.work[-8:]):
            axis_units = [self.axes.get((call.node.name, axis)) for axis in range(len(known.shape))]
            self.work.append(
                (call.node.name, known.macs, tuple(units for units in (*axis_units, *summed) if units is not None))
            )


PARTS = frozenset(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"))
"""Operations that return a tensor in several parts."""
_TAKE_ONE = frozenset(("getitem", "slice", "narrow"))
"""Operations that may take a single channel off an axis of many."""


def follow(found: Coupling, call: Call, summed: Iterable[Units | None] = ()) -> set[Axis]:
    """Carry units through an operation by its channel rule, axis by axis; returns the axes that were read."""
    node, known = call.node, found.facts[call.node.name]
    read: set[Axis] = set()
    steps: dict[int, Propagation] = {}
    for axis, size in enumerate(known.shape):
        several = size > 1 or axis == known.channel_axis or call.op in _TAKE_ONE
        if several and not found.holds_samples(node, axis):
            step = consult(Cut(node, axis, axis + 1, tuple(range(size))), found.facts)
            if isinstance(step, Propagation):
                steps[axis] = step
            elif call.op == "getitem" and op_name(call.input) in PARTS:
                for source in call.input.all_input_nodes:
                    split = source.name in found.facts and len(found.facts[source.name].shape) == len(known.shape)
                    if split:  # the other axes have their own answers
                        found.freeze(found.of(source, axis), f"`{node.name}`: {step.reason}")
                    else:
                        found.freeze_all(source, f"`{node.name}`: {step.reason}")
    for axis in _unsplit(found, node.name, known.shape, steps):
        for part in steps[axis].parts:
            read |= {(part.cut.node.name, k) for k in range(part.cut.start, part.cut.stop)}
        units = _arriving(
            found, steps[axis], known.shape[axis], node, f"`{node.name}` ({call.op}) joins them with fixed channels"
        )
        if units is not None:
            found.axes[node.name, axis] = units
    found.count_work(call, summed)
    return read


def _unsplit(found: Coupling, name: str, shape: Sequence[int], steps: Mapping[int, Propagation]) -> list[int]:
    """The axes that carry units. If one axis was split into several, only one of them can.

    It is not the width of a head, and the pieces of a channel (maxout) only if nothing else is left. Of the others it is the last one
    that ties no units (the channels of a patch, not its places), else the last that does not tie all of them. An axis that is complete
    next to axes of length one (`scale.view(-1, 1, 1)`) was not split.
    """
    carried: list[int] = []
    axes_of_source: dict[tuple[str, int], list[int]] = {}
    for axis, step in steps.items():
        if len(step.parts) == 1 and len(step.parts[0].cut.index) > shape[axis]:
            axes_of_source.setdefault((step.parts[0].cut.node.name, step.parts[0].cut.start), []).append(axis)
        else:
            carried.append(axis)
    unsplit = {(part.cut.node.name, part.cut.start) for axis in carried for part in steps[axis].parts}
    for axes in (axes for source, axes in axes_of_source.items() if source not in unsplit):
        free = axes if len(axes) == 1 else [axis for axis in axes if (name, axis) not in found.heads]
        carried += sorted(free, key=lambda axis: ((name, axis) not in found.pieces, _freedom(found, steps[axis])))[-1:]
    return carried


def _freedom(found: Coupling, step: Propagation) -> int:
    """What is left free if all units at one position of a step's axis are tied: 2 if none are tied by that, 1 if some, 0 if all are."""
    (part,) = step.parts
    units = _flat_units(found, part.cut)
    if units is None or part.links is None:
        return 1
    at, units = np.asarray(part.links[0]), units[np.asarray(part.cut.index)[np.asarray(part.links[1])]]
    places = np.unique(np.stack([at, units]), axis=1)
    if len(np.unique(places[0])) == places.shape[1]:
        return 2
    return int(any(set(units[at == 0]).isdisjoint(units[at == k]) for k in range(1, int(at.max()) + 1)))


def _arriving(found: Coupling, step: Propagation, size: int, reader: fx.Node, reason: str) -> Units | None:
    """The units of an output axis: each position has those of the first part that makes it; the other parts are tied to them."""
    flats = [_flat_units(found, part.cut) for part in step.parts]
    if all(flat is None for flat in flats):
        return None
    flats = [
        _unmade(found, part.cut, reader) if flat is None else flat for part, flat in zip(step.parts, flats, strict=True)
    ]
    blank = all(flat is None or found.filled.issuperset(flat.tolist()) for flat in flats)
    unmade = all(
        flat is None or part.cut.node.op == "get_attr" or found.filled.issuperset(flat.tolist())
        for part, flat in zip(step.parts, flats, strict=True)
    )
    if (blank or (unmade and all(part.links is None for part in step.parts))) and any(flat is None for flat in flats):
        for flat in flats:  # parameters, or tensors of one value, combined with a fixed axis
            found.freeze(flat, reason)
        return None
    positions, arriving = [], []
    for part, flat in zip(step.parts, flats, strict=True):
        if flat is not None and part.links is None and len(step.parts) == 1 and _is_everything(part.cut.index, flat):
            return flat
        positions.append(np.arange(size) if part.links is None else np.asarray(part.links[0]))
        entries = (
            np.asarray(part.cut.index) if part.links is None else np.asarray(part.cut.index)[np.asarray(part.links[1])]
        )
        arriving.append(flat[entries] if flat is not None else found.fresh(len(entries)))
        found.freeze(arriving[-1] if flat is None else None, reason)
    places, source = np.concatenate(positions), np.concatenate(arriving)
    made, first = np.unique(places, return_index=True)
    units = found.fresh(size)
    units[made] = source[first]
    found.pairs.append((units[places], source))
    return units


def _unmade(found: Coupling, cut: Cut, reader: fx.Node) -> Units | None:
    """Units for an axis that nothing makes; None if its entries are fixed."""
    units = lent(found, cut, reader)
    if units is None and cut.width == 1 and found.ops[reader.name] in BINARY and follows_from_sizes(cut.node):
        units = found.chosen[reader.name, cut.node.name, cut.start] = found.fresh(len(cut.index))
        found.filled.update(units.tolist())
    return units


def lent(found: Coupling, cut: Cut, reader: fx.Node) -> Units | None:
    """Units for an axis whose entries are all equal (expanded): those of the tensors that it is combined with.

    None if it is not such an axis, or was read already.
    """
    chain: list[fx.Node] = [reader]
    places: list[Axis] = []
    while cut.width == 1 and all(user in chain or user.name not in found.ops for user in cut.node.users):
        size = found.facts[cut.node.name].shape[cut.start]
        if cut.index != tuple(range(size)) or cut.start == found.facts[cut.node.name].batch_axis:
            return None
        chain.append(cut.node)
        places.append((cut.node.name, cut.start))
        step = consult(cut, found.facts)
        if not isinstance(step, Propagation) or step.filters is not None or len(step.parts) > 1:
            return None
        if not step.parts:
            units = found.fresh(size) if op_name(cut.node) in ("expand", "repeat") else None
            found.axes.update(dict.fromkeys(places, units) if units is not None else {})
            return units
        if step.parts[0].links is not None:
            return None
        cut = step.parts[0].cut
    return None


def freeze_beside_places(found: Coupling, source: fx.Node, axis: int, reader: fx.Node) -> None:
    """Freeze the channels of an axis that an operation takes entries of by number, if the input can change what these numbers mean.

    That is so where channels share the axis with places, such as the height of a map.
    """
    if has_places(found, source, axis):
        reason = f"`{reader.name}` takes them by number beside places, of which there can be more"
        found.freeze(found.of(source, axis), reason)


def has_places(found: Coupling, node: fx.Node, axis: int) -> bool:
    """Whether an axis holds channels and places or samples, such as the height of a map, and how many is up to the input."""
    units = found.of(node, axis)
    if units is None or node.name not in found.facts:
        return False
    shared = len(np.unique(units)) < len(units) and _has_places(found, node, axis)
    return shared or axis == found.facts[node.name].batch_axis


def _has_places(found: Coupling, node: fx.Node, axis: int) -> bool:
    """Whether channels were merged into an axis with another axis whose size the input can change."""
    step = consult(Cut(node, axis, axis + 1, tuple(range(found.facts[node.name].shape[axis]))), found.facts)
    if not isinstance(step, Propagation):  # a norm of the whole axis
        sources = [n for n in node.all_input_nodes if n.name in found.facts]
        same = bool(sources) and found.facts[sources[0].name].shape == found.facts[node.name].shape
        return same and _has_places(found, sources[0], axis)
    for cut in (part.cut for part in step.parts):
        axes = range(cut.start, cut.stop)
        if cut.width > 1 and not all(_is_fixed(found, cut.node, k) for k in axes):
            return True
        if any(found.of(cut.node, k) is not None and _has_places(found, cut.node, k) for k in axes):
            return True
    return False


def _is_fixed(found: Coupling, node: fx.Node, axis: int) -> bool:
    """Whether the weights or the code say how long an axis is."""
    axis = axis_of(axis, len(found.facts[node.name].shape)) if node.name in found.facts else axis
    if found.of(node, axis) is not None or node.name not in found.facts or found.facts[node.name].shape[axis] == 1:
        return True
    given = sizes_given(read_call(node, found.facts)) if node.op.startswith("call") else {}
    size = given.get(axis, -1)
    if isinstance(size, fx.Node):
        reads = [size_read(leaf) for leaf in leaves(size)]
        return all(read is not None and _is_fixed(found, *read) for read in reads)
    if size != -1:
        return True
    step = consult(Cut(node, axis, axis + 1, tuple(range(found.facts[node.name].shape[axis]))), found.facts)
    return isinstance(step, Propagation) and all(
        _is_fixed(found, part.cut.node, k) for part in step.parts for k in range(part.cut.start, part.cut.stop)
    )


def _is_everything(index: Sequence[int], flat: Units) -> bool:
    return len(index) == len(flat) and np.array_equal(index, np.arange(len(flat)))


def _flat_units(found: Coupling, cut: Cut) -> Units | None:
    """Units of several axes taken as one: those of the only axis that has units; the others stay, first those that do anyway."""
    if cut.width == 1:
        return found.of(cut.node, cut.start)
    shape = found.facts[cut.node.name].shape[cut.start : cut.stop]
    carrying = [k for k in range(cut.width) if found.has_units(cut.node, cut.start + k)]
    if len(carrying) > 1:
        fixed = {unit for units, _ in found.frozen for unit in units.tolist()}
        own = {k: set(found.of(cut.node, cut.start + k).tolist()) for k in carrying}  # type: ignore[union-attr]
        carrying.sort(key=lambda k: (not fixed.isdisjoint(own[k]), found.filled.issuperset(own[k])))
    for k in carrying[1:]:
        found.freeze(found.of(cut.node, cut.start + k), f"several axes of `{cut.node.name}` become one")
    units = found.of(cut.node, cut.start + carrying[0]) if carrying else None
    if units is None:
        return None
    k = carrying[0]
    return np.tile(np.repeat(units, prod(shape[k + 1 :])), prod(shape[:k]))
