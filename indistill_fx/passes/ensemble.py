"""Several teachers as one module: each computes its logits, and their weighted mean is the teacher's.

Whatever reads a teacher (tracing, plan, stages, cache, checkpoints) reads this one like any other; its layers are named by whose they
are, `teachers.0.layer1`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from indistill_fx.batch import call_of
from indistill_fx.errors import ConfigError, IndistillError, MatchError
from indistill_fx.graph.main_output import MAIN_NAMES
from indistill_fx.graph.module_state import device_of, evaluating, uncompiled
from indistill_fx.graph.view import View
from indistill_fx.loading.input_facts import other_channels
from indistill_fx.passes.capture.trace import as_traced
from indistill_fx.passes.extract.view import as_seen
from indistill_fx.plan import AlignmentPlan, Layers, ModelStamp, Pair, member_of
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import FORM, Inputs, form_of
from indistill_fx.traced import TracedModel


def ensemble(
    teachers: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    *,
    example_inputs: Any,
    logits: str | int | Sequence[str | int | None] | None = None,
    views: Sequence[View | None] | None = None,
) -> fx.GraphModule:
    """Combine several teachers into one, which `distill` takes as its teacher.

    Args:
        teachers: two or more, with the same outputs. They are not changed.
        weights: of their logits, above 0; only their ratios count. None: all equal.
        example_inputs: for one of them; they take the same inputs, in order or by name. The first dimension is the batch.
        logits: key or index of the logits, for teachers that return several outputs; or one for each of them.
        views: how each of them sees a batch that was made for the student. None: the batch as it is, except that a teacher that takes only
            RGB sees grey images in three channels, and one that takes only grey sees the luma of RGB.

    Returns:
        A module whose output is sum_i weights_i * logits_i / sum_i weights_i.

    Raises:
        ConfigError: there are fewer than two teachers, weights or views do not match them, or their outputs are not tensors of one shape.

    Examples:
        >>> import torch
        >>> import indistill_fx as ifx
        >>> from indistill_fx.demo import DigitsTeacher
        >>> x = torch.randn(2, 1, 8, 8)
        >>> one, other = DigitsTeacher().eval(), DigitsTeacher().eval()
        >>> both = ifx.ensemble([one, other], weights=[3, 1], example_inputs=x)
        >>> torch.allclose(both(x), 0.75 * one(x) + 0.25 * other(x), atol=1e-5)
        True
    """
    weights = [1.0] * len(teachers) if weights is None else list(weights)
    teachers = [uncompiled(teacher) for teacher in teachers]
    if len(teachers) < 2 or len(weights) != len(teachers) or not all(weight > 0 for weight in weights):
        raise ConfigError(
            f"{len(teachers)} teachers with the weights {weights}.",
            where="teachers",
            got=weights,
            expected="two teachers or more, and a weight above 0 for each",
        )
    names, places, values = _inputs(teachers, example_inputs)
    views = _views(teachers, places, values, views)
    asked = [logits] * len(teachers) if logits is None or isinstance(logits, (str, int)) else list(logits)
    if len(asked) != len(teachers):
        raise ConfigError(
            f"{len(teachers)} teachers with {len(asked)} entries of `logits`.",
            where="logits",
            got=logits,
            expected=len(teachers),
        )
    axes, entries = _checked_outputs(teachers, places, values, views, asked)
    root = nn.Module()
    root.teachers = nn.ModuleList(teachers)
    graph = fx.Graph()
    given = [graph.placeholder(name) for name in names]
    for node, value in zip(given, values, strict=True):
        node.meta[FORM] = form_of(value)
    outputs = []
    for number, view in enumerate(views):
        inputs = list(zip(given, values, strict=True))
        seen = as_seen(root, graph, inputs, view, f"view_{number}") if view is not None else given
        kwargs: dict[str, Any] = dict(zip(places[number], seen, strict=True))
        value = graph.call_module(f"teachers.{number}", (), kwargs)
        entry = entries[number]
        value = value if entry is None else graph.call_function(operator.getitem, (value, entry))
        if view is not None and view.classes is not None:
            root.register_buffer(
                f"view_{number}_classes", torch.tensor(view.classes).to(device_of(root)), persistent=False
            )
            chosen = graph.get_attr(f"view_{number}_classes")
            value = graph.call_function(torch.index_select, (value, axes[number], chosen))
        outputs.append(value)
    shares = [weight / sum(weights) for weight in weights]
    parts = [graph.call_function(operator.mul, (out, share)) for out, share in zip(outputs, shares, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = graph.call_function(operator.add, (total, part))
    graph.output(total)
    made = fx.GraphModule(root, graph, class_name="Ensemble")
    made.meta["teachers"] = {"weights": shares, "logits": entries, "inputs": places, "views": tuple(views)}
    return made


def is_ensemble(module: nn.Module) -> bool:
    """Whether it is one of `ensemble`'s."""
    return isinstance(module, fx.GraphModule) and "teachers" in module.meta


