"""Trace a module into a graph with facts about every node, and verify that the graph computes the same.

Rules, in order:
  1. Teachers are traced in eval mode, students in train mode; flags, buffers, attributes and random state are put back whatever happens.
  2. The capture methods are tried in order; a refused one and its reason are in the report. A graph in which modules kept as
     one node do more than a fifth of the work is only taken if `torch.export`, the last method, has no better one.
  3. In-place operations are made out of place, so that a later one cannot overwrite a tensor that a tap holds.
  4. A name that cannot be written into the graph's source stands there as another; the report says which.
  5. The graph is compared with the module on two batch sizes before it is returned; a student's also in what it trains: the
     gradients of all parameters, and the buffers; and in eval mode, which is another one where code asks for it (see `both_modes`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, fx, nn

from indistill_fx.batch import call_of
from indistill_fx.errors import ConfigError, FrontendError, unknown
from indistill_fx.graph.caches import caches_kept, no_generation_cache, reach_of
from indistill_fx.graph.draws import Generators
from indistill_fx.graph.edit import MADE
from indistill_fx.graph.module_state import Change, mode, own_layers, own_state, uncompiled, untouched, weights_kept
from indistill_fx.graph.opaque import Opaque
from indistill_fx.graph.view import View
from indistill_fx.loading.input_facts import other_channels
from indistill_fx.passes.capture.attempt import Method, in_both_modes, in_mode, leaf_share
from indistill_fx.passes.capture.captured import Captured, children, name_taps, tensors
from indistill_fx.passes.capture.equivalence import Reference
from indistill_fx.passes.capture.exported import capture_exported
from indistill_fx.passes.capture.facts import Known, infer_facts
from indistill_fx.passes.capture.recording import capture_leaves, capture_shapes
from indistill_fx.passes.capture.symbolic import capture_symbolic
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import FORM, LEFT_OUT, Inputs, form_of
from indistill_fx.traced import Role, TracedModel, TraceReport


def as_traced(
    model: nn.Module | TracedModel,
    example_inputs: Any,
    *,
    role: Role,
    logits: str | int | None = None,
    view: View | None = None,
) -> TracedModel:
    """The traced model; a plain module is traced with `example_inputs`.

    Args:
        model: traced, or a plain module.
        example_inputs: as the student takes them.
        role: see `trace`.
        logits: see `trace`.
        view: what a teacher sees of them. A teacher of another dtype sees them in that; one that takes RGB alone sees grey images in
            three channels, and the other way round.

    Raises:
        ConfigError: a plain module without example inputs, or one of them is missing.
    """
    if isinstance(model, TracedModel):
        return model
    if example_inputs is None:
        raise ConfigError(
            f"The {role} is a plain module, and there is no example input to trace it with.",
            where="example_inputs",
            hint=f"Give example_inputs=…, or {role}=ifx.trace({role}, example_inputs, role={role!r}).",
        )
    model = uncompiled(model)
    call = call_of(example_inputs, Inputs.of(model), where=f"The {role}")
    _require_numbers(call, role)
    if role == "student":
        return trace(model, call, role=role, logits=logits)
    given = call.changed(view.apply) if view is not None else call
    channels = other_channels(model, given) if view is None or view.channels is None else None
    full_view = View.combined(view, View(dtype=_other_dtype(model, call), channels=channels))
    seen = call.changed(full_view.apply) if full_view is not None else call
    try:
        return replace(trace(model, seen, role=role, logits=logits), view=full_view)
    except FrontendError as error:
        if error.where != "forward" or (full_view is not None and full_view.size is not None):
            raise
        hint = "If the teacher needs images of another size than the student, give that size: --teacher-size (View(size=…))."
        raise FrontendError(error.message, where=error.where, got=error.got, hint=f"{error.hint} {hint}") from error


def _require_numbers(call: Call, role: Role) -> None:
    """Refuse NaN, because NaN cannot be compared; infinite values are allowed, as in masks."""
    for value in call.tensors:
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ConfigError(
                f"The first batch, or the example input, of the {role} holds NaN.",
                where="inputs",
                got="NaN",
                expected="numbers",
                hint="Check what the loader yields: common causes are a standard deviation of 0, and a file that was read wrongly.",
            )


def _require_plain(value: object, name: str) -> None:
    """Refuse tensors inside objects: they would be constants of the graph, which would not depend on its input.

    Raises:
        ConfigError: there are such.
    """
    if type(value) is dict or type(value) in (tuple, list):
        for _, child in children(value):
            _require_plain(child, name)
    elif not isinstance(value, (Tensor, nn.Module)):
        held = [key for key, child in children(value) or getattr(value, "__dict__", {}).items() if tensors(child)]
        if held:
            raise ConfigError(
                f"The input `{name}` is a {type(value).__name__} that holds tensors ({', '.join(map(str, held))}), which no graph takes.",
                where=name,
                got=type(value).__name__,
                expected="tensors, or lists, tuples or dicts of them",
                hint="Give them to the forward as tensors, or in a list, tuple or dict.",
            )


def _other_dtype(model: nn.Module, call: Call) -> str | None:
    """The dtype of a model's weights, if it differs from that of its inputs."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    real = next((v for v in call.tensors if v.is_floating_point()), None)
    if weight is None or real is None or weight.dtype == real.dtype:
        return None
    return str(weight.dtype).removeprefix("torch.")


