"""Find the facts of every node by running the graph on two batch sizes, once it has been compared with the module on both.

The runs use tensors without data, which costs nearly nothing. One gives shapes and MACs; the second, with another batch size, which
axis is the batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from indistill_fx.errors import FrontendError
from indistill_fx.graph.edit import copy_graph, output_node, tensor_nodes
from indistill_fx.graph.main_output import as_key, entries, main_output
from indistill_fx.graph.opaque import Opaque
from indistill_fx.graph.ops import attribute, basic_form, op_name, own_parameters
from indistill_fx.graph.per_sample import write_per_sample
from indistill_fx.passes.capture.channel_axis import channel_axes
from indistill_fx.passes.capture.equivalence import Reference
from indistill_fx.passes.capture.observe import Observed, Observer, Seen
from indistill_fx.passes.capture.static_values import fold_static, has_sizes, static_axes
from indistill_fx.traced import Kind, NodeFacts

_RUNS = 16


@dataclass(frozen=True, slots=True)
class Known:
    """The graph with its static values written in, facts per node, the main output (see `TracedModel`), and the comparisons made."""

    graph_module: fx.GraphModule
    facts: dict[str, NodeFacts]
    logits: str
    several_outputs: tuple[str, ...]
    checked: tuple[tuple[int, float], ...]
    notes: tuple[str, ...]


def infer_facts(
    graph_module: fx.GraphModule,
    module: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    logits: str | int | None = None,
    reference: Reference | None = None,
    size_free: bool = False,
    draws: bool = False,
) -> Known:
    """Facts of all nodes whose value is one tensor.

    Args:
        graph_module: the captured graph, in the mode (train or eval) it was captured in.
        module: what it was captured from, in the same mode. Buffers written by a train-mode forward are put back.
        inputs: example arguments.
        kwargs: example keyword arguments.
        logits: key or index of the main output among several.
        reference: runs of the module made already.
        size_free: no size of the example decided anything in the graph, so that it may be compared on smaller images.
        draws: random numbers may leave out work in a run; the most of several runs counts.

    Raises:
        FrontendError: the module fails on the example (where="forward"), or graph and module disagree.
    """
    reference = reference or Reference(module, inputs, kwargs, gradients=False)
    observer = Observer(reference, runs=_RUNS if draws else 1)
    if size_free:
        with suppress(Exception), reference.any_size():  # a module may accept only some batch sizes
            new, facts = _found(graph_module, observer)
            checked = reference.compare(new, size_free=True)
            return Known(new, facts, *_logits_node(new, facts, logits), checked, reference.notes)
    new, facts = _found(graph_module, observer)
    checked = reference.compare(new)
    return Known(new, facts, *_logits_node(new, facts, logits), checked, reference.notes)


def _found(graph_module: fx.GraphModule, observer: Observer) -> tuple[fx.GraphModule, dict[str, NodeFacts]]:
    """The graph with its static values written in, and its facts."""
    reference = observer.reference
    runs = _runs(graph_module, observer)
    _require_fixed_counts(graph_module, runs[0], observer)
    graph_module = _in_basic_forms(graph_module, runs[0].shapes)
    if has_sizes(graph_module, runs[0].shapes):
        graph_module, per_sample = write_per_sample(graph_module, [run.shapes for run in runs], reference.sizes)
        graph_module, folded = _fold(graph_module, runs, observer)
        if per_sample or folded:
            runs = _runs(graph_module, observer)
    return graph_module, _assemble(graph_module, [run.seen for run in runs], reference.sizes, reference.example)


def _in_basic_forms(graph_module: fx.GraphModule, shapes: Mapping[str, tuple[int, ...]]) -> fx.GraphModule:
    """The graph with basic operations in place of their other spellings; all nodes keep their names."""
    forms = {node.name: form for node in graph_module.graph.nodes if (form := basic_form(node, shapes)) is not None}
    if not forms:
        return graph_module
    new, nodes = copy_graph(graph_module)
    for name, (target, args) in forms.items():
        node, before = nodes[name], nodes[name].all_input_nodes
        node.op = "call_method" if isinstance(target, str) else "call_function"
        node.target, node.args, node.kwargs = target, fx.map_arg(args, lambda n: nodes[n.name]), {}
        for source in before:
            if not source.users:
                new.graph.erase_node(source)
    new.graph.lint()
    new.recompile()
    return new


def _runs(graph_module: fx.GraphModule, observer: Observer) -> list[Observed]:
    """Shape and dtype of every node's tensor, at the batch sizes that the module accepts.

    Raises:
        FrontendError: the graph fails.
    """
    sizes = observer.reference.sizes
    try:
        return observer.observe(graph_module, sizes)
    except Exception:
        observer.reference.compare(graph_module)  # raises an error that names the difference
        raise


def _require_fixed_counts(graph_module: fx.GraphModule, first: Observed, observer: Observer) -> None:
    """Refuse lists whose number of tensors a larger batch changes, where code goes through all of them (ghost batch norm).

    Raises:
        FrontendError: there are such; the modules that make them are noted, so that another capture can keep them whole.
    """
    if not first.counts or len(observer.reference.sizes) == 1:
        return
    large = observer.large_batch(graph_module).counts
    made = {node.name: node for node in graph_module.graph.nodes if node.name in first.counts}
    growing = [
        node
        for name, node in made.items()
        if large.get(name, first.counts[name]) != first.counts[name]
        and {user.args[1] for user in node.users if user.target is operator.getitem} >= set(range(first.counts[name]))
    ]
    if not growing:
        return
    owners = dict.fromkeys(_enclosing(node).partition("@")[0] for node in growing)
    observer.reference.keep_whole(filter(None, owners))
    observer.reference.in_pieces = True
    node, owner = growing[0], next(iter(owners))
    inside = f"`{owner}`" if owner else "the forward"
    raise FrontendError(
        f"{inside} takes the batch apart into pieces (`{op_name(node)}`) whose number grows with the batch, "
        "and a graph holds a fixed number",
        where=owner,
        got=op_name(node),
        hint="" if owner else "Move that code into a submodule of its own, which then stays one node in the graph.",
    )


_NUMBERS = frozenset({"item", "tolist", "_local_scalar_dense"})
"""Functions that take numbers out of tensors, which needs data: no graph with one runs at other sizes without them."""


def _fold(graph_module: fx.GraphModule, runs: list[Observed], observer: Observer) -> tuple[fx.GraphModule, bool]:
    """Write what is static into the graph; see `static_values`."""
    shapes = [run.shapes for run in runs]
    picture = observer.other_picture(graph_module)
    channels = None
    if picture is None:
        dtypes = {name: seen.dtype for name, seen in runs[0].seen.items()}
        batch = _batch_axes(shapes[0], shapes[-1], observer.reference.sizes)
        channels = channel_axes(graph_module, shapes[0], dtypes, batch)
    others = [*filter(None, [picture]), *observer.other_lengths(graph_module)]
    if not others and any(op_name(node) in _NUMBERS for node in graph_module.graph.nodes):
        return graph_module, False
    shapes += [run.shapes for run in others]
    counted = [*runs, *others]
    counts = {name: n for name, n in runs[0].counts.items() if all(run.counts.get(name) == n for run in counted)}
    return fold_static(graph_module, static_axes(shapes, channels), counts)


def _assemble(
    graph_module: fx.GraphModule, runs: list[dict[str, Seen]], sizes: Sequence[int], example: int
) -> dict[str, NodeFacts]:
    first, last = runs[0], runs[-1]
    axes = _batch_axes({n: seen.shape for n, seen in first.items()}, {n: seen.shape for n, seen in last.items()}, sizes)
    shapes = {name: _at_batch(first[name].shape, axis, sizes[0], example) for name, axis in axes.items()}
    channels = channel_axes(graph_module, shapes, {name: seen.dtype for name, seen in first.items()}, axes)
    given = {n for n in graph_module.graph.nodes if n.op == "placeholder"}
    for node in graph_module.graph.nodes:  # the elements of inputs that are lists
        if node.target is operator.getitem and node.args[0] in given and node.args[0].name not in shapes:
            given.add(node)
    space = next(
        (shape[2:] for n in graph_module.graph.nodes if n in given and len(shape := shapes.get(n.name, ())) > 2), ()
    )
    facts = {}
    for node in graph_module.graph.nodes:
        if node.name not in axes:
            continue
        shape, axis, seen = shapes[node.name], _told_axis(node, graph_module), first[node.name]
        axis = channels[node.name] if axis is None else axis
        kind = _kind(shape, axes[node.name], axis)
        sides = tuple(n for k, n in enumerate(shape) if k not in (axes[node.name], axis))
        facts[node.name] = NodeFacts(
            shape=shape,
            dtype=seen.dtype,
            kind=kind,
            batch_axis=axes[node.name],
            channel_axis=axis,
            stride=tuple(a / b for a, b in zip(space, sides, strict=True))
            if kind == "map" and len(space) == len(sides) and 0 not in sides
            else None,
            macs=seen.macs // sizes[0],
            parameters=_parameters(node, graph_module),
            module=_enclosing(node),
        )
    return facts


def _batch_axes(
    first: Mapping[str, tuple[int, ...]], last: Mapping[str, tuple[int, ...]], sizes: Sequence[int]
) -> dict[str, int | None]:
    return {name: _batch_axis(shape, last[name], sizes) for name, shape in first.items() if name in last}


def _batch_axis(shape: tuple[int, ...], other: tuple[int, ...], sizes: Sequence[int]) -> int | None:
    if len(sizes) == 1:
        return 0 if shape and shape[0] == sizes[0] else None
    return next((axis for axis, (a, b) in enumerate(zip(shape, other, strict=False)) if a != b), None)


def _at_batch(shape: tuple[int, ...], axis: int | None, size: int, example: int) -> tuple[int, ...]:
    """The shape at the example's batch size: the batch axis may hold several entries per sample (windows)."""
    return tuple(n // size * example if k == axis else n for k, n in enumerate(shape))


def _kind(shape: tuple[int, ...], batch_axis: int | None, channel_axis: int | None) -> Kind:
    if batch_axis is None or channel_axis is None or batch_axis == channel_axis:
        return "other"
    kinds: dict[int, Kind] = {2: "vector", 3: "tokens", 4: "map", 5: "map"}
    return kinds.get(len(shape), "other")


def _told_axis(node: fx.Node, graph_module: fx.GraphModule) -> int | None:
    """The channel axis that a black box itself states."""
    part = attribute(graph_module, str(node.target)) if node.op == "call_module" else None
    return part.channel_axis if isinstance(part, Opaque) else None


def _parameters(node: fx.Node, graph_module: fx.GraphModule) -> int:
    if node.op == "call_module":
        return sum(p.numel() for p in own_parameters(attribute(graph_module, str(node.target))))
    if node.op == "get_attr":
        value = attribute(graph_module, str(node.target))
        return value.numel() if isinstance(value, nn.Parameter) else 0
    return 0


def _enclosing(node: fx.Node) -> str:
    """The call of the module whose forward made the node (`layer@2` for the second); for a leaf module's node, the module around it."""
    stack = [str(key) for key in node.meta.get("nn_module_stack", {})]
    if node.op == "call_module":
        stack = stack[:-1]
    return stack[-1] if stack else ""


def _logits_node(
    graph_module: fx.GraphModule, facts: Mapping[str, NodeFacts], wanted: str | int | None
) -> tuple[str, tuple[str, ...]]:
    """The node of the main output and, if it is only the first of several that differ in shape, all of them, for people."""
    value: Any = output_node(graph_module.graph).args[0]
    fields: tuple[str, ...] = ()
    if (
        isinstance(value, fx.Node) and value.name not in facts and isinstance(value.target, type)
    ):  # a dataclass or a namedtuple
        fields = getattr(value.target, "_fields", ())
        value = {**dict(zip(fields, value.args, strict=False)), **value.kwargs} or value.args
    key = as_key(wanted, value) if wanted is not None else None
    value = tuple(value.values()) if fields and isinstance(key, int) else value
    if hasattr(value, "_fields") and not isinstance(key, int):
        value = value._asdict()
    if wanted is None:
        value = main_output(value)
    elif not isinstance(value, fx.Node):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            legal = list(value) if isinstance(value, dict) else range(len(value))
            raise FrontendError(
                f"the output has no entry {wanted!r}; it has {', '.join(map(str, legal))}",
                where="logits",
                hint="Give one of these as logits.",
            ) from None
    named = [node.name for node in tensor_nodes(value) if node.name in facts]
    if not named:
        raise FrontendError(
            "the graph's output holds no tensor",
            where="output",
            hint="The forward must return a tensor, or a dict or tuple with one.",
        )
    if len({facts[name].shape for name in named}) == 1:
        return named[0], ()
    if wanted is not None:
        raise FrontendError(
            f"entry {wanted!r} of the output holds {len(named)} tensors of different shapes",
            where="logits",
            hint="Name an entry that is one tensor, or let the forward return the logits as one.",
        )
    return named[0], tuple(_shown_outputs(value, facts))


def _shown_outputs(value: Any, facts: Mapping[str, NodeFacts]) -> Iterator[str]:
    """Key or index, and size, of every entry that holds tensors."""
    for key, entry in (entries(value) or {str(k): entry for k, entry in enumerate(value)}).items():
        sizes = ["x".join(map(str, facts[node.name].shape[1:])) for node in tensor_nodes(entry) if node.name in facts]
        if sizes:
            yield f"{key} ({', '.join(sizes)})"
