"""One capture of a module: in the mode in which it is, or in both modes; again where a run has shown what the graph must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import fx
from torch.distributions import Distribution

from indistill_fx.errors import FrontendError
from indistill_fx.graph.draws import Lines
from indistill_fx.graph.module_state import mode
from indistill_fx.passes.capture.both_modes import merge_modes, noticing_flags
from indistill_fx.passes.capture.captured import Captured, Request
from indistill_fx.passes.capture.equivalence import Reference, plain_attention, plain_checkpoints
from indistill_fx.passes.capture.facts import Known
from indistill_fx.passes.capture.functionalize import functionalize
from indistill_fx.passes.capture.torch_functions import DrawError
from indistill_fx.traced import NO_EVAL_MODE

Method = Callable[[Request], Captured]


def in_both_modes(once: Callable[[Sequence[str]], Captured], leaves: Sequence[str], reference: Reference) -> Captured:
    """Capture in train mode; if the code depends on the mode, merge it with a capture in eval mode, with the same leaves."""
    module = reference.module
    with noticing_flags() as noticed:
        captured = once(leaves)
    if not noticed:
        return captured
    classes = ", ".join(dict.fromkeys(noticed))
    try:
        with mode(module, training=False):
            other = once((*leaves, *captured.leaves))
        reference.put_back()
        merged = merge_modes(captured, other, module)
        with mode(module, training=False), mode(merged.graph_module, training=False):
            other_mode = Reference(
                module,
                reference.inputs,
                reference.kwargs,
                put_back=reference.put_back,
                generators=reference.generators,
            )
            other_mode.changed = reference.changed
            try:
                other_mode.compare(merged.graph_module)
            finally:
                reference.keep_whole(other_mode.whole)
    except FrontendError as error:
        if error.where in reference.changed:  # another capture method may avoid the change
            raise
        note = f"{NO_EVAL_MODE} {classes} does in train mode: {error.message}"
        return replace(captured, notes=(*captured.notes, note))
    return merged


def in_mode(capture: Method, reference: Reference, leaves: Sequence[str], *, patient: bool) -> Captured:
    """Capture and rule 3; if patient, a module whose writes cannot be made functional becomes a leaf."""
    given_up: tuple[str, ...] = reference.whole if patient else ()
    generators = reference.generators
    lines, suspected = Lines(generators), False
    module = reference.module
    asked = Request(module, reference.inputs, reference.kwargs, lines=lines)
    # read from `vars`, so that no property or hook runs
    flags = [(vars(part), vars(part)["training"]) for part in module.modules() if "training" in vars(part)]
    while True:
        unregistered, states = reference.unregistered, generators.states()
        for attributes, flag in flags:  # `forget` restores the flags from before the trace
            attributes["training"] = flag
        try:
            with (
                plain_attention(),
                plain_checkpoints(),
                _unchecked_distributions(),
                torch.set_grad_enabled(reference.gradients),
            ):
                captured = capture(replace(asked, leaves=(*leaves, *given_up), loose=unregistered))
            drawn = generators.states() != states
        except FrontendError:
            reference.forget()
            if reference.unregistered.keys() == unregistered.keys() and not lines.has_news():
                raise
            continue
        finally:
            reference.forget()
        if drawn and not lines.used:
            if suspected:
                raise DrawError(f"the forward of {type(module).__name__} draws from Python's or numpy's generators")
            suspected = True  # by another thread, unless it happens again
            continue
        news = lines.has_news() or (drawn and not generators.drawn)
        if news or reference.unregistered.keys() != unregistered.keys():
            generators.drawn |= drawn
            continue  # to find the lines that draw; because tensors recorded as constants must become state
        try:
            captured = functionalize(captured)
        except FrontendError as error:
            if not patient or not error.where or error.where in given_up:
                raise
            given_up = (*given_up, error.where)
            continue
        return captured if not given_up else _with_leaves(captured, given_up)


def _unchecked_distributions() -> AbstractContextManager[object]:
    """Without the checks of torch.distributions, which decide by the data; the module's own runs make them."""
    return patch.object(Distribution, "_validate_args", False)


def _with_leaves(captured: Captured, given_up: Sequence[str]) -> Captured:
    called = {_path(node) for node in captured.graph_module.graph.nodes if node.op == "call_module"}
    leaves = dict.fromkeys((*captured.leaves, *(path for path in given_up if path in called)))
    return replace(captured, leaves=tuple(leaves))


def _path(node: fx.Node) -> str:
    """The path, in the traced module, of the module that a node calls."""
    target, owner = str(node.target), node.graph.owning_module
    return str(owner.meta["renamed"].get(target, target)) if owner is not None else target


def leaf_share(captured: Captured, known: Known) -> float:
    """The share of the work that is done in modules kept as one node because their code could not be traced."""
    total = sum(facts.macs for facts in known.facts.values())
    kept = set(captured.leaves)
    leaf_nodes = [
        node for node in captured.graph_module.graph.nodes if node.op == "call_module" and _path(node) in kept
    ]
    names = {node.name for node in leaf_nodes} | {
        user.name for node in leaf_nodes if node.name not in known.facts for user in node.users
    }
    return sum(facts.macs for name, facts in known.facts.items() if name in names) / max(total, 1)
