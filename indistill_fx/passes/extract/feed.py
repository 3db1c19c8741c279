"""Cut a student into segments that are independent of each other: each reads what the teacher has at the place where it begins.

Rules, in order:
  1. At every tap but the last the graph gets an input, and what reads the tap reads that input instead.
  2. A segment must begin at the tap before: none of its layers may be on a path around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from indistill_fx.errors import MatchError
from indistill_fx.graph.edit import copy_graph, output_node
from indistill_fx.passes.contract import PassResult, Rewrite


def fed_name(number: int) -> str:
    """Name of the input that stands for a tap, the first being 0."""
    return f"fed_{number}"


def feed(graph_module: fx.GraphModule, taps: Sequence[str]) -> PassResult[fx.GraphModule, Rewrite]:
    """Let every segment between two taps begin at an input of its own.

    Args:
        graph_module: from `cut`, with these taps.
        taps: shallow to deep.

    Returns:
        A graph with further inputs `fed_0`, `fed_1`, …, one for each tap but the last; its features are those of the segments.

    Raises:
        MatchError: a tap does not depend on the one before it, or also on layers before that one.
    """
    new, _ = copy_graph(graph_module)
    output = output_node(new.graph)
    outputs: Any = output.args[0]
    features: dict[str, fx.Node] = outputs[0]
    last = [node for node in new.graph.nodes if node.op == "placeholder"][-1]
    fed: list[fx.Node] = []
    for number, tap in enumerate(taps[:-1]):
        node = features[tap]
        with new.graph.inserting_after(last):
            last = new.graph.placeholder(fed_name(number))
        fed.append(last)
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user is not output)
    for number, tap in enumerate(taps):
        _check_segment(new, features, taps, number, fed[number - 1] if number else None, tap)
    new.graph.lint()
    new.recompile()
    return PassResult(new, Rewrite(done=tuple(f"`{tap}` is an input of what follows" for tap in taps[:-1])))


def _check_segment(
    graph_module: fx.GraphModule,
    features: dict[str, fx.Node],
    taps: Sequence[str],
    number: int,
    begin: fx.Node | None,
    tap: str,
) -> None:
    before = _ancestors(features[tap])
    if begin is not None and begin not in before:
        raise MatchError(
            f"`{tap}` does not depend on `{taps[number - 1]}`, so it cannot be fed with it.",
            where=tap,
            hint="Order the pairs from the input to the output, or warm them up one by one (feed='student').",
        )
    for other in range(number):
        shared = [node for node in before & _ancestors(features[taps[other]]) if _has_weights(graph_module, node)]
        if shared:
            raise MatchError(
                f"`{tap}` also depends on `{shared[0].target}`, past `{taps[number - 1]}`, so it cannot be fed from there alone.",
                where=tap,
                hint=f"Choose a layer that everything passes through, not `{taps[number - 1]}`, or warm up with feed='student'.",
            )


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                todo.append(source)
    return found


def _has_weights(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op != "call_module":
        return False
    return any(True for _ in graph_module.get_submodule(str(node.target)).parameters())
