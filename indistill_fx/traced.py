"""A traced model: the graph, what is known of each node, and the names people use for its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from indistill_fx.batch import split
from indistill_fx.errors import ConfigError, nearest
from indistill_fx.graph.edit import input_nodes
from indistill_fx.graph.module_state import device_of
from indistill_fx.graph.ops import op_name
from indistill_fx.graph.view import View
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import Inputs

Role = Literal["teacher", "student"]
Kind = Literal["map", "tokens", "vector", "other"]

NO_EVAL_MODE = "in eval mode the graph still computes what the code of"
"""How the note begins on a student whose two modes do not fit into one graph."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What is known of one tensor in the graph.

    Attributes:
        shape: with the batch size of the example input.
        dtype: of the tensor.
        kind: `map` (batch, channels, *space, or channels last), `tokens` (batch, sequence, channels), `vector` (batch, channels), `other`.
        batch_axis: the axis that grows with the batch; None for a constant.
        channel_axis: the axis of channels; None where there is none.
        stride: input size over own size, per axis of space; None unless a map.
        macs: multiply-accumulates of this node, for one sample.
        parameters: number of parameters this node reads.
        module: the module call in whose forward the node was made: its path, `layer3.1@2` for the second call.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    batch_axis: int | None
    channel_axis: int | None
    stride: tuple[float, ...] | None
    macs: int
    parameters: int
    module: str

    @property
    def channels(self) -> int:
        """Size of the channel axis."""
        if self.channel_axis is None:
            raise ValueError(f"a tensor of shape {self.shape} without a channel axis")
        return self.shape[self.channel_axis]

    @property
    def path(self) -> str:
        """Path of the module whose forward created the node, in any of its calls."""
        return self.module.partition("@")[0]

    @property
    def space(self) -> tuple[int, ...]:
        """Sizes of all axes but batch and channels: (H, W) of a map, (length,) of tokens."""
        return tuple(n for axis, n in enumerate(self.shape) if axis not in (self.batch_axis, self.channel_axis))


@dataclass(frozen=True, slots=True)
class TraceReport:
    """How a model was traced.

    Attributes:
        method: which capture method succeeded: `symbolic`, `shapes`, `leaves`, `export`.
        refused: the methods tried before, each with the reason why it failed.
        leaves: modules kept as one node because their code could not be traced.
        specialisations: decisions that the example input took (`models.py:31: h == 64`).
        checked: (batch size, largest difference to the module relative to the largest value) for each size compared.
        notes: anything else the reader should know.
        fixed: sizes of inputs that the graph works for alone, by input; None for an axis of any size.
    """

    method: str
    refused: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    specialisations: tuple[str, ...] = ()
    checked: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)

    @property
    def lacks_eval_mode(self) -> bool:
        """Whether a student's graph computes in eval mode what its module does in train mode alone (`notes` says why)."""
        return any(note.startswith(NO_EVAL_MODE) for note in self.notes)

    @property
    def rung(self) -> str:
        """`method`, under the name that 0.1.0 gave it."""
        return self.method


