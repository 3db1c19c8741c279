"""What a pass is, and the one place that runs them.

A pass is a function from a value to a `PassResult`: a new value and a report. It never changes what it was given. `run_passes` holds
passes to that: it names them, checks that the input is as it was, verifies the new graph, and records what changed, computed from the
graphs before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import unified_diff
from functools import cached_property
from itertools import groupby
from typing import Any, Generic, TypeVar

from torch import fx, nn

from indistill_fx.errors import IndistillError, PassError, VerifyError, Violation
from indistill_fx.graph.edit import output_node
from indistill_fx.traced import TracedModel

Value = TypeVar("Value")
Report = TypeVar("Report")
Graph = TracedModel | fx.GraphModule


@dataclass(frozen=True, slots=True)
class PassResult(Generic[Value, Report]):
    """What a pass returns.

    Attributes:
        value: the new value.
        report: what changed and why, and what was skipped and why.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> traced = ifx.trace(DigitsTeacher(), torch.randn(2, 1, 8, 8))
        >>> result = ifx.narrow(traced, widths={"layer1": 4})
        >>> result.value.facts_of("layer1").shape, len(result.report.kept["layer1"])
        ((2, 4, 8, 8), 4)
    """

    value: Value
    report: Report


@dataclass(frozen=True, slots=True)
class Rewrite:
    """The report of a pass from graph to graph.

    Attributes:
        done: what was rewritten, one entry a place.
        skipped: what was looked at and left, each with the reason.
    """

    done: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a graph.

    Attributes:
        name: of the pass.
        done: see `Rewrite`.
        skipped: see `Rewrite`.
        before: the graph as text, a line a node (see `graph_text`).
        after: likewise.
    """

    name: str
    done: tuple[str, ...]
    skipped: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @cached_property
    def changed(self) -> bool:
        """Whether the graph's text has changed."""
        return self.before != self.after

    def diff(self, *, context: int = 1) -> list[str]:
        """The changed lines, marked `-` and `+`, with some lines of context; `…` stands for lines that are left out.

        Of more than ten lines in a row that only went or only came, the first and last four are shown.
        """
        lines = list(unified_diff(self.before, self.after, lineterm="", n=context))[2:]
        found: list[str] = []
        for mark, group in groupby(lines, key=lambda line: line[0]):
            run = ["…" if mark == "@" else line for line in group]
            found += run if mark == " " or len(run) <= 10 else [*run[:4], f"{mark}… {len(run) - 8} lines", *run[-4:]]
        return found


Pass = tuple[str, Callable[[Any], PassResult[fx.GraphModule, Rewrite]]]
"""A name, and a function from a `TracedModel` or GraphModule to a new GraphModule and a `Rewrite`."""


def run_passes(value: Graph, passes: Sequence[Pass]) -> PassResult[fx.GraphModule, tuple[PassRecord, ...]]:
    """Run passes one after the other, each on what the one before made.

    Args:
        value: where they begin; it is left as it is.
        passes: at least one.

    Returns:
        The last graph, and a record of every pass.

    Raises:
        PassError: a pass changed its input, or raised something unplanned.
        VerifyError: a pass made a broken graph.
        IndistillError: what a pass raised on purpose, with a note that names the pass.
    """
    signature = signature_of(_graph_of(value))
    records: list[PassRecord] = []
    text = graph_text(_graph_of(value))
    for name, apply in passes:
        try:
            with unchanged(value, by=name):
                result = apply(value)
        except IndistillError as error:
            error.add_note(
                f"In pass `{name}`" + (f", after {', '.join(record.name for record in records)}." if records else ".")
            )
            raise
        except Exception as error:
            raise PassError(f"Pass `{name}` failed: {type(error).__name__}: {error}", where=name) from error
        verify(result.value, after=name, signature=signature)
        before, text = text, graph_text(result.value) if result.value is not value else text
        records.append(PassRecord(name, result.report.done, result.report.skipped, before, text))
        value = result.value
    assert isinstance(value, fx.GraphModule), "passes end in a graph"
    return PassResult(value, tuple(records))


def graph_text(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """The graph as a person reads it: `relu = relu(bn1)`, a line a node, modules by their path."""
    lines = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            lines.append(f"return {_shown(node.args[0])}")
        elif node.op == "placeholder":
            lines.append(f"{node.name} = input")
        elif node.op == "get_attr":
            lines.append(f"{node.name} = self.{node.target}")
        else:
            given = ", ".join([*map(_shown, node.args), *(f"{key}={_shown(arg)}" for key, arg in node.kwargs.items())])
            lines.append(f"{node.name} = {_called(node, graph_module)}({given})")
    return tuple(lines)


def _called(node: fx.Node, graph_module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return f"{node.target}:{type(graph_module.get_submodule(str(node.target))).__name__}"
    return f".{node.target}" if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def _shown(argument: object) -> str:
    if isinstance(argument, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(value)}" for key, value in argument.items()) + "}"
    if isinstance(argument, (tuple, list)):
        return "(" + ", ".join(map(_shown, argument)) + ")"
    return str(argument)


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
def unchanged(value: Graph, *, by: str) -> Iterator[None]:
    """Make sure that a pass leaves its input alone: its graph, and identity, version and flags of every tensor and module.

    This is the cheap form; tests compare digests of the contents too.

    Raises:
        PassError: something changed; says what.
    """
    before = _state(value)
    yield
    after = _state(value)
    if after != before:
        changed = next(a for a, b in zip((*before, "more entries"), (*after, "fewer entries"), strict=False) if a != b)
        raise PassError(f"Pass `{by}` changed its input: {changed}.", where=by)


def _state(value: Graph) -> list[object]:
    graph_module = _graph_of(value)
    state: list[object] = [(n.name, str(n.target), str(n.args), str(n.kwargs)) for n in graph_module.graph.nodes]
    for root in (value.module, graph_module) if isinstance(value, TracedModel) else (graph_module,):
        state += [(name, child.training) for name, child in root.named_modules()]
        tensors = (*root.named_parameters(), *root.named_buffers())
        state += [(name, id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors]
    return state


def _graph_of(value: Graph) -> fx.GraphModule:
    return value.graph_module if isinstance(value, TracedModel) else value
