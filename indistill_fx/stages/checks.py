"""Whether a batch is what a stage was compiled for: labels of its task, inputs of its device, dtypes and sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from indistill_fx.batch import Parts, Sizes, split, unfit
from indistill_fx.errors import ConfigError
from indistill_fx.graph.view import View
from indistill_fx.losses.choose_task import compared_input, require_as_before
from indistill_fx.losses.task import Task
from indistill_fx.system.call import Call
from indistill_fx.system.model_inputs import Inputs
from indistill_fx.system.nested import tensors_of
from indistill_fx.traced import TracedModel


def label_check(
    task: Task, logits_of: Callable[[Any], Tensor | None], *models: Inputs, inferred: bool = False
) -> Callable[[int, Any], None]:
    """A check that a batch's labels are of the task.

    Args:
        task: what they mean.
        logits_of: the student's outputs for a batch, or None where they cannot be had; asked once for every form (sizes without the
            batch) that labels come in.
        models: what they take; of none, that is one input.
        inferred: whether the task is, from the labels of one batch.
    """
    known: dict[torch.Size, torch.Size] = {}

    def check(number: int, batch: Any) -> None:
        parts = split(batch, *models, where=f"Batch {number + 1}")
        labels = parts.labels
        if labels is None or not labels.numel() or not task.labelled:
            return
        form = labels.shape[1:]
        if form not in known and (found := logits_of(batch)) is not None:
            known[form] = found.shape[1:]
        if form not in known:
            return
        # expanded, so it takes no memory
        stand_in = torch.zeros(1, device=labels.device).expand(len(labels), *known[form])
        inputs = compared_input(parts.calls[-1].tensors, labels) if inferred else None
        check_labels(task, stand_in, labels, whose=f"Labels of batch {number + 1}", inputs=inputs)

    return check


def check_labels(task: Task, logits: Tensor, labels: Tensor, *, whose: str, inputs: Tensor | None = None) -> None:
    """Refuse labels that are not of the task.

    Args:
        task: what they mean.
        logits: as the student gives them.
        labels: as the loader gives them.
        whose: they are, as the beginning of the message.
        inputs: the batch's first, if the task was inferred from another batch.

    Raises:
        ConfigError: form or values are not those of the task.
    """
    try:
        require_as_before(task, labels, inputs)
        prepared, meant = task.prepare(logits, labels)
        assert meant is not None
        task.check(prepared, meant)
    except ConfigError as error:
        raise ConfigError(
            f"{whose}: {error.message}", where=error.where, got=error.got, expected=error.expected, hint=error.hint
        ) from error


def require_frozen_end(student: nn.Module, half: nn.Module, tap: str) -> None:
    """Refuse a student with layers after a stage's last tap that would train, and that the stage's loss never reaches.

    Args:
        student: whole.
        half: its graph in the stage, which ends at the tap.
        tap: the last one.

    Raises:
        ConfigError: names a parameter that would stay as it is.
    """
    reached = {id(parameter) for parameter in half.parameters()}
    left = [name for name, p in student.named_parameters() if p.requires_grad and id(p) not in reached]
    if left:
        raise ConfigError(
            f"The loss trains the student up to `{tap}` only, and `{left[0]}` after it would keep its initial values.",
            where="main",
            got=left[0],
            expected="a student that ends in its teacher's own classifier",
            hint="Make one with indistill_fx.reuse_classifier(teacher, student), or give the loss weight_labels (--main-option "
            "weight_labels=1).",
        )


def check_inputs(
    parts: Parts, names: Sequence[str], dtypes: Sequence[torch.dtype | None], student: nn.Module, *, stage: str
) -> None:
    """Refuse inputs of another device than the student's, or of a dtype it was not made for.

    Args:
        parts: of the batch; the first call is the student's.
        names: of the model's inputs.
        dtypes: what the model was traced with, input by input; None where that is unknown. A floating one stands for the dtype
            that the student's parameters have now.
        student: its first floating parameter gives device and dtype.
        stage: its name, for the message.

    Raises:
        ConfigError: names the stage and the argument.
    """
    anchor = next((p for p in student.parameters() if p.is_floating_point()), None)
    # a sharded parameter is gathered only when it is used
    if anchor is None or type(anchor) not in (Tensor, nn.Parameter):
        return
    where, inputs = f"Stage `{stage}`", parts.calls[0].by_name(names)
    given = [(name, tensor) for name, value in inputs.items() for tensor in tensors_of(value)]
    for name, value in (*given, ("labels", parts.labels)):
        if value is not None and value.device != anchor.device:
            hint = f"Move the batch: batch.to({str(anchor.device)!r}), or the stage: stage.to({str(value.device)!r})."
            raise unfit(where, name, f"on {value.device}", f"on {anchor.device}, where the student is", hint)
    if torch.is_autocast_enabled(anchor.device.type):
        return
    for name, dtype in zip(names, dtypes, strict=True):
        value = inputs.get(name)
        if dtype is None or value is None:
            continue
        wanted = anchor.dtype if dtype.is_floating_point else dtype
        fits = value.dtype == wanted if wanted.is_floating_point else not value.is_floating_point()
        if not fits:
            hint = f"Convert it: {name}.to({wanted}), or train under torch.autocast (mixed_precision)."
            raise unfit(where, name, str(value.dtype), str(wanted), hint)


def check_sizes(call: Call, fixed: Mapping[str, Sizes], *, where: str, role: str) -> None:
    """Refuse inputs of another size than the one that a graph was captured for, where it works for that alone.

    Args:
        call: of the model.
        fixed: sizes by input; None for an axis of any size.
        where: who asks, for the message.
        role: `teacher` or `student`.

    Raises:
        ConfigError: names the input and both sizes.
    """
    found = call.by_name(tuple(fixed)) if call.kwargs else dict(zip(fixed, call.args, strict=False))
    for name, sizes in fixed.items():
        value = found.get(name)
        if not isinstance(value, Tensor) or all(n in (None, size) for n, size in zip(sizes, value.shape, strict=False)):
            continue
        got, expected = ("x".join("any" if n is None else str(n) for n in shape) for shape in (value.shape, sizes))
        hint = "Bring all batches to one size (pad them), and give that size: --input, example_inputs=…."
        raise unfit(where, name, f"{got} in size", f"{expected}, for which alone the {role} could be captured", hint)


def check_classes(
    teacher: TracedModel, student: TracedModel, view: View | None, compared: Sequence[tuple[str | None, str | None]]
) -> bool:
    """Whether the teacher's outputs, as its view chooses them, are as many as the student's; by the facts of both, if they show it.

    Args:
        teacher: traced.
        student: traced.
        view: the teacher's, which may say which of its outputs are the student's classes.
        compared: the logits that main stages read, the teacher's and the student's.

    Raises:
        ConfigError: the main loss compares logits of different classes, or the view names outputs that there are not.
    """
    count, outputs = (_channels(model) for model in (student, teacher))
    other, strangers = outputs, False
    if view is not None and view.classes is not None and outputs is not None:
        if max(view.classes, default=0) >= outputs:
            raise ConfigError(
                f"Output {max(view.classes)} of the teacher is named as a class of the student, but the teacher has {outputs} outputs.",
                where="teacher classes",
                got=max(view.classes),
                expected=f"0 to {outputs - 1}",
                hint="Give the teacher's output for every class of the student, counted from 0 (--teacher-classes).",
            )
        other, strangers = len(view.classes), not view.classes
    for logits in compared:
        if None not in (*logits, count, other) and count != other:
            which = "none of the teacher's is one of the student's, and " if strangers else ""
            raise ConfigError(
                f"The teacher has {outputs} classes and the student {count}; {which}the main loss compares them.",
                where="classes",
                got=count,
                expected=other,
                hint="Build both with the same number of classes (such as ?num_classes=10), say which outputs of the teacher are the "
                "student's classes (--teacher-classes, View(classes=…)), or take a main loss that reads features only, such as pkt.",
            )
    return None in (count, other) or count == other


def require_one_output(model: TracedModel) -> None:
    """Refuse a model of which nobody knows which output holds the logits.

    Raises:
        ConfigError: it returns several tensors of different shapes; none is called `logits` or `out`, and none was named.
    """
    if model.several_outputs:
        shown = ", ".join(model.several_outputs)
        raise ConfigError(
            f"The {model.role} returns several outputs of different shapes: {shown}. The main loss reads the logits.",
            where="logits",
            got=list(model.several_outputs),
            expected="one output, or one called `logits`",
            hint="Say which one holds the logits: logits=KEY (--logits KEY); for `compile_stages`, ifx.trace(model, …, logits=KEY). If "
            "none does, as none of a detector's maps, take a loss that reads layers alone, all pairs of them: at or reviewkd (--main at).",
        )


def _channels(model: TracedModel) -> int | None:
    facts = model.facts[model.logits]
    return facts.channels if facts.channel_axis is not None else None


def has_classes_last(model: TracedModel) -> bool:
    """Whether the main output holds its classes in the last axis, after positions: logits of tokens, not those of classes or pixels."""
    facts = model.facts[model.logits]
    return len(facts.shape) > 2 and facts.channel_axis not in (None, 1)


_VALUES = 'Name the task: task="regression" (--task regression), or "multilabel" if the values are logits of labels.'


def require_classes(model: TracedModel) -> None:
    """Refuse outputs whose second axis holds no classes, where nobody says what they are: without a task, classes are compared there.

    Raises:
        ConfigError: the main output has its classes in the last axis, or none; or is one value for each sample or position.
    """
    facts = model.facts[model.logits]
    shape = ("batch", *facts.shape[1:])
    if has_classes_last(model):
        problem = "have their classes in the last axis, but without a task those in the second are compared"
        hint = (
            'For tokens, name the task: task="language" (--task language). For other outputs, move the classes to the second axis '
            "(movedim(-1, 1)), or write a Task."
        )
    elif len(shape) == 1 or shape[1] == 1:
        problem = (
            "are one value each, but without a task classes are compared, and of one class there is nothing to learn"
        )
        hint = _VALUES
    elif facts.channel_axis is None:
        problem = "have no axis of classes, but without a task those in the second are compared"
        hint = _VALUES
    else:
        return
    raise ConfigError(f"The outputs ({', '.join(map(str, shape))}) {problem}.", where="task", got=shape, hint=hint)