def member_views(module: nn.Module) -> tuple[View | None, ...]:
    """What each teacher of an ensemble sees; empty for any other module, and where all see the batch as it is."""
    views: tuple[View | None, ...] = _told(module)["views"] if is_ensemble(module) else ()
    return views if any(view is not None for view in views) else ()


def align_members(
    teacher: TracedModel, student: TracedModel, plans: Sequence[AlignmentPlan], *, required: bool = True
) -> AlignmentPlan:
    """One plan of several teachers: every layer of the student learns from the teacher whose layer goes best with it.

    Args:
        teacher: the ensemble, traced.
        student: traced.
        plans: one for each teacher and the student, in order; of layers of equal score the first teacher's is taken.
        required: whether having no pairs is an error.
    """
    best: dict[str, Pair] = {}
    dropped: list[str] = []
    for number, plan in enumerate(plans):
        for pair in plan.pairs:
            inner = pair.model_copy(update={"teacher": _inside(number, pair.teacher)})
            known = (
                inner.teacher in teacher.taps and teacher.facts_of(inner.teacher).shape[1:] == pair.teacher_shape[1:]
            )
            if not known:
                dropped.append(
                    f"teachers.{number}: {pair.teacher} (the layer is not found in the graph of all teachers)"
                )
            elif pair.student not in best or pair.score > best[pair.student].score:
                best[pair.student] = inner
    order = {node.name: place for place, node in enumerate(student.graph_module.graph.nodes)}
    if required and not best:
        raise MatchError(
            "No layer of any teacher is of the same kind as a layer of the student.",
            where="teachers",
            hint="Distil without a warm-up: --no-warmup.",
        )
    chosen = sorted(best.values(), key=lambda pair: order[student.node(pair.student).name])
    vectors = [(number, plan.embedding) for number, plan in enumerate(plans) if plan.embedding is not None]
    last = max(vectors, key=lambda entry: entry[1].score, default=None)
    named = last[1].model_copy(update={"teacher": _inside(last[0], last[1].teacher)}) if last is not None else None
    return AlignmentPlan(
        teacher=ModelStamp.of(teacher),
        student=ModelStamp.of(student),
        pairs=tuple(_in_order(chosen, teacher)),
        embedding=named if named is not None and named.teacher in teacher.taps else None,
        unmatched=(*_unmatched(plans), *dropped),
        layers=Layers(teacher=teacher.layers, student=student.layers),
        views=member_views(teacher.module),
    )


def _unmatched(plans: Sequence[AlignmentPlan]) -> list[str]:
    return [f"teachers.{number}: {line}" for number, plan in enumerate(plans) for line in plan.unmatched]


def _inside(number: int, tap: str) -> str:
    """A teacher's tap by the name that it has in the ensemble: `layer1` and `:relu` as `teachers.0.layer1` and `teachers.0:relu`."""
    return f"teachers.{number}{'' if tap.startswith(':') else '.'}{tap}"


def traced_members(teacher: TracedModel) -> list[TracedModel]:
    """The teachers of an ensemble, each traced by itself."""
    recorded = _told(teacher.module)
    values = teacher.example_values
    return [
        as_traced(
            member,
            Call((), dict(zip(names, values, strict=True))),
            role="teacher",
            logits=entry,
            view=View.combined(view, teacher.view),
        )
        for member, names, entry, view in zip(
            teacher.module.get_submodule("teachers").children(),
            *(recorded[fact] for fact in ("inputs", "logits", "views")),
            strict=True,
        )
    ]


def _told(module: nn.Module) -> dict[str, Any]:
    assert isinstance(module, fx.GraphModule)
    found: dict[str, Any] = module.meta["teachers"]
    return found


def _in_order(pairs: Sequence[Pair], teacher: TracedModel) -> list[Pair]:
    """The pairs without those that would cross another pair of the same teacher."""
    order = {node.name: place for place, node in enumerate(teacher.graph_module.graph.nodes)}
    reached: dict[str, int] = {}
    kept = []
    for pair in pairs:
        place = order[teacher.node(pair.teacher).name]
        if place > reached.get(member_of(pair.teacher), -1):
            reached[member_of(pair.teacher)] = place
            kept.append(pair)
    return kept