_METHODS: dict[str, Method] = {
    "symbolic": capture_symbolic,
    "shapes": capture_shapes,
    "leaves": capture_leaves,
    "export": capture_exported,
}
_MUCH = 0.2
_NO_CACHE = "traced with use_cache=False: keys and values for `generate`, if the model returns any, are left out"


def trace(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | Call,
    *,
    role: Role = "teacher",
    example_kwargs: Mapping[str, Any] | None = None,
    leaves: Sequence[str] = (),
    logits: str | int | None = None,
) -> TracedModel:
    """Trace `module` into a graph.

    Args:
        module: any PyTorch model. It is not changed.
        example_inputs: a tensor, a sequence of positional arguments, or tensors by name, of which the model gets those that its forward
            takes. The first dimension is the batch; all other shapes are taken from the example.
        role: `teacher` (eval mode, shares tensors but no flags with the module) or `student` (train mode, the graph calls the
            module's own leaf modules, so that training the graph trains the module).
        example_kwargs: keyword arguments of the forward call.
        leaves: paths of submodules to keep as one node.
        logits: key or index of the main output, for models that return several.

    Returns:
        The traced model. Its graph takes the positional arguments, then the values of the keyword arguments in the order given here.

    Raises:
        ConfigError: the example inputs, `leaves` or `logits` do not fit the module.
        FrontendError: no method can trace it, or its forward fails on the example input.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> traced = ifx.trace(DigitsTeacher(), torch.randn(2, 1, 8, 8))
        >>> traced.macs, traced.facts_of("layer2").shape
        (6182144, (2, 64, 4, 4))
    """
    if role not in get_args(Role):
        raise unknown("role", str(role), "role of a model", get_args(Role), legal=" or ".join(get_args(Role)))
    call = call_of(example_inputs, Inputs.of(module), where="The example").plus(example_kwargs or {})
    inputs, kwargs = call.args, dict(call.kwargs)
    _require_code(module)
    _require_data(module)
    for place, value in (*enumerate(inputs), *kwargs.items()):
        _require_plain(value, str(place))
    if role == "student":
        _require_gradients(module)
    reach = reach_of(module)
    with (
        no_generation_cache(module) as left_out,
        mode(module, training=role == "student"),
        untouched(module) as state,
        caches_kept(reach) as empty_caches,
        weights_kept(module) as put_weights_back,
    ):

        def forget() -> list[Change]:
            changed = state.changed()
            state.put_back()
            empty_caches()
            return changed

        reference = Reference(
            module, inputs, kwargs, gradients=role == "student", put_back=put_weights_back, forget=forget,
            generators=Generators(module, reach),
        )  # fmt: skip
        method, captured, known, refused = _capture(reference, leaves, logits, own_flags=role == "teacher")
    captured = replace(captured, notes=(*captured.notes, *((_NO_CACHE,) if left_out else ())))
    report = _report(method, refused, captured, known, reference)
    return TracedModel(
        graph_module=_marked(known.graph_module, module, (*inputs, *kwargs.values())),
        facts=known.facts,
        aliases=name_taps(replace(captured, graph_module=known.graph_module), known.facts),
        report=report,
        role=role,
        module=module,
        example_inputs=inputs,
        example_kwargs=kwargs,
        logits=known.logits,
        chosen=logits,
        several_outputs=known.several_outputs,
    )


def _report(method: str, refused: Sequence[str], captured: Captured, known: Known, reference: Reference) -> TraceReport:
    return TraceReport(
        method=method,
        refused=tuple(refused),
        leaves=captured.leaves,
        specialisations=captured.specialisations,
        checked=known.checked,
        notes=(*captured.notes, *captured.renamed, *known.notes, *_not_left(reference, known, captured.leaves)),
        fixed=captured.fixed,
    )


def _marked(graph_module: fx.GraphModule, module: nn.Module, values: Sequence[Any]) -> fx.GraphModule:
    """The graph, in which the user's tensors and the constants that tracing made can be told apart.

    It knows which arguments it left out, and the forms of those it has.
    """
    taken, given = Inputs.of(module), Inputs.of(graph_module).names
    left_out = tuple(name for name in (*taken.names, *taken.left_out) if name not in (*taken.required, *given))
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), values, strict=True):
        node.meta[LEFT_OUT], node.meta[FORM] = left_out, form_of(value)
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        node.meta[MADE] = str(node.target) not in own
    return graph_module


def _require_code(module: nn.Module) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        raise FrontendError(
            "the model is a TorchScript program, which holds no Python code to trace",
            where=type(module).__name__,
            got=str(module.original_name),
            expected="the nn.Module it was compiled from",
            hint="Give the module it was compiled from; its weights are in program.state_dict().",
        )