@dataclass(frozen=True, repr=False)
class TracedModel:
    """A model as a graph. `trace` makes it; passes return new ones and never change one.

    Attributes:
        graph_module: the graph. A student's leaf modules are the caller's own objects; a teacher's share only the tensors.
        facts: node name → facts, for nodes whose value is one tensor.
        aliases: node name → names of the tap at that node, as people write them, the outermost module first.
        report: how the model was traced.
        role: teachers are traced in eval mode, students in train mode.
        module: the caller's module.
        example_inputs: positional arguments of one forward call; as the teacher sees them, if there is a `view`.
        example_kwargs: keyword arguments of one forward call.
        logits: name of the node that holds the main output.
        chosen: key or index of that output, where it was chosen; None: it was found by its name or place.
        view: how a teacher sees a batch that was made for the student; None: the batch as it is.
        several_outputs: key or index and size of every output, if they differ in shape and nobody said which one holds the logits:
            `logits` is then only the first of them. Else empty.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsStudent
        >>> traced = ifx.trace(DigitsStudent(), torch.randn(2, 1, 8, 8), role="student")
        >>> for name, layer in traced.layers.items():
        ...     print(name, "is", layer)
        blocks.0.0 is conv 6x8x8, 54 parameters
        blocks.1.0 is conv 12x4x4, 648 parameters
        blocks.2.0 is conv 24x2x2, 2592 parameters
        fc is linear 10, 250 parameters
    """

    graph_module: fx.GraphModule
    facts: Mapping[str, NodeFacts]
    aliases: Mapping[str, tuple[str, ...]]
    report: TraceReport
    role: Role
    module: nn.Module
    example_inputs: tuple[Any, ...]
    example_kwargs: Mapping[str, Any]
    logits: str
    chosen: str | int | None = None
    view: View | None = None
    several_outputs: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """In one line: the graph, its facts and the example fill pages."""
        sizes = [
            ", ".join("x".join(map(str, self.facts[name].shape)) for name in names)
            for names in (self.input_nodes, [self.logits])
        ]
        return (
            f"TracedModel({type(self.module).__name__} as {self.role}: {sizes[0]} → {sizes[1]}, {len(self.layers)} layers, "
            f"{self.macs:,} multiply-accumulates a sample)"
        )

    @cached_property
    def taps(self) -> dict[str, str]:
        """Every legal tap name -> node name. If two nodes could have a name, the first in the graph gets it."""
        found: dict[str, str] = {}
        for node, names in self.aliases.items():
            for name in names:
                found.setdefault(name, node)
        return found

    @cached_property
    def input_nodes(self) -> tuple[str, ...]:
        """The nodes that hold the tensors the model is given: its placeholders, or their parts where a list or dict of tensors is given."""
        return tuple(node.name for node in input_nodes(self.graph_module.graph, self.facts))

    def node(self, tap: str) -> fx.Node:
        """The node that a tap names.

        Args:
            tap: a name in `taps`.

        Returns:
            The node of `graph_module`.

        Raises:
            ConfigError: no tensor has that name; the message offers the nearest names.
        """
        taps = self.taps
        if tap not in taps:
            raise ConfigError(
                f"The {self.role} has no layer named `{tap}`.",
                where=tap,
                hint=f"{nearest(tap, taps)} `indistill-fx inspect` lists all layers.".strip(),
            )
        return self._nodes[taps[tap]]

    @cached_property
    def _nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph_module.graph.nodes}

    def tap_name(self, node: fx.Node | str) -> str:
        """The name people would use for a node's tensor: the outermost module whose output it is, else `module:node`.

        Args:
            node: of `graph_module`, or its name.

        Returns:
            A key of `taps`.
        """
        return self.aliases[node if isinstance(node, str) else node.name][0]

    def facts_of(self, tap: str) -> NodeFacts:
        """Facts of the tensor that a tap names.

        Args:
            tap: a name in `taps`.

        Returns:
            Its shape, dtype, channel axis, multiply-accumulates and so on.

        Raises:
            ConfigError: no tensor has that name.
        """
        return self.facts[self.node(tap).name]

    @property
    def example(self) -> Call:
        """The example call."""
        return Call(self.example_inputs, self.example_kwargs)

    @property
    def example_values(self) -> tuple[Any, ...]:
        """The example call's values in the order of the graph's inputs."""
        return (*self.example_inputs, *self.example_kwargs.values())

    @cached_property
    def inputs(self) -> Inputs:
        """What a batch must contain for the model: the arguments of the example call that are tensors or consist of tensors."""
        taken = Inputs.of(self.graph_module)
        names_in_batch = tuple(
            n for n, value in zip(taken.names, self.example_values, strict=True) if not _is_constant(value)
        )
        return replace(taken, names=names_in_batch, required=names_in_batch, owner=type(self.module).__name__)

    def inputs_in(self, batch: Any, *, where: str) -> tuple[tuple[Any, ...], Tensor | None]:
        """The arguments of one call of the graph that a batch holds, and its labels.

        Args:
            batch: as a data loader gives it, made for the student.
            where: the place that an error names.

        Returns:
            The arguments in order, on the model's device; the labels, or None.

        Raises:
            ConfigError: the batch lacks an input of the model; the message says which.
        """
        parts = split(batch, self.inputs, where=where)
        device = device_of(self.graph_module)
        call = parts.calls[0].to(device)
        found = (call.changed(self.view.apply) if self.view is not None else call).by_name(self.inputs.names)
        names = Inputs.of(self.graph_module).names
        given = [found.get(name, value) for name, value in zip(names, self.example_values, strict=True)]
        return tuple(given), parts.labels.to(device) if parts.labels is not None else None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample."""
        return sum(facts.macs for facts in self.facts.values())

    @property
    def fingerprint(self) -> str:
        """Digest of the structure: operations, edges, shapes without the batch, sizes and names of layers. Weights do not enter."""
        digest = hashlib.sha256()
        for node in self.graph_module.graph.nodes:
            facts = self.facts.get(node.name)
            shape = [n for axis, n in enumerate(facts.shape) if axis != facts.batch_axis] if facts else None
            inputs = [source.name for source in node.all_input_nodes]
            sizes = (facts.macs, facts.parameters) if facts else None
            described = (node.name, op_name(node), inputs, shape, sizes, self.aliases.get(node.name, ()))
            digest.update(repr(described).encode())
        return digest.hexdigest()[:16]

    @property
    def layers(self) -> dict[str, str]:
        """Per layer with work in it, what it is: `{"conv1": "conv 64x16x16, 1728 parameters"}`; in graph order."""
        found = {}
        for name, node in self._nodes.items():
            facts = self.facts.get(name)
            if facts is not None and facts.macs and name in self.aliases:
                size = "x".join(str(n) for axis, n in enumerate(facts.shape) if axis != facts.batch_axis)
                weights = f", {facts.parameters} parameters" if facts.parameters else ""
                found[self.tap_name(name)] = f"{op_name(node)} {size}{weights}"
        return found

    def with_graph(
        self, graph_module: fx.GraphModule, *, facts: Mapping[str, NodeFacts], aliases: Mapping[str, tuple[str, ...]]
    ) -> TracedModel:
        """The same model with another graph.

        Args:
            graph_module: the graph.
            facts: of its nodes, by name.
            aliases: of its nodes, by name.

        Returns:
            A new traced model; this one is not changed.
        """
        return replace(self, graph_module=graph_module, facts=facts, aliases=aliases)


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