def _inputs(teachers: Sequence[nn.Module], example: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]], list[Any]]:
    """Names of the inputs of all of them together, and of each; and the inputs."""
    takes = [Inputs.of(teacher) for teacher in teachers]
    calls = [call_of(example, signature, where=f"Teacher {number}") for number, signature in enumerate(takes)]
    names = [tuple(call.by_name(signature.names)) for call, signature in zip(calls, takes, strict=True)]
    if len({len(teacher_names) for teacher_names in names}) > 1:
        raise ConfigError(
            "The teachers take different inputs: "
            + "; ".join(", ".join(teacher_names) for teacher_names in names)
            + ".",
            where="teachers",
            got=[list(teacher_names) for teacher_names in names],
            hint="Several teachers see the same inputs.",
        )
    return names[0], names, list(calls[0].by_name(names[0]).values())


def _views(
    teachers: Sequence[nn.Module],
    places: Sequence[Sequence[str]],
    values: Sequence[Any],
    asked: Sequence[View | None] | None,
) -> list[View | None]:
    """The view of each teacher: the requested one, and images with the number of channels that it takes."""
    asked = [None] * len(teachers) if asked is None else list(asked)
    if len(asked) != len(teachers):
        raise ConfigError(
            f"{len(teachers)} teachers with {len(asked)} views.", where="views", got=len(asked), expected=len(teachers)
        )
    found = []
    for teacher, names, view in zip(teachers, places, asked, strict=True):
        call = Call((), dict(zip(names, values, strict=True)))
        call = call.changed(view.apply) if view is not None else call
        channels = other_channels(teacher, call) if view is None or view.channels is None else None
        found.append(View.combined(view, View(channels=channels)))
    return found


def _checked_outputs(
    teachers: Sequence[nn.Module],
    places: Sequence[Sequence[str]],
    values: Sequence[Any],
    views: Sequence[View | None],
    asked: Sequence[str | int | None],
) -> tuple[list[int], list[str | int | None]]:
    """The axis of each teacher's outputs, and the entry that it is of (None: the output is one tensor).

    Refuses teachers whose logits cannot be averaged.
    """
    shapes, axes = [], []
    entries: list[str | int | None] = []
    for number, (teacher, names, view, logits) in enumerate(zip(teachers, places, views, asked, strict=True)):
        call = Call((), dict(zip(names, values, strict=True)))
        call = (call.changed(view.apply) if view is not None else call).to(device_of(teacher))
        with evaluating(teacher), torch.no_grad():
            try:
                found = call(teacher)
                if logits is None and isinstance(found, Mapping):
                    logits = next((name for name in MAIN_NAMES if name in found), None)
                entries.append(None if isinstance(found, Tensor) else logits)
                found = found if entries[-1] is None else found[logits]
            except IndistillError:
                raise
            except Exception as error:
                raise ConfigError(
                    f"Teacher {number} fails on the example inputs: {type(error).__name__}: {error}.",
                    where="teachers",
                    hint="Give example inputs that every teacher takes.",
                ) from error
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"Teacher {number} gives a {type(found).__name__}, but the logits of several teachers are averaged.",
                where="teachers",
                got=type(found).__name__,
                hint="Say which entry holds the logits: logits=KEY (--logits KEY).",
            )
        axes.append(1)
        if view is not None and view.classes is not None:
            if found.ndim == 3:  # tokens or positions
                traced = as_traced(teacher, call, role="teacher", logits=entries[-1])
                axes[-1] = traced.facts[traced.logits].channel_axis or 1
            _check_classes(number, view.classes, found.shape[axes[-1]])
            found = view.chosen(found, axes[-1])
        shapes.append(tuple(found.shape))
    if len(set(shapes)) > 1:
        raise ConfigError(
            f"The teachers' outputs have different shapes: {', '.join(map(str, shapes))}.",
            where="teachers",
            got=shapes,
            hint="Their logits are averaged, so give teachers with the same classes.",
        )
    return axes, entries


def _check_classes(number: int, classes: Sequence[int], outputs: int) -> None:
    """Refuse a map of classes that cannot be averaged with other teachers' logits."""
    if not classes or max(classes) >= outputs:
        wrong = f"has {outputs} outputs, not {max(classes) + 1}" if classes else "has no class of the student's"
        raise ConfigError(
            f"Teacher {number} {wrong}, but the logits of several teachers are averaged.",
            where="teacher classes",
            got=list(classes)[:20],
            expected=f"outputs from 0 to {outputs - 1}, one for each class of the student",
            hint="Say which of its outputs are the student's classes (--teacher-classes, View(classes=…)), or leave it out.",
        )