def _require_data(module: nn.Module) -> None:
    tensors = (*module.named_parameters(), *module.named_buffers())
    if (name := next((name for name, tensor in tensors if tensor.is_meta), None)) is not None:
        raise ConfigError(
            f"The weights of {type(module).__name__} hold no data: `{name}` is on the device meta.",
            where=type(module).__name__,
            got="tensors on the device meta",
            expected="weights with values",
            hint="Give the model its weights first: model.to_empty(device='cpu'), then model.load_state_dict(…).",
        )


def _require_gradients(module: nn.Module) -> None:
    if any(isinstance(part, Opaque) for part in module.modules()) and not any(True for _ in module.parameters()):
        raise ConfigError(
            "The student is a black box, which has no weights to train and no gradients.",
            where="student",
            got=type(module).__name__,
            expected="a PyTorch model",
            hint="A black box can only be a teacher. If the ONNX file can be converted, leave `onnxruntime:` out.",
        )


def _not_left(reference: Reference, known: Known, leaves: Sequence[str]) -> tuple[str, ...]:
    """Lines of the report on attributes that the forward changes."""
    if not reference.changed:
        return ()
    buffers = {name for name, _ in reference.module.named_buffers()}
    kept = {name for name, _ in known.graph_module.named_buffers()} - buffers
    not_saved = [name for name in reference.changed if name in kept]
    inside = tuple(f"{leaf}." for leaf in leaves)
    left = [name for name in reference.changed if name not in kept | buffers and not name.startswith(inside)]
    notes = {
        "kept from call to call, but not in a buffer, so checkpoints do not hold it": not_saved,
        "set by the forward, but not by the graph; over two calls the outputs did not depend on it": left,
    }
    return tuple(f"{_names(names)}: {note}" for note, names in notes.items() if names)


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _with_more_leaves(attempt: Callable[[], tuple[Captured, Known]], reference: Reference) -> tuple[Captured, Known]:
    """The first attempt that is not refused; modules that one has shown to be none for a graph are leaves of the next."""
    while True:
        whole = reference.whole
        try:
            return attempt()
        except FrontendError:
            if reference.whole == whole:
                raise


def _capture(
    reference: Reference, leaves: Sequence[str], logits: str | int | None, *, own_flags: bool
) -> tuple[str, Captured, Known, list[str]]:
    """Rule 2."""
    refused: list[str] = []
    reason: FrontendError | None = None
    coarse: tuple[str, Captured, Known] | None = None
    for method in _METHODS:
        if method == "export" and reference.in_pieces and reference.module.training:
            refused.append(f"{method}: in train mode it would compute with all of a larger batch at once")
            continue
        attempt = partial(_attempt, method, reference, leaves, logits, own_flags=own_flags)
        try:
            captured, known = attempt() if method != "leaves" else _with_more_leaves(attempt, reference)
        except FrontendError as error:
            if error.where in ("forward", "dtype", "output", "logits"):
                raise
            refused.append(f"{method}: {error.message}")
            reason = error if reason is None or error.hint else reason
            continue
        if method == "leaves" and leaf_share(captured, known) > _MUCH:
            coarse = method, captured, known
            refused.append(
                f"{method}: {', '.join(captured.leaves)} would stay whole and do {leaf_share(captured, known):.0%} of the work"
            )
            continue
        return method, captured, known, refused
    if coarse is not None:
        return *coarse, [line for line in refused if not line.startswith("leaves:")]
    name = type(reference.module).__name__
    if reference.lists_samples:  # a module that fails on its own says so here
        raise FrontendError(
            f"{name} cannot be traced: it returns tensors for each sample, as detectors do, so their number changes with the batch.",
            where=name,
            hint="Distil its backbone, which returns tensors for the whole batch: teacher.backbone and student.backbone, or a function in "
            "a file that makes it. The detector's own loss can be the main loss: examples/detection.py.",
        ) from reason
    assert reason is not None
    others = "; ".join(line.rstrip(".") for line in refused if reason.message not in line)
    raise FrontendError(
        f"{name} cannot be traced: {reason.message.rstrip('.')}." + (f" ({others}.)" if others else ""),
        where=reason.where or name,
        got=reason.got,
        hint=reason.hint or "Keep the part that stops the trace as one node with leaves=[its path].",
    ) from reason


def _attempt(
    method: str, reference: Reference, leaves: Sequence[str], logits: str | int | None, *, own_flags: bool
) -> tuple[Captured, Known]:
    """Capture by one method, and compare the graph with the module; a teacher keeps its own training flags and state."""
    once = partial(in_mode, _METHODS[method], reference, patient=method == "leaves")
    captured = once(leaves) if own_flags else in_both_modes(once, leaves, reference)
    reference.put_back()
    graph_module = captured.graph_module
    if own_flags:
        own_layers(graph_module)
    given = reference.module, reference.inputs, reference.kwargs
    with reference.kept(graph_module):
        known = infer_facts(
            graph_module,
            *given,
            logits=logits,
            reference=reference,
            size_free=method == "symbolic",
            draws=captured.draws,
        )
    if own_flags:
        own_state(known.graph_module, reference.changed.values(), reference.written)
    return captured, known
