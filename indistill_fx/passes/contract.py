"""What a pass is: a value in, a `PassResult` out; its graph is checked, and its input is left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import fx, nn

from indistill_fx.errors import PassError, VerifyError, Violation
from indistill_fx.graph.edit import output_node
from indistill_fx.traced import TracedModel

Value = TypeVar("Value")
Report = TypeVar("Report")


@dataclass(frozen=True, slots=True)
class PassResult(Generic[Value, Report]):
    """The new value a pass made, and its report: what changed, why, and what was skipped and why."""

    value: Value
    report: Report


def verify(graph_module: fx.GraphModule, *, after: str, signature: tuple[str, ...] | None = None) -> None:
    """Check a graph's structure.

    Args:
        graph_module: the graph.
        after: the pass that made it, for the message.
        signature: the names of its inputs, if they must be these.

    Raises:
        VerifyError: holds every violation: reads of nodes that stand later or elsewhere, names used twice, modules or tensors that are
            missing, an output that is not the last node, inputs that changed.
    """
    violations = list(_violations(graph_module, signature))
    if violations:
        raise VerifyError(f"The graph is broken after pass `{after}`:", violations)


def signature_of(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Names of the graph's inputs, in order."""
    return tuple(str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder")


def _violations(graph_module: fx.GraphModule, signature: tuple[str, ...] | None) -> Iterator[Violation]:
    seen: set[fx.Node] = set()
    names: set[str] = set()
    modules: Mapping[str, nn.Module] = dict(graph_module.named_modules(remove_duplicate=False))
    for node in graph_module.graph.nodes:
        for source in node.all_input_nodes:
            if source.graph is not graph_module.graph:
                yield Violation(node.name, f"reads `{source.name}` of another graph", "a node of its own graph")
            elif source not in seen:
                yield Violation(node.name, f"reads `{source.name}`, which stands later", "sources before readers")
        if node.name in names:
            yield Violation(node.name, "a name used twice", "unique names")
        if node.op == "call_module" and str(node.target) not in modules:
            yield Violation(node.name, f"calls module `{node.target}`, which is missing", "a registered module")
        if node.op == "get_attr" and not _has(graph_module, str(node.target)):
            yield Violation(node.name, f"reads `{node.target}`, which is missing", "a parameter or buffer")
        seen.add(node)
        names.add(node.name)
    if output_node(graph_module.graph).op != "output":
        yield Violation(output_node(graph_module.graph).name, "the last node", "the output")
    if signature is not None and signature_of(graph_module) != signature:
        yield Violation("inputs", str(signature_of(graph_module)), str(signature))


def _has(root: nn.Module, path: str) -> bool:
    value: object = root
    for part in path.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@contextmanager
def unchanged(traced: TracedModel, *, by: str) -> Iterator[None]:
    """Make sure that a pass leaves a model alone: its graph, and identity, version and flags of every tensor and module.

    This is the cheap form; tests compare digests of the contents too.

    Raises:
        PassError: something changed; says what.
    """
    before = _state(traced)
    yield
    after = _state(traced)
    if after != before:
        changed = next(a for a, b in zip((*before, "more entries"), (*after, "fewer entries"), strict=False) if a != b)
        raise PassError(f"Pass `{by}` changed its input: {changed}.", where=by)


def _state(traced: TracedModel) -> list[object]:
    state: list[object] = [(node.name, str(node.target), str(node.args)) for node in traced.graph_module.graph.nodes]
    for root in (traced.module, traced.graph_module):
        state += [(name, child.training) for name, child in root.named_modules()]
        tensors = (*root.named_parameters(), *root.named_buffers())
        state += [(name, id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors]
    return state
